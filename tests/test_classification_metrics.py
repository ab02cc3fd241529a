"""ClassificationAccuracy: the published evaluation restated with its own pattern, and the strict rules by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft_lightning.metrics import ClassificationAccuracy, ParseRate
from rft_lightning.sample import Answer, ClassTarget, DetectionTarget
from rft_lightning.tasks import ClassificationTask


def read(text: str) -> Answer:
    return ClassificationTask().read(text, None, (8, 8))


def published_hit(text: str, right: str) -> bool:
    """The published evaluation of one answer."""
    match = re.search(r"<answer>(.*?)</answer>", text)
    if match is None:
        return False
    said, right = (name.replace(" ", "").replace("_", "").lower() for name in (match.group(1), right))
    return said in right or right in said


CASES = [  # text, right, strict, lenient, parse failure
    ("<think>red</think><answer>Rose</answer>", "rose", 1, 1, 0),
    ("<answer>rose</answer>", "primrose", 0, 1, 0),
    ("<answer>fire lily</answer>", "fire_lily", 1, 1, 0),
    ("<answer>a rose or a tulip</answer>", "tulip", 0, 1, 0),
    ("<answer>tulip</answer>", "rose", 0, 0, 0),
    ("<answer></answer>", "rose", 0, 1, 1),
    ("<answer> _ </answer>", "rose", 0, 1, 0),
    ("<answer>\nrose\n</answer>", "rose", 1, 0, 0),
    ("<answer>rose", "rose", 0, 0, 1),
    ("<answer>rose</answer><answer>tulip</answer>", "rose", 0, 1, 1),
    ("<answer>\n</answer><answer>rose</answer>", "rose", 0, 1, 1),
    ("rose", "rose", 0, 0, 1),
    ("", "rose", 0, 0, 1),
]


@pytest.mark.parametrize(("text", "right", "strict", "lenient", "failed"), CASES)
def test_one_answer(text: str, right: str, strict: int, lenient: int, failed: int) -> None:
    metric = ClassificationAccuracy()
    metric.update([read(text)], [ClassTarget(right)])
    result = metric.compute()
    assert [float(result[name]) for name in ("accuracy", "accuracy_lenient", "parse_failures")] == [
        strict,
        lenient,
        failed,
    ]
    assert published_hit(text, right) == lenient


pieces = st.sampled_from(
    ["<answer>", "</answer>", "<think>", "\n", "\r", " ", "_", "rose", "Primrose", "tulip", "lily"]
)
texts = st.lists(pieces, max_size=9).map("".join)


@settings(max_examples=150, deadline=None)
@given(samples=st.lists(st.tuples(texts, st.sampled_from(["rose", "prim rose", "fire_lily"])), min_size=1, max_size=6))
def test_lenient_is_the_published_evaluation(samples: list[tuple[str, str]]) -> None:
    answers, targets = [read(text) for text, _ in samples], [ClassTarget(right) for _, right in samples]
    metric, rate = ClassificationAccuracy(), ParseRate()
    metric.update(answers, targets)
    rate.update(answers)
    result = metric.compute()
    hits = [published_hit(text, right) for text, right in samples]
    assert float(result["accuracy_lenient"]) == sum(hits) / len(samples)
    parsed = round(float(rate.compute()["parse_rate"]) * len(samples))
    assert float(result["parse_failures"]) == len(samples) - parsed
    assert float(result["accuracy"]) <= parsed / len(samples)


RECORDS = [  # label, text that was not read, lenient hit of "pug dog"
    ("pug", "I think it is pug", 1),
    ("pug", "", 1),
    ("pug", "<answer>cat</answer>", 1),
    ("cat", "<answer>pug</answer>", 0),
    ("pug", "<answer>cat</answer> or <answer>pug</answer>", 1),
    ("cat", "pug", 0),
    (None, "<answer>pug</answer>", 0),
    (None, "pug", 0),
]


@pytest.mark.parametrize(("label", "text", "lenient"), RECORDS)
def test_the_text_of_another_system_is_not_read(label: str | None, text: str, lenient: int) -> None:
    metric = ClassificationAccuracy()
    metric.update([Answer(label=label, text=text)], [ClassTarget("pug dog")])
    assert float(metric.compute()["accuracy_lenient"]) == lenient


def test_counts_are_over_all_samples_and_per_class() -> None:
    metric = ClassificationAccuracy()
    for number, (text, right, *_) in enumerate(CASES):
        metric.update([read(text)], [ClassTarget(right)], [f"sample {number}"])
    metric.update([read("<answer>rose</answer>")], [ClassTarget("rose")], ["sample 4"])  # repeated: the first counts
    result = metric.compute()
    strict, lenient, failed = (sum(case[k] for case in CASES) for k in (2, 3, 4))
    assert float(result["accuracy"]) == strict / len(CASES)
    assert float(result["accuracy_lenient"]) == lenient / len(CASES)
    assert float(result["parse_failures"]) == failed
    for name, value in zip(result["classes"], result["accuracy_per_class"].tolist(), strict=True):
        own = [case[2] for case in CASES if case[1] == name]
        assert value == pytest.approx(sum(own) / len(own))
    assert result["classes"] == ["fire_lily", "primrose", "rose", "tulip"]


def test_errors_name_the_sample_and_leave_no_trace() -> None:
    metric = ClassificationAccuracy()
    answer, target = Answer(label="rose"), ClassTarget("rose")
    with pytest.raises(ValueError, match="'late': expected a ClassTarget, found DetectionTarget"):
        metric.update([answer, answer], [target, DetectionTarget([])], ["early", "late"])
    with pytest.raises(ValueError, match="one target per answer"):
        metric.update([answer], [])
    metric.update([], [])
    result = metric.compute()
    assert [float(result[name]) for name in ("accuracy", "accuracy_lenient", "parse_failures")] == [-1, -1, 0]
    assert result["classes"] == []


PUBLISHED = [  # CLIP's predictions in the published repository: strict and lenient accuracy in percent
    ("fgvc_aircraft", "fgvc_aircraft_variants100", 24.69, 24.69),
    ("oxford_flowers", "flowers102", 70.48, 71.70),
    ("pets", "oxford_pets37", 89.07, 89.07),
    ("stanford_cars", "stanford_cars196", 65.51, 65.51),
]


@pytest.mark.sample_data
@pytest.mark.parametrize(("predictions", "classes", "strict", "lenient"), PUBLISHED)
def test_published_predictions(
    sample_data: Path, predictions: str, classes: str, strict: float, lenient: float
) -> None:
    names = (sample_data / f"class_names/visual_rft/{classes}.txt").read_text().splitlines()
    lines = (sample_data / f"clip_top1/{predictions}.csv").read_text().splitlines()[1:]
    pairs = [tuple(names[int(index)] for index in line.split(",")) for line in lines]
    metric = ClassificationAccuracy()
    metric.update([read(f"<answer>{said}</answer>") for _, said in pairs], [ClassTarget(right) for right, _ in pairs])
    result = metric.compute()
    assert 100 * float(result["accuracy"]) == pytest.approx(strict, abs=0.005)
    assert 100 * float(result["accuracy_lenient"]) == pytest.approx(lenient, abs=0.005)
