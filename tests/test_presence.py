"""PresenceTask and how its answers are counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from PIL import Image
from torch.utils.data import DataLoader

from rft_lightning.callbacks import DetectionMAP, PresenceAccuracy
from rft_lightning.errors import ConfigConflictError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.metrics import PresenceScores
from rft_lightning.prompts import PromptEncoder
from rft_lightning.report.contact_sheet import draw_sample
from rft_lightning.rewards import accuracy_reward, presence_reward
from rft_lightning.sample import ClassTarget, DetectionTarget, Prediction, PresenceTarget, Sample
from rft_lightning.tasks import PresenceTask

FRAME, SIZE = CoordinateFrame(), (64, 48)


def read(text: str):
    return PresenceTask().read(text, FRAME, SIZE)


# --- reading ---------------------------------------------------------------------------------------------------------

YES = [
    "Yes",
    "yes.",
    "YES!",
    "**Yes**",
    "_yes_",
    " yes\n",
    "Yes, there is a dog in the picture.",
    "<answer>yes</answer>",
    "<answer> Yes. </answer>",
    "<think>There is no cat, no bus; yes or no? A dog.</think> <answer>Yes</answer>",
    "<think>no</think>yes",
    "<think>no</think>\n<answer>yes",
]
NO = [
    "No",
    "NO",
    "no.",
    "No, it does not.",
    "There is no dog.",
    "No Objects",
    '"No"',
    "<answer>no</answer>",
    "<think>Yes, I see grass.</think><answer>No</answer>",
]
NEITHER = [
    "",
    " ",
    "There is a dog.",
    "There is not a dog, none at all.",
    "Yesterday nobody knew.",
    "ja",
    "oui",
    "是",
    "нет",
    "いいえ",
    "<think>yes</think>",
    "<think>yes",
    "<answer></answer>",
    "<answer>a dog</answer> yes",
    "yess",
    "ye\u017f",
]
BOTH = ["Yes or no?", "yes/no", "Yes, there is no doubt.", "<answer>yes no</answer>", "No. Yes."]


@pytest.mark.parametrize("text", YES)
def test_yes(text):
    answer = read(text)
    assert (answer.label, answer.parsed, answer.no_objects, answer.text) == ("yes", True, False, text)


@pytest.mark.parametrize("text", NO)
def test_no(text):
    answer = read(text)
    assert (answer.label, answer.parsed, answer.no_objects) == ("no", True, True)


@pytest.mark.parametrize("text", NEITHER + BOTH)
def test_what_is_neither_or_both_is_no_decision(text):
    answer = read(text)
    assert (answer.label, answer.parsed, answer.no_objects) == (None, False, False)
    said = "both yes and no" if text in BOTH else "neither yes nor no"
    assert [problem for problem in answer.problems if problem.kind == "no_decision"] == [said]


def test_several_blocks_are_no_decision():
    for second in ("yes", "no"):
        answer = read(f"<answer>yes</answer><answer>{second}</answer>")
        assert (answer.label, answer.parsed) == (None, False)
        assert [problem.kind for problem in answer.problems] == ["repeated_answer_block"]


def test_tags_may_be_left_out_and_a_thought_is_kept():
    assert read("Yes.").problems == ()
    answer = read("<think>A tail.</think> <answer>yes</answer>")
    assert answer.thought == "A tail."
    assert answer.well_formed
    assert answer.problems == ()


WORDS = st.lists(st.sampled_from(["yes", "No", "dog", "is", "YES", "no,", "(yes)", "noon", "eyes", "未"]), max_size=6)


@settings(max_examples=60, deadline=None)
@given(WORDS)
def test_a_decision_needs_exactly_one_of_the_words(words):
    said = {"yes" for word in words if word in ("yes", "YES", "(yes)")} | {"no" for w in words if w in ("No", "no,")}
    expected = said.pop() if len(said) == 1 else None
    for text in (" ".join(words), f"<think>no yes</think><answer>{' '.join(words)}</answer>"):
        assert read(text).label == expected


# --- the task --------------------------------------------------------------------------------------------------------


def test_the_question_names_the_category_as_people_do():
    task = PresenceTask()
    assert task.question(PresenceTarget(True, "kitchen_table"), FRAME) == (
        "Does this image show at least one object of the category 'kitchen table'? Answer with one word: yes or no."
    )
    assert "'car (automobile)'" in task.question(DetectionTarget([], category="car_(automobile)"), FRAME)
    assert "'object'" in task.question(None, FRAME)
    assert PresenceTask(template="A {category}?").question(PresenceTarget(True, "dog"), FRAME) == "A dog?"


@pytest.mark.parametrize("present", [True, False])
def test_the_solution_is_read_as_itself_and_rewarded(present):
    task, target = PresenceTask(), PresenceTarget(present, "kitchen_table")
    solution = task.solution(target, FRAME)
    assert solution == f"<answer>{'yes' if present else 'no'}</answer>"
    answer = task.read(f"<think>{task.thought(target)}</think> {solution}", FRAME, SIZE)
    assert answer.well_formed
    assert answer.thought == "I look for kitchen table."
    assert task.score(answer, target).tolist() == [1.0]
    assert task.score(answer, PresenceTarget(not present)).tolist() == [0.0]


@pytest.mark.parametrize("rules", ["strict", "paper", "published_code"])
def test_silence_is_never_rewarded(rules):
    for text in NEITHER + BOTH:
        for present in (True, False):
            assert presence_reward(read(text), PresenceTarget(present), rules=rules) == 0
    assert presence_reward(read("yes"), ClassTarget("yes"), rules=rules) is None
    assert presence_reward(read("yes"), None, rules=rules) is None
    assert accuracy_reward(read("yes"), PresenceTarget(True), rules="strict") is None


def test_the_reward_refuses_rules_that_do_not_exist():
    with pytest.raises(ConfigConflictError, match="found 'lenient'"):
        presence_reward(read("yes"), PresenceTarget(True), rules="lenient")


@pytest.mark.parametrize(
    ("boxes", "crowds", "present"),
    [([[1, 2, 3, 4]], [], True), ([], [[1, 2, 3, 4]], True), ([[1, 2, 3, 4]], [[1, 2, 3, 4]], True), ([], [], False)],
)
def test_crowds_are_present(boxes, crowds, present):
    found = DetectionTarget(boxes, category="dog", category_id=18, ignore_boxes=crowds, image_size=SIZE)
    assert PresenceTask().target(found) == PresenceTarget(present, "dog", 18, SIZE)


def test_a_sample_is_encoded_and_drawn(tiny_policy):
    image = Image.new("RGB", SIZE, "gray")
    sample = Sample("a", image, PresenceTarget(True, "dog", 18, SIZE), PresenceTask(), SIZE)
    encoder = PromptEncoder(tiny_policy, max_prompt_length=None)
    encoded = encoder([sample]).samples[0]
    assert encoded.question.startswith("Does this image show")
    assert encoded.target.solution_text == "<answer>yes</answer>"
    assert draw_sample(sample, encoder).width > SIZE[0]


# --- metric and callback ---------------------------------------------------------------------------------------------


def scored(answers: list[str], present: list[bool], names: list[str] | None = None) -> dict:
    metric = PresenceScores()
    names = names or ["dog"] * len(present)
    targets = [PresenceTarget(p, name) for p, name in zip(present, names, strict=True)]
    metric.update([read(text) for text in answers], targets)
    return metric.compute()


def test_scores_by_hand():
    found = scored(["yes", "yes", "no", "perhaps", "perhaps", "no"], [True, False, False, False, True, True])
    assert float(found["presence_accuracy"]) == 3 / 6  # yes, no, and the first "perhaps", which is no
    assert float(found["presence_precision"]) == 1 / 2
    assert float(found["presence_recall"]) == 1 / 3
    assert float(found["presence_f1"]) == 2 / (2 + 3)


def test_nothing_to_divide_by_is_absent():
    empty = scored([], [])
    assert [float(empty[f"presence_{n}"]) for n in ("accuracy", "precision", "recall", "f1")] == [-1] * 4
    assert empty["classes"] == []
    found = scored(["no", "no"], [False, False])
    assert [float(found[f"presence_{n}"]) for n in ("accuracy", "precision", "recall", "f1")] == [1, -1, -1, -1]


CASES = st.lists(st.tuples(st.sampled_from(["yes", "no", "?"]), st.booleans(), st.sampled_from("abc")), max_size=30)


@settings(max_examples=60, deadline=None)
@given(CASES, st.randoms())
def test_scores_are_those_of_a_confusion_matrix_in_any_order(cases, random):
    table = {name: np.zeros((2, 2)) for name in "abc"}
    for text, present, name in cases:
        table[name][int(text == "yes"), int(present)] += 1
    (tn, fn), (fp, tp) = sum(table.values())
    ratio = lambda part, whole: part / whole if whole else -1.0  # noqa: E731
    expected = {
        "presence_accuracy": ratio(tp + tn, tp + tn + fp + fn),
        "presence_precision": ratio(tp, tp + fp),
        "presence_recall": ratio(tp, tp + fn),
        "presence_f1": ratio(tp, tp + (fp + fn) / 2),
    }
    shuffled = list(cases)
    random.shuffle(shuffled)
    found = scored(*map(list, zip(*shuffled, strict=True))) if shuffled else scored([], [])
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value), name
    assert found["classes"] == sorted({name for _, _, name in cases})
    for name, value in zip(found["classes"], found["f1_per_class"].reshape(-1).tolist(), strict=True):
        (_, fn), (fp, tp) = table[name]
        assert value == pytest.approx(ratio(tp, tp + (fp + fn) / 2))


def test_a_sample_counts_once():
    metric, targets = PresenceScores(), [PresenceTarget(True, "dog"), PresenceTarget(False, "dog")]
    for ids in (["a", "b"], ["b", "a"]):
        metric.update([read("yes"), read("yes")], targets if ids[0] == "a" else targets[::-1], ids)
    assert float(metric.compute()["presence_precision"]) == 0.5


def test_a_class_of_which_no_sample_counts_is_absent():
    metric = PresenceScores()
    metric.update([read("yes")] * 2, [PresenceTarget(True, "dog"), PresenceTarget(True, "cat")], ["a", "b"])
    metric.update([read("no")], [PresenceTarget(True, "bird")], ["a"])  # a sample that came before
    found = metric.compute()
    assert found["classes"] == ["bird", "cat", "dog"]
    assert found["f1_per_class"].tolist() == [-1, 1, 1]


def test_another_target_is_named():
    with pytest.raises(ValueError, match="Sample 'x': expected a PresenceTarget, found ClassTarget"):
        PresenceScores().update([read("yes")], [ClassTarget("dog")], ["x"])


class Replay(LightningModule):
    """Returns predictions made before."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def test_step(self, batch, batch_idx):
        return {"predictions": self.batches[batch_idx]}


def prediction(name, target, text):
    sample = Sample(name, Image.new("RGB", SIZE), target, PresenceTask(), SIZE, image_id=name)
    return Prediction(sample, text, read(text))


def test_the_callback_logs_over_all_pairs_and_stays_silent_otherwise(make_trainer):
    dogs = [prediction(f"d{i}", PresenceTarget(i < 2, "dog"), text) for i, text in enumerate(["yes", "no", "?"])]
    cats = [prediction("c", PresenceTarget(True, "cat"), "Yes.")]
    callback, others = PresenceAccuracy(), DetectionMAP()
    trainer = make_trainer(callbacks=[callback, others])
    (logged,) = trainer.test(Replay([dogs, cats]), DataLoader(range(2)), verbose=False)
    assert logged == {
        "test/presence_accuracy": 0.75,
        "test/presence_precision": 1.0,
        "test/presence_recall": pytest.approx(2 / 3),
        "test/presence_f1": pytest.approx(0.8),
        "test/parse_rate": 0.75,
    }
    assert callback.per_class == {"cat": 1.0, "dog": pytest.approx(2 / 3)}
    assert others.results == {}
    detection = Prediction(Sample("x", Image.new("RGB", SIZE), DetectionTarget([]), None, SIZE), "", read("yes"))
    (logged,) = make_trainer(callbacks=[PresenceAccuracy()]).test(
        Replay([[detection]]), DataLoader(range(1)), verbose=False
    )
    assert logged == {}
