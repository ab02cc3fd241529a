"""score_rollouts and its statistics, beside a restatement of what they are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rft_lightning.errors import ConfigConflictError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import ClassTarget, DetectionTarget, PromptBatch, Rollouts, Sample
from rft_lightning.scoring import Scores, score_rollouts, statistics
from rft_lightning.tasks import ClassificationTask, DetectionTask

PICTURE = Image.new("RGB", (100, 100))
GOOD = "<think>t</think><answer>[{'Position': [100, 100, 500, 500], 'Confidence': 0.9}]</answer>"


def rollouts(samples, texts, lengths, truncated):
    count, size, width = len(samples), len(texts[0]), max(map(max, lengths))
    prompts = PromptBatch(
        input_ids=torch.zeros(count, 1, dtype=torch.long),
        attention_mask=torch.ones(count, 1, dtype=torch.long),
        vision={},
        image_counts=[1] * count,
        patch_counts=[1] * count,
        samples=samples,
        frame=CoordinateFrame(kind="relative", extent=1000),
    )
    mask = torch.arange(width) < torch.tensor(lengths)[..., None]
    ids = torch.zeros(count, size, width, dtype=torch.long)
    return Rollouts(prompts, ids, mask, texts, torch.tensor(truncated))


def sample(name, target, task):
    return Sample(name, PICTURE, target, task, (100, 100))


def detection(**kwargs):
    return sample("boxes/1", DetectionTarget(torch.tensor([[10.0, 10, 50, 50]])), DetectionTask(**kwargs))


def roses(**kwargs):
    return sample("flowers/1", ClassTarget("rose"), ClassificationTask(**kwargs))


def test_every_completion_is_read_and_rewarded_by_the_task_of_its_sample():
    seen = []

    def spy(answer, target, *, step):
        seen.append((answer.text, answer.num_tokens, answer.token_limit, answer.truncated, target, step))
        return answer.num_tokens

    samples = [
        detection(reward_weights={"iou": 2.0, "confidence": 0.5}),
        roses(rewards={"accuracy": lambda answer, target: float(answer.label == target.label), "spy": spy}),
    ]
    texts = [[GOOD, "no tags"], ["<answer>rose</answer>", "<answer>tulip"]]
    scores = score_rollouts(
        rollouts(samples, texts, [[3, 5], [2, 7]], [[False, False], [False, True]]), step=11, token_limit=7
    )
    assert scores.names == ["format", "iou", "confidence", "accuracy", "spy"]
    nan = math.nan
    expected = [
        [1, 1, 0.9, nan, nan],
        [0, 0, 0, nan, nan],
        [nan, nan, nan, 1, 2],
        [nan, nan, nan, 0, 7],
    ]
    torch.testing.assert_close(scores.rewards, torch.tensor(expected), equal_nan=True)
    weights = torch.tensor([[1, 2, 0.5, 0, 0]] * 2 + [[0, 0, 0, 1, 1.0]] * 2)
    torch.testing.assert_close(scores.weights, weights)
    torch.testing.assert_close(scores.total, (torch.tensor(expected) * weights).nansum(1))
    assert scores.rewards.dtype == scores.weights.dtype == torch.float32
    assert seen == [
        ("<answer>rose</answer>", 2, 7, False, samples[1].target, 11),
        ("<answer>tulip", 7, 7, True, samples[1].target, 11),
    ]
    assert scores.failures == {}


def test_the_rewards_are_those_of_the_task_one_by_one():
    """Against read and score by hand, on tasks that share some names in another order."""
    rewards = dict(reversed(DetectionTask().rewards.items()))
    samples = [detection(), detection(rewards=rewards, reward_weights={"iou": 3.0})]
    texts = [[GOOD, GOOD.replace("500", "400")], ["No Objects", GOOD.replace("0.9", "0.3")]]
    batch = rollouts(samples, texts, [[1, 1], [1, 1]], [[False] * 2] * 2)
    scores = score_rollouts(batch, step=0, token_limit=None)
    row = 0
    for one, group in zip(samples, texts, strict=True):
        for text in group:
            answer = one.task.read(text, batch.prompts.frame, one.image_size)
            by_name = dict(zip(one.task.rewards, one.task.score(answer, one.target).tolist(), strict=True))
            assert scores.rewards[row].tolist() == [by_name[name] for name in scores.names]
            row += 1
    assert scores.weights[:, scores.names.index("iou")].tolist() == [1, 1, 3, 3]


def test_parse_rate_and_kinds_of_problems_are_shares_of_completions():
    texts = [["<answer>rose", "rose", "<answer>a</answer><answer>b</answer>", "<answer>rose</answer>"]]
    scores = score_rollouts(rollouts([roses()], texts, [[1] * 4], [[False] * 4]), step=0, token_limit=4)
    assert scores.problems == {"answer_not_closed": 0.25, "no_answer_block": 0.25, "repeated_answer_block": 0.25}
    entries = "<answer>[{'Position': [1, 2]}, {'Position': [3]}]</answer>"  # two problems of a kind count once
    scores = score_rollouts(rollouts([detection()], [[entries, GOOD]], [[1, 1]], [[False] * 2]), step=0, token_limit=4)
    assert scores.problems["box_malformed"] == 0.5
    assert scores.parse_rate == 0.5


def test_problems_in_bare_words_have_no_kind():
    class Own(ClassificationTask):
        def read(self, text, frame, image_size):
            answer = super().read(text, frame, image_size)
            answer.problems = (*answer.problems, "too polite")
            return answer

    batch = rollouts([sample("a", ClassTarget("rose"), Own())], [["rose", GOOD]], [[1, 1]], [[False] * 2])
    assert score_rollouts(batch, step=0, token_limit=4).problems == {"no_answer_block": 0.5}


def test_failures_are_counted_per_completion():
    def picky(answer, target):
        return 1 / (answer.num_tokens - 2)

    task = {"rewards": {"picky": picky, "fine": lambda answer, target: 0.5}, "failed_reward": -2.0}
    scores = score_rollouts(
        rollouts([roses(**task)], [["a", "b", "c"]], [[2, 3, 2]], [[False] * 3]), step=0, token_limit=9
    )
    assert scores.failures == {"picky": 2}
    assert scores.rewards[:, 0].tolist() == [-2, 1, -2]
    assert statistics(scores, 3)["rewards/picky/failed"] == 2
    assert "rewards/fine/failed" not in statistics(scores, 3)


def test_a_sample_without_a_target_is_refused():
    batch = rollouts([sample("plain/1", None, DetectionTask())], [["x", "y"]], [[1, 1]], [[False] * 2])
    with pytest.raises(ConfigConflictError, match="'plain/1' has no target"):
        score_rollouts(batch, step=0, token_limit=4)


# Statistics


def made(rewards, weights=None):
    rewards = torch.tensor(rewards)
    weights = torch.ones_like(rewards) if weights is None else torch.tensor(weights)
    names = [f"r{column}" for column in range(rewards.shape[1])]
    return Scores(names, rewards, weights, parse_rate=0.75, problems={"empty_answer": 0.25}, failures={})


def test_statistics_by_hand():
    values = statistics(made([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.5, 0.5]], [[1.0, 2.0]] * 4), 2)
    assert values == pytest.approx(
        {
            "reward": (1 + 2 + 1.5 + 2.5) / 4,
            "reward_std": math.sqrt((0.75**2 + 0.25**2 + 0.25**2 + 0.75**2) / 3),
            "reward_group_std": math.sqrt(0.5),
            "frac_reward_zero_std": 0.0,
            "parse_rate": 0.75,
            "rewards/r0/mean": 0.75,
            "rewards/r0/std": math.sqrt((0.0625 + 0.5625 + 0.0625 + 0.5625) / 3),
            "rewards/r1/mean": 0.5,
            "rewards/r1/std": math.sqrt(0.5 / 3),
            "parse_problems/empty_answer": 0.25,
        }
    )
    assert all(type(value) is float for value in values.values())


def test_what_does_not_apply_is_left_out():
    nan = math.nan
    values = statistics(made([[1.0, nan], [3.0, nan], [nan, nan], [nan, nan], [2.0, nan], [nan, nan]]), 2)
    assert values["reward"] == 2
    assert values["reward_std"] == pytest.approx(1)
    assert values["reward_group_std"] == pytest.approx(math.sqrt(2))  # of the one group in which two can be compared
    assert values["frac_reward_zero_std"] == pytest.approx(2 / 3)  # the others teach nothing
    assert values["rewards/r0/std"] == pytest.approx(1)
    assert math.isnan(values["rewards/r1/mean"])
    assert math.isnan(values["rewards/r1/std"])


@given(st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=2), min_size=4, max_size=4))
def test_statistics_are_those_of_trl(rewards):
    """Restated from TRL's GRPOTrainer: reward_std over the batch, frac_reward_zero_std from the groups."""
    values = statistics(made(rewards), 2)
    total = torch.tensor(rewards).sum(1)
    stds = total.view(-1, 2).std(1)
    assert values["reward"] == pytest.approx(total.mean().item())
    assert values["reward_std"] == pytest.approx(total.std().item(), abs=1e-6)
    assert values["reward_group_std"] == pytest.approx(stds.mean().item(), abs=1e-6)
    assert values["frac_reward_zero_std"] == torch.isclose(stds, torch.zeros(2)).float().mean()
    for column in range(2):
        one = torch.tensor(rewards)[:, column]
        assert values[f"rewards/r{column}/mean"] == pytest.approx(one.mean().item())
        assert values[f"rewards/r{column}/std"] == pytest.approx(one.std().item(), abs=1e-6)
