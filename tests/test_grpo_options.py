"""GRPOModule's options in a real Trainer: normalisers, KL in the reward, controllers, entropy, dynamic sampling."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from rft_lightning import GRPOModule, GRPOObjective
from rft_lightning.advantages import group_advantages
from rft_lightning.control import AdaptiveEntropy, AdaptiveKL
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.dynamic_sampling import choose_groups
from rft_lightning.errors import ConfigConflictError
from rft_lightning.objective_options import LOSS_TYPES
from rft_lightning.sample import Rollouts
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask


def length_reward(answer, target):
    return (len(answer.text) % 17) / 17


def other_reward(answer, target):
    return float(len(answer.text) % 2)


def constant_reward(answer, target):
    return 0.5


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def data(tiny_policy, **kwargs):
    settings = {"batch_size": 4, "train_size": 12, "val_size": 4}
    settings["task"] = DetectionTask(rewards={"length": length_reward})
    return ShapesDataModule(processor=tiny_policy, **{**settings, **kwargs})


def grpo(tiny_policy, **kwargs):
    settings = {"group_size": 3, "max_completion_length": 6, "optimizer": sgd, "schedule": "constant"}
    return GRPOModule(tiny_policy, **{"max_grad_norm": None, **settings, **kwargs})


class Record(Callback):
    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, *args):
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def updates(module, trainer, datamodule):
    """w - w0 of a run."""
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    trainer.fit(module, datamodule=datamodule)
    return {name: p.detach() - before[name] for name, p in module.policy.named_parameters()}


def relative(found, expected):
    """L2 distance over L2 norm, over all tensors."""
    distance = sum((found[name] - expected[name]).square().sum() for name in expected).sqrt()
    norm = sum(value.square().sum() for value in expected.values()).sqrt()
    assert norm > 1e-4  # what is compared has moved
    return float(distance / norm)


def vary_lengths(rollouts: Rollouts) -> Rollouts:
    """Completions of a random policy rarely end: cut them at different lengths, so that token counts differ."""
    groups, size, length = rollouts.completion_ids.shape
    lengths = 1 + torch.arange(groups * size).view(groups, size) * 5 % length
    rollouts.completion_mask &= torch.arange(length) < lengths[..., None]
    rollouts.truncated = lengths == length
    return rollouts


class Uneven(GRPOModule):
    def roll_out(self, batch, **settings):
        return vary_lengths(super().roll_out(batch, **settings))


OPTIONS = {
    **{name: {"loss_type": name} for name in LOSS_TYPES if name != "cispo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "top entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.1},
    "entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.1},
    "kl": {"kl_estimator": "k1", "use_bias_correction_kl": True, "beta": 0.2},
    "sampler": {"sampler_correction": "token_truncate"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_size_of_micro_batches_changes_no_update(tiny_policy, make_trainer, option):
    """Two optimiser steps per rollout with a ragged last mini-batch; the counts are the rollout batch's."""

    def run(micro):
        module = Uneven(
            tiny_policy, group_size=3, max_completion_length=6, optimizer=sgd, schedule="constant", max_grad_norm=None,
            mini_batch_prompts=3, micro_batch_prompts=micro, objective=GRPOObjective(**OPTIONS[option]),
        )  # fmt: skip
        return updates(module, make_trainer(2), data(tiny_policy))

    assert relative(run(1), run(None)) < 1e-3


def test_bnpo_divides_by_the_tokens_of_the_rollout(tiny_policy, make_trainer):
    """Where TRL divides each micro-batch by its own tokens: with micro-batches of one prompt that is another update."""

    def run(loss_type):
        module = Uneven(
            tiny_policy, group_size=3, max_completion_length=6, optimizer=sgd, schedule="constant", max_grad_norm=None,
            micro_batch_prompts=1, objective=GRPOObjective(loss_type=loss_type, beta=0),
        )  # fmt: skip
        return updates(module, make_trainer(1), data(tiny_policy))

    assert relative(run("bnpo"), run("dapo")) < 1e-5
    assert relative(run("bnpo"), run("grpo")) > 0.05


@pytest.mark.parametrize("cut_off", [True, False])
def test_truncated_completions_teach_nothing(tiny_policy, make_trainer, cut_off):
    class Truncating(GRPOModule):
        def roll_out(self, batch, **settings):
            rollouts = super().roll_out(batch, **settings)
            rollouts.truncated[:] = cut_off
            return rollouts

    module = Truncating(
        tiny_policy, group_size=3, max_completion_length=6, optimizer=sgd, schedule="constant",
        mask_truncated_completions=True,
    )  # fmt: skip
    moved = max(value.abs().max() for value in updates(module, make_trainer(1), data(tiny_policy)).values())
    assert moved == 0 if cut_off else moved > 1e-4


def test_an_entropy_bonus_raises_the_entropy(tiny_policy, make_trainer):
    record = Record()
    task = DetectionTask(rewards={"constant": constant_reward})  # no other gradient
    module = grpo(
        tiny_policy,
        temperature=0.1,
        objective=GRPOObjective(beta=0, entropy_coef=1.0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
    )
    make_trainer(6, callbacks=[record]).fit(module, datamodule=data(tiny_policy, task=task))
    entropies = [metrics["train/entropy"] for metrics in record.metrics]
    assert entropies[-1] > entropies[0] + 0.05
    assert record.metrics[0]["train/policy_loss"] == 0


# KL in the reward, and coefficients that adapt


def test_kl_in_the_reward_is_subtracted_from_it(tiny_policy, make_trainer):
    seen = {}

    class Spy(GRPOModule):
        def advantages(self, scores, group_size, penalty_N=None):
            found = super().advantages(scores, group_size, penalty_N)
            if penalty_N is not None:
                total = (scores.rewards * scores.weights).sum(1) - penalty_N
                expected = group_advantages(total, group_size)
                seen[self.global_step] = (found, expected, penalty_N)
            return found

    module = Spy(
        tiny_policy, group_size=3, max_completion_length=6, optimizer=sgd, schedule="constant", max_grad_norm=None,
        objective=GRPOObjective(beta=0.5, kl_placement="reward", kl_estimator="k1"),
    )  # fmt: skip
    record = Record()
    make_trainer(3, callbacks=[record]).fit(module, datamodule=data(tiny_policy))
    assert seen[0][2].abs().max() < 1e-4  # the policy is still the reference model
    found, expected, penalty = seen[2]
    assert penalty.abs().max() > 1e-4
    torch.testing.assert_close(found, expected)
    # The ratio is 1 and the advantages of a group sum to 0: without a KL term nothing is left of the loss's value.
    assert record.metrics[2]["train/loss"] == pytest.approx(0, abs=1e-6)
    assert record.metrics[2]["train/kl"] != 0


def test_adaptive_coefficients_move_are_logged_and_survive_a_resume(tiny_policy, make_trainer, tmp_path):
    def module():
        return grpo(
            tiny_policy,
            objective=GRPOObjective(beta=0.04, entropy_coef=0.02),
            kl_controller=AdaptiveKL(target=1e-9, horizon=24),
            entropy_controller=AdaptiveEntropy(target=100.0, delta=0.01),
        )

    record = Record()
    whole = module()
    make_trainer(4, callbacks=[record]).fit(whole, datamodule=data(tiny_policy))
    betas = [metrics["train/beta"] for metrics in record.metrics]
    # No KL in the first step; afterwards it is above its target: a factor of 1 + 0.2 * 12 completions / 24.
    assert betas == pytest.approx([0.04 * 0.9, 0.04 * 0.9 * 1.1, 0.04 * 0.9 * 1.1**2, 0.04 * 0.9 * 1.1**3], rel=1e-5)
    assert [m["train/entropy_coef"] for m in record.metrics] == pytest.approx([0.03, 0.04, 0.05, 0.06])

    trainer = make_trainer(2)
    trainer.fit(module(), datamodule=data(tiny_policy))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    make_trainer(4).fit(resumed, datamodule=data(tiny_policy), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert {n: c.state_dict() for n, c in resumed.controllers.items()} == {
        n: c.state_dict() for n, c in whole.controllers.items()
    }
    for name, parameter in whole.policy.named_parameters():
        assert torch.equal(parameter, resumed.policy.get_parameter(name)), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"baseline": "mean"}, "baseline"),
        ({"aggregation": "normalize_then_sum", "baseline": "leave_one_out"}, "own baseline"),
        ({"baseline": "batch"}, "scale_rewards to batch"),
        (
            {"aggregation": "normalize_then_sum", "objective": GRPOObjective(kl_placement="reward")},
            "subtracts the KL from the sum",
        ),
        ({"objective": GRPOObjective(beta=0), "kl_controller": AdaptiveKL(target=0.1)}, "cannot start from 0"),
        (
            {"objective": GRPOObjective(sampler_correction="token_mask"), "rollout_engine": "hf"},
            "rollout_engine hf reports none. Set rollout_engine: native",
        ),
    ],
)
def test_contradictions_are_refused(tiny_policy, arguments, words):
    with pytest.raises(ConfigConflictError, match=words):
        grpo(tiny_policy, **arguments)


def test_a_step_without_a_token_that_counts_moves_no_coefficient(tiny_policy, make_trainer):
    class Truncating(GRPOModule):
        def roll_out(self, batch, **settings):
            rollouts = super().roll_out(batch, **settings)
            rollouts.truncated[:] = True
            return rollouts

    module = Truncating(
        tiny_policy, group_size=3, max_completion_length=6, optimizer=sgd, mask_truncated_completions=True,
        objective=GRPOObjective(beta=0.04, entropy_coef=0.02),
        kl_controller=AdaptiveKL(target=0.05, horizon=24), entropy_controller=AdaptiveEntropy(target=0.2),
    )  # fmt: skip
    make_trainer(2).fit(module, datamodule=data(tiny_policy))
    assert {name: controller.coefficient for name, controller in module.controllers.items()} == {
        "beta": 0.04,
        "entropy_coef": 0.02,
    }


def test_an_objective_may_be_given_to_two_modules(tiny_policy):
    objective = GRPOObjective(loss_type="dr_grpo")
    limits = [grpo(tiny_policy, objective=objective, max_completion_length=limit).objective for limit in (8, 64)]
    assert [limit.max_completion_length for limit in limits] == [8, 64]
    assert objective.max_completion_length is None


# Advantages


def test_tasks_with_other_rewards_and_weights_share_a_gdpo_batch(tiny_policy):
    tasks = [
        DetectionTask(rewards={"length": length_reward}, reward_weights={"length": 2.0}),
        ClassificationTask(rewards={"other": other_reward}),
        GroundingTask(rewards={"length": length_reward, "other": other_reward}, reward_weights={"other": 3.0}),
    ]
    module = grpo(tiny_policy, aggregation="normalize_then_sum")
    module.configure_model()
    samples = data(tiny_policy, task=tasks)
    batch = samples.encoder([samples.sample("train", i) for i in range(6)])
    _, scores, advantages = module.sample_and_score(batch)
    assert scores.names == ["length", "other"]
    assert scores.weights.unique(dim=0).tolist() == [[0.0, 1.0], [1.0, 3.0], [2.0, 0.0]]
    expected = group_advantages(
        scores.rewards, 3, weights=scores.weights, aggregation="normalize_then_sum", baseline="group"
    )
    torch.testing.assert_close(advantages, expected)
    assert advantages.abs().max() > 0.5


def test_leave_one_out_reaches_the_advantages(tiny_policy):
    module = grpo(tiny_policy, baseline="leave_one_out", scale_rewards="none")
    module.configure_model()
    samples = data(tiny_policy)
    _, scores, advantages = module.sample_and_score(samples.encoder([samples.sample("train", 0)]))
    rewards = scores.rewards[:, 0]
    expected = [rewards[i] - (rewards.sum() - rewards[i]) / 2 for i in range(3)]
    torch.testing.assert_close(advantages, torch.stack(expected))


def test_what_occurs_now_and_then_is_not_repeated_in_the_log(tiny_policy, make_trainer):
    class FailsOnce:
        calls = 0

        def __call__(self, answer, target):
            self.calls += 1
            return float("nan") if self.calls == 1 else len(answer.text) / 100

    record, task = Record(), DetectionTask(rewards={"once": FailsOnce()})
    task.rewards["once"].__class__.__deepcopy__ = lambda self, memo: self
    make_trainer(2, callbacks=[record]).fit(grpo(tiny_policy), datamodule=data(tiny_policy, task=task))
    assert [metrics.get("train/rewards/once/failed") for metrics in record.metrics] == [1, 0]


# Dynamic sampling


def test_choose_groups_takes_the_first_informative_ones_and_fills_up():
    assert choose_groups([True, False, True, True], 2) == [0, 2]
    assert choose_groups([False, False, True, False], 3) == [0, 1, 2]
    assert choose_groups([False, True, False, False], 2) == [0, 1]
    assert choose_groups([False, False], 2) == [0, 1]


class Picky:
    """A reward in which only the answers to every third sample differ."""

    def __call__(self, answer, target):
        return len(answer.text) / 100 if target.boxes.sum().long() % 3 == 0 else 1.0


def test_waves_are_rolled_out_until_enough_groups_differ(tiny_policy, make_trainer):
    record, trained, rolled = Record(), [], []

    class Spy(GRPOModule):
        def roll_out(self, batch, **settings):
            rolled.append([(s.id, s.occurrence) for s in batch.samples])
            return super().roll_out(batch, **settings)

        def update(self, mini_batches, advantages_N):
            samples = [s for mini in mini_batches for micro in mini for s in micro.rollouts.prompts.samples]
            trained.append(([(s.id, s.occurrence) for s in samples], advantages_N.view(-1, 3).abs().amax(1) > 0))
            return super().update(mini_batches, advantages_N)

    module = Spy(
        tiny_policy, group_size=3, max_completion_length=6, optimizer=sgd, schedule="constant", micro_batch_prompts=1
    )
    task = DetectionTask(rewards={"picky": Picky()})
    source = data(tiny_policy, task=task, batch_size=2, oversample=4, train_size=24)
    make_trainer(3, callbacks=[record]).fit(module, datamodule=source)
    waves = [int(metrics["train/dynamic_sampling/waves"]) for metrics in record.metrics]
    assert sum(waves) == len(rolled)
    assert max(waves) > 1
    start = 0
    for count, (ids, informative) in zip(waves, trained, strict=True):
        offered = [entry for wave in rolled[start : start + count] for entry in wave]
        start += count
        assert len(ids) == 2
        assert set(ids) <= set(offered)
        assert informative.all() or count == 4
    assert all(0 < m["train/dynamic_sampling/informative"] <= 1 for m in record.metrics)


def test_one_wave_is_plain_training(tiny_policy, make_trainer):
    """Where the first wave suffices, the update is that of a run without oversampling on the same prompts."""

    def run(oversample):
        module = grpo(tiny_policy)
        source = data(tiny_policy, batch_size=4, oversample=oversample, train_size=12)
        return updates(module, make_trainer(1), source)

    assert relative(run(3), run(1)) < 1e-5


def test_take_equals_select_and_carries_the_pictures(tiny_policy):
    samples = data(tiny_policy)
    batch = samples.encoder([samples.sample("train", i) for i in range(4)])
    taken = batch.take([2, 0])
    for place, number in enumerate((2, 0)):
        one, same = batch.select(number, number + 1), taken.select(place, place + 1)
        assert torch.equal(one.input_ids, same.input_ids)
        assert one.vision.keys() == same.vision.keys()
        assert all(torch.equal(one.vision[name], same.vision[name]) for name in one.vision)
        assert [s.id for s in one.samples] == [s.id for s in same.samples]


def test_supervised_fine_tuning_refuses_waves(tiny_policy, make_trainer):
    from rft_lightning import SFTModule

    with pytest.raises(ConfigConflictError, match=r"oversample is 2.*set it to 1"):
        make_trainer(1).fit(SFTModule(tiny_policy), datamodule=data(tiny_policy, oversample=2))


def test_dynamic_sampling_refuses_a_baseline_under_which_every_group_teaches(tiny_policy, make_trainer):
    module = grpo(tiny_policy, baseline="batch", scale_rewards="batch")
    with pytest.raises(ConfigConflictError, match=r"oversample is 2.*Set oversample to 1, or another baseline"):
        make_trainer(1).fit(module, datamodule=data(tiny_policy, oversample=2))
