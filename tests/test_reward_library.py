"""The rewards beyond the paper: closed forms, and pycocotools, TRL and brute force as oracles.

Pictures are 1000 x 1000, the unit is the pixel.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import re
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from rft_lightning import rewards
from rft_lightning.boxes import box_iou, match_hungarian
from rft_lightning.errors import ConfigConflictError
from rft_lightning.rewards import (
    ap50_reward,
    average_precision_reward,
    completeness_reward,
    cosine_length_reward,
    detection_confidence_reward,
    detection_iou_reward,
    giou_reward,
    grounding_iou_reward,
    grounding_iou_squared_reward,
    od_length_reward,
    overlong_reward,
    point_in_box_reward,
    precision_reward,
    recall_reward,
    repetition_reward,
)
from rft_lightning.rewards.curriculum import threshold_at
from rft_lightning.rewards.matching import Scene
from rft_lightning.sample import Answer, ClassTarget, DetectionTarget, GroundingTarget

DETECTION = [
    detection_iou_reward,
    detection_confidence_reward,
    completeness_reward,
    average_precision_reward,
    ap50_reward,
    od_length_reward,
    recall_reward,
    precision_reward,
]
GROUNDING = [grounding_iou_reward, giou_reward, grounding_iou_squared_reward, point_in_box_reward]
ANY = [repetition_reward, overlong_reward]
BEYOND = [
    *DETECTION[2:],
    *GROUNDING[2:],
    *ANY,
    cosine_length_reward,
]

TRUTH, OTHER = [100, 100, 200, 200], [500, 500, 700, 600]
HALF_OFF = [100, 100, 200, 180]  # IoU 0.8 with TRUTH
FAR = [800, 0, 900, 90]


def said(*boxes: list[float], confidence: list[float] | float = 1.0, **more) -> Answer:
    confidences = confidence if isinstance(confidence, list) else [confidence] * len(boxes)
    return Answer(text="x", boxes=list(boxes), confidences=confidences, **more)


def truth(*boxes: list[float]) -> DetectionTarget:
    return DetectionTarget(list(boxes))


def referred(*box: float) -> GroundingTarget:
    return GroundingTarget(list(box))


@st.composite
def scenes(draw: st.DrawFn, most: int = 5) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """True boxes on a coarse grid, distinct predictions near them, different confidences."""
    place, side = st.integers(0, 8), st.integers(2, 8)
    truths = [
        [10 * x, 10 * y, 10 * (x + w), 10 * (y + h)]
        for x, y, w, h in draw(st.lists(st.tuples(place, place, side, side), min_size=1, max_size=most, unique=True))
    ]
    shift = st.tuples(*[st.integers(-6, 6)] * 4)
    moves = draw(st.lists(st.tuples(st.sampled_from(truths), shift), min_size=1, max_size=most, unique_by=repr))
    found = [[a + b for a, b in zip(box, by, strict=True)] for box, by in moves]
    found = [box for number, box in enumerate(found) if box not in found[:number]]
    order = draw(st.permutations(range(len(found))))
    return truths, found, [0.1 + 0.1 * rank for rank in order]


# ---------------------------------------------------------------- average precision


def pycocotools_ap(truths: list[list[float]], found: list[list[float]], confidences: list[float]) -> np.ndarray:
    """[T, R] precision of one picture with one category."""

    def xywh(box: list[float]) -> list[float]:
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    def notes(boxes: list[list[float]]) -> list[dict]:
        rows = [{"image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": xywh(box)} for box in boxes]
        return [row | {"id": i, "area": row["bbox"][2] * row["bbox"][3]} for i, row in enumerate(rows, start=1)]

    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = COCO(), COCO()
        for coco, rows in ((gt, notes(truths)), (dt, notes(found))):
            coco.dataset = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": rows}
        for row, confidence in zip(dt.dataset["annotations"], confidences, strict=True):
            row["score"] = confidence
        gt.createIndex()
        dt.createIndex()
        evaluation = COCOeval(gt, dt, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0, 0, 2]


@settings(deadline=None, max_examples=150)
@given(scenes(most=9))
def test_average_precision_is_that_of_pycocotools(scene):
    truths, found, confidences = scene
    precision = pycocotools_ap(truths, found, confidences)
    answer, target = said(*found, confidence=confidences), truth(*truths)
    assert average_precision_reward(answer, target) == pytest.approx(precision.mean(), abs=1e-12)
    assert ap50_reward(answer, target) == pytest.approx(precision[0].mean(), abs=1e-12)
    surplus = min(1, len(truths) / len(found))
    assert od_length_reward(answer, target) == pytest.approx(precision.mean() * surplus, abs=1e-12)


def test_average_precision_counts_a_pair_from_the_threshold_on():
    target = truth([0, 0, 10, 10])
    assert ap50_reward(said([0, 0, 10, 5]), target) == 1
    assert average_precision_reward(said([0, 0, 10, 5]), target) == pytest.approx(0.1)
    assert average_precision_reward(said([0, 0, 10, 8]), target) == pytest.approx(0.7)


def test_a_box_between_two_objects_takes_the_later_one_as_in_pycocotools():
    left, right, between = [0, 0, 10, 10], [4, 0, 14, 10], [2, 0, 12, 10]
    for truths, expected in (([left, right], 1), ([right, left], 51 / 101)):
        value = ap50_reward(said(between, left, confidence=[0.9, 0.8]), truth(*truths))
        assert value == pytest.approx(expected)
        assert value == pytest.approx(pycocotools_ap(truths, [between, left], [0.9, 0.8])[0].mean())


def test_equal_confidences_rank_false_positives_first():
    target = truth(TRUTH)
    for boxes in ([TRUTH, FAR], [FAR, TRUTH]):
        assert average_precision_reward(said(*boxes), target) == 0.5
        assert average_precision_reward(said(*boxes, confidence=0.3), target) == 0.5
    assert average_precision_reward(said(TRUTH, FAR, confidence=[0.9, 0.8]), target) == 1
    assert average_precision_reward(said(TRUTH, FAR, confidence=[0.8, 0.9]), target) == 0.5


def test_od_length_charges_boxes_that_average_precision_gives_away():
    target, answer = truth(TRUTH, OTHER), said(TRUTH, OTHER, FAR, [0, 0, 9, 9], confidence=[1, 1, 0.1, 0.1])
    assert average_precision_reward(answer, target) == 1
    assert od_length_reward(answer, target) == 0.5
    # Too few boxes cost once, not twice.
    one = said(TRUTH)
    assert od_length_reward(one, target) == average_precision_reward(one, target) == pytest.approx(51 / 101)


# ---------------------------------------------------------------- matching


@settings(deadline=None, max_examples=60)
@given(scenes(most=4), st.sampled_from([0.0, 0.5, 0.6]))
def test_hungarian_rewards_by_brute_force(scene, threshold: float):
    truths, found, confidences = scene
    iou = box_iou(found, truths).tolist()
    columns = [*range(len(truths)), *[-1] * len(found)]
    choices = []
    for choice in set(permutations(columns, len(found))):
        pairs = [(row, column) for row, column in enumerate(choice) if column >= 0 and iou[row][column] > threshold]
        matched = {row for row, _ in pairs}
        balance = sum(c if row in matched else -c for row, c in enumerate(confidences))
        credit = sum(1 if iou[row][column] >= 0.8 else iou[row][column] for row, column in pairs)
        choices.append((sum(iou[row][column] for row, column in pairs), balance, len(pairs), credit))
    answer, target = said(*found, confidence=confidences), truth(*truths)
    most, n_pred, n_gt = max(len(found), len(truths)), len(found), len(truths)
    settings_ = {"matching": "hungarian", "threshold": threshold}
    total = max(total for total, *_ in choices)
    assert detection_iou_reward(answer, target, **settings_) == pytest.approx(total / most)
    # Assignments of the same total: the one with the most confidence.
    balances = [balance for value, balance, *_ in choices if value > total - 1e-9]
    expected = max(0, max(balances) / most)
    assert detection_confidence_reward(answer, target, **settings_) == pytest.approx(expected)
    count = max(count for _, _, count, _ in choices)
    assert recall_reward(answer, target, threshold=threshold) == pytest.approx(count / n_gt)
    assert precision_reward(answer, target, threshold=threshold) == pytest.approx(count / n_pred)
    shares = 1 - 0.7 * (1 - count / n_gt) - 0.3 * (1 - count / n_pred)
    value = completeness_reward(answer, target, threshold=threshold, miss_weight=0.7)
    assert value == pytest.approx(shares)
    credit = max(credit for *_, credit in choices)
    value = precision_reward(answer, target, threshold=threshold, full_threshold=0.8)
    assert value == pytest.approx(credit / n_pred)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_of_equal_assignments_the_most_confident_is_taken(n_pred: int, n_gt: int, data: st.DataObject):
    def numbers(values: list[float], count: int) -> np.ndarray:
        return np.array(data.draw(st.lists(st.sampled_from(values), min_size=count, max_size=count)))

    confidences = -np.sort(-numbers([0.1, 0.2, 0.4, 0.8], n_pred))
    iou = numbers([0.0, 0.5, 0.75, 1.0], n_pred * n_gt).reshape(n_pred, n_gt)
    found = []
    for choice in permutations([*range(n_gt), *[-1] * n_pred], n_pred):
        pairs = [(row, column) for row, column in enumerate(choice) if column >= 0 and iou[row, column] > 0.5]
        found.append((sum(iou[pair] for pair in pairs), sum(confidences[row] for row, _ in pairs)))
    ious, matched = Scene(confidences, iou).match("hungarian", 0.5)
    assert (ious.sum(), confidences[matched].sum()) == pytest.approx(max(found))


def test_a_tie_between_assignments_is_not_left_to_the_solver():
    iou = np.array([[0.8, 0.75, 0.75], [0.75, 0.75, 1.0], [0.75, 0.8, 0.75], [1.0, 1.0, 1.0]])
    confidences = np.array([0.8, 0.8, 0.4, 0.4])
    # 0.8 + 1.0 + 1.0 both with the third and without: the first, second and fourth are more confident.
    assert match_hungarian(iou)[0] == -1
    _, matched = Scene(confidences, iou).match("hungarian", 0.5)
    assert matched.tolist() == [True, True, False, True]


@pytest.mark.parametrize("boxes", [[[100, 100, 200, 160], HALF_OFF], [HALF_OFF, [100, 100, 200, 160]]])
def test_of_equally_confident_boxes_the_better_one_is_matched(boxes: list[list[float]]):
    assert detection_iou_reward(said(*boxes), truth(TRUTH)) == pytest.approx(0.8 / 2)


@pytest.mark.parametrize("rules", ["strict", "paper"])
def test_matching_and_threshold_are_options_of_both_rule_sets(rules: str):
    worse, better = [100, 100, 200, 160], [100, 100, 200, 190]
    answer, target = said(worse, better, confidence=[0.9, 0.8]), truth(TRUTH)
    call = partial(detection_iou_reward, answer, target, rules=rules)
    assert call() == pytest.approx(0.6 / 2)
    assert call(matching="hungarian") == pytest.approx(0.9 / 2)
    assert call(threshold=0.7) == pytest.approx(0.9 / 2)
    assert call(threshold=0.95) == 0
    confident = partial(detection_confidence_reward, answer, target, rules=rules)
    first, second = {"strict": (0.1 / 2, 0), "paper": (1.1 / 2, 0.9 / 2)}[rules]
    assert confident() == pytest.approx(first)
    assert confident(matching="hungarian") == pytest.approx(second)


def test_denominators():
    answer, target = said(TRUTH), truth(TRUTH, OTHER)
    assert detection_iou_reward(answer, target, denominator="predictions") == 1
    assert detection_iou_reward(answer, target, rules="paper", denominator="max") == 0.5
    assert detection_iou_reward(answer, target) == detection_iou_reward(answer, target, denominator="max") == 0.5
    assert detection_iou_reward(answer, target, rules="paper") == 1


# ---------------------------------------------------------------- counting


def test_completeness_by_hand():
    target = truth(TRUTH, OTHER)
    # One of two objects missed, two of three boxes false.
    answer = said(HALF_OFF, FAR, [0, 0, 9, 9])
    assert completeness_reward(answer, target) == pytest.approx(1 - (1 / 2 + 2 / 3) / 2)
    assert completeness_reward(answer, target, miss_weight=1) == pytest.approx(1 / 2)
    assert completeness_reward(answer, target, miss_weight=0) == pytest.approx(1 / 3)
    assert completeness_reward(answer, target, threshold=0.9) == 0
    assert completeness_reward(said(TRUTH, OTHER), target) == 1


def test_completeness_pays_nothing_for_saying_nothing():
    for answer in (Answer(), Answer(text="No Objects", no_objects=True)):
        assert completeness_reward(answer, truth(TRUTH), miss_weight=0.5) == 0


def test_recall_and_precision_by_hand():
    target, answer = truth(TRUTH, OTHER), said(HALF_OFF, FAR, [0, 0, 9, 9])
    assert recall_reward(answer, target) == 1 / 2
    assert precision_reward(answer, target) == 1 / 3
    assert precision_reward(answer, target, full_threshold=0.8) == 1 / 3
    assert precision_reward(answer, target, full_threshold=0.9) == pytest.approx(0.8 / 3)
    assert precision_reward(answer, target, full_threshold=1) == pytest.approx(0.8 / 3)
    assert precision_reward(answer, target, threshold=0.8, full_threshold=0.9) == 0


def test_full_threshold_is_not_below_threshold():
    with pytest.raises(ConfigConflictError, match=r"at least threshold, found 0\.5 and 0\.75"):
        precision_reward(said(), truth(), threshold={0: 0.5, 10: 0.75}, full_threshold=0.5, step=20)


# ---------------------------------------------------------------- nothing there


@pytest.mark.parametrize("reward", DETECTION)
def test_no_objects_is_one_rule_for_all(reward: Callable):
    nothing = Answer(text="No Objects", no_objects=True)
    assert reward(nothing, truth()) == 1
    assert reward(nothing, truth(), true_negative=0.25) == 0.25
    assert reward(nothing, truth(TRUTH)) == 0
    assert reward(Answer(text="I cannot say", no_objects=False), truth()) == 0
    assert reward(said(FAR, confidence=0.0), truth()) == 0
    assert reward(said(TRUTH, no_objects=True), truth()) == 0
    with pytest.raises(ConfigConflictError, match="true_negative"):
        reward(nothing, truth(), true_negative=2)


def test_the_paper_has_no_rule_for_nothing_but_can_be_given_one():
    nothing = Answer(text="No Objects", no_objects=True)
    for reward in (detection_iou_reward, detection_confidence_reward):
        assert reward(nothing, truth(), rules="paper") == 0
        assert reward(nothing, truth(), rules="paper", true_negative=1) == 1


# ---------------------------------------------------------------- thresholds by step


def test_a_curriculum_holds_from_its_steps_on():
    by_step = {0: 0.85, "100": 0.95, 250: 0.99}
    expected = {0: 0.85, 99: 0.85, 100: 0.95, 249: 0.95, 250: 0.99, 10_000: 0.99, None: 0.99}
    assert {step: threshold_at(by_step, step) for step in expected} == expected
    assert threshold_at({250: 0.99, 0: 0.85}, 3) == 0.85
    assert threshold_at(0.5, None) == threshold_at(0.5, 7) == 0.5


@pytest.mark.parametrize(
    "wrong",
    [1, 1.0, -0.1, True, "0.5", None, math.nan, {}, {1: 0.5}, {0: 1.5}, {0: "0.5"}, {"0": 0.5, 0: 0.6}]
    + [{0: 0.5, key: 0.6} for key in (-1, 0.1, True, "ten", "0.1", "-3", None)],
)
@pytest.mark.parametrize(
    "reward",
    [detection_iou_reward, detection_confidence_reward, completeness_reward, recall_reward, precision_reward],
)
def test_thresholds_that_are_none_are_refused(reward: Callable, wrong: object):
    with pytest.raises(ConfigConflictError, match="threshold"):
        reward(Answer(), None, threshold=wrong)


@pytest.mark.parametrize(
    "reward",
    [
        detection_iou_reward,
        partial(detection_iou_reward, rules="paper", matching="hungarian"),
        detection_confidence_reward,
        completeness_reward,
        recall_reward,
        precision_reward,
        partial(precision_reward, full_threshold={0: 0.6, 10: 0.9}),
        partial(cosine_length_reward, max_completion_length=10),
    ],
)
def test_every_threshold_may_change_with_the_step(reward: Callable):
    answer, target = said(HALF_OFF, num_tokens=1), truth(TRUTH)
    early, late, outside = (reward(answer, target, threshold={0: 0.5, 10: 0.85}, step=step) for step in (9, 10, None))
    assert early > late == outside


# ---------------------------------------------------------------- grounding


@pytest.mark.parametrize(
    ("box", "iou"),
    [(TRUTH, 1), (HALF_OFF, 0.8), ([100, 100, 200, 150], 0.5), (FAR, 0), ([200, 200, 100, 100], 0), (None, 0)],
)
def test_iou_squared(box: list[float] | None, iou: float):
    answer = said(box) if box else Answer(text="nothing")
    assert grounding_iou_reward(answer, referred(*TRUTH)) == pytest.approx(iou)
    assert grounding_iou_squared_reward(answer, referred(*TRUTH)) == pytest.approx(iou**2)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(points=[[150, 150]]), 1),
        (Answer(points=[[100, 200]]), 1),
        (Answer(points=[[99, 150]]), 0),
        (Answer(points=[[150, 201]]), 0),
        (Answer(points=[[99, 150], [150, 150]]), 0),
        (Answer(points=[[math.nan, 150]]), 0),
        (Answer(points=[[99, 150]], boxes=TRUTH), 0),
        (said([0, 0, 250, 250]), 1),
        (said(FAR, TRUTH), 0),
        (said([200, 200, 100, 100]), 0),
        (said([150, 150, 150, 150]), 0),
        (Answer(text="in the middle"), 0),
    ],
)
def test_point_in_box(answer: Answer, expected: float):
    assert point_in_box_reward(answer, referred(*TRUTH)) == expected


# ---------------------------------------------------------------- any target: repetition and length


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "B", "7", "0.9", "été"]), max_size=30), st.integers(1, 5), st.floats(-3, 0))
def test_repetition_is_that_of_trl_over_words(words: list[str], ngram_size: int, max_penalty: float):
    ids = [["a", "B", "7", "0.9", "été"].index(word) for word in words]
    (expected,) = get_repetition_penalty_reward(ngram_size, max_penalty)([ids])
    value = repetition_reward(Answer(text=" ".join(words)), None, ngram_size=ngram_size, max_penalty=max_penalty)
    assert value == pytest.approx(expected)
    assert max_penalty <= value <= 0


def test_words_are_without_case_and_punctuation():
    assert repetition_reward(Answer(text="A cat, a CAT! (a cat)"), None, ngram_size=2) == pytest.approx(-3 / 5)
    assert repetition_reward(Answer(text="1 0.9 1.0 9"), None, ngram_size=1) == 0
    assert repetition_reward(Answer(), None) == 0


def test_loops_without_blanks_are_repetition():
    for text in ("a" * 900, "9" * 900, "\u597d" * 500, "Und" + "so" * 400):
        assert repetition_reward(Answer(text=text), None) < -0.5
    assert repetition_reward(Answer(text="\u597d\u82b1\u6709\u4e94\u679a"), None) == 0


def test_entries_of_boxes_share_words_but_not_long_ngrams():
    boxes = [[100 * i, 7 * i + 1, 100 * i + 50, 9 * i + 60] for i in range(10)]
    text = str([{"Position": box, "Confidence": 0.9} for box in boxes])
    assert -1 / 7 < repetition_reward(Answer(text=text), None) < -0.1
    assert repetition_reward(Answer(text=text), None, ngram_size=6) == 0
    again = str([{"Position": boxes[0], "Confidence": 0.9}] * 10)
    assert repetition_reward(Answer(text=again), None, ngram_size=6) < -0.85


@settings(deadline=None)
@given(st.integers(0, 130), st.integers(1, 100))
def test_overlong_is_that_of_trl(length: int, cache: int):
    (expected,) = get_soft_overlong_punishment(100, cache)([[1] * length])
    answer = Answer(num_tokens=length, token_limit=100)
    assert overlong_reward(answer, None, soft_punish_cache=cache) == pytest.approx(expected)
    longer = Answer(num_tokens=length, token_limit=7)
    value = overlong_reward(longer, referred(*TRUTH), soft_punish_cache=cache, max_completion_length=100)
    assert value == pytest.approx(expected)


def test_overlong_falls_over_a_fifth_of_the_limit():
    values = [overlong_reward(Answer(num_tokens=n, token_limit=100), None) for n in (80, 85, 100)]
    assert values == pytest.approx([0, -0.25, -1])
    assert overlong_reward(Answer(num_tokens=2, token_limit=2), None) == -1


@pytest.mark.parametrize("reward", [overlong_reward, cosine_length_reward])
def test_unknown_lengths_are_not_judged(reward: Callable):
    target = ClassTarget("rose")
    assert reward(Answer(label="rose"), target) is None
    assert reward(Answer(label="rose", num_tokens=5), target) is None
    assert reward(Answer(label="rose", token_limit=5), target) is None
    assert reward(Answer(label="rose", num_tokens=5), target, max_completion_length=10) is not None


@pytest.mark.parametrize(
    ("right", "wrong", "target"),
    [
        ({"label": "rose"}, {"label": "tulip"}, ClassTarget("rose")),
        ({"boxes": HALF_OFF}, {"boxes": [100, 100, 200, 150]}, DetectionTarget(TRUTH)),
        ({"boxes": TRUTH}, {}, DetectionTarget([TRUTH, OTHER])),
        ({"boxes": HALF_OFF}, {"boxes": FAR}, GroundingTarget(TRUTH)),
        ({"no_objects": True}, {"boxes": FAR}, DetectionTarget([])),
    ],
)
def test_cosine_by_hand(right: dict, wrong: dict, target):
    lengths = (0, 25, 50, 100, 150)
    share = [0, (1 - math.sqrt(0.5)) / 2, 0.5, 1, 1]
    values = [cosine_length_reward(Answer(num_tokens=n, token_limit=100, **right), target) for n in lengths]
    assert values == pytest.approx([1 - 0.5 * s for s in share])
    values = [cosine_length_reward(Answer(num_tokens=n, token_limit=100, **wrong), target) for n in lengths]
    assert values == pytest.approx([-1 + 0.5 * s for s in share])
    bounds = {"min_value_wrong": -10, "max_value_wrong": 0, "min_value_correct": 1, "max_value_correct": 2}
    values = [
        cosine_length_reward(Answer(num_tokens=50, **answer), target, max_completion_length=100, **bounds)
        for answer in (right, wrong)
    ]
    assert values == pytest.approx([1.5, -5])


def test_cosine_takes_the_threshold_of_correctness_and_never_nothing_for_right():
    answer, target = said(HALF_OFF, num_tokens=0, token_limit=9), truth(TRUTH)
    assert cosine_length_reward(answer, target, threshold=0.8) == 1
    assert cosine_length_reward(answer, target, threshold=0.81) == -1
    assert cosine_length_reward(said(FAR, num_tokens=0, token_limit=9), target, threshold=0) == -1
    assert cosine_length_reward(said(TRUTH, num_tokens=0, token_limit=9), target, threshold=1) == 1
    assert cosine_length_reward(answer, None) is None


# ---------------------------------------------------------------- the contract of all of them


def test_every_reward_is_exported_and_known_here():
    known = {reward.__name__ for reward in (*DETECTION, *GROUNDING, *BEYOND)}
    assert known <= set(rewards.__all__)
    assert {"accuracy_reward", "format_reward"} <= set(rewards.__all__) - known


@pytest.mark.parametrize("name", [name for name in rewards.__all__ if name.endswith("_reward")])
def test_the_page_of_rewards_has_each_with_its_options(name: str):
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert f"| [{name}](#{name}) |" in page
    section = page.partition(f"\n### {name}\n")[2].partition("\n##")[0]
    options = list(inspect.signature(getattr(rewards, name)).parameters)[4:]
    for option in options:
        assert f"`{option}`" in section or "as `average_precision_reward`" in section, option
    if not options:
        assert "| options | none |" in section


@pytest.mark.parametrize("reward", BEYOND)
@pytest.mark.parametrize("target", [truth(TRUTH), referred(*TRUTH), ClassTarget("rose"), None])
def test_rewards_from_elsewhere_are_the_same_under_all_rules(reward: Callable, target):
    answer = said(HALF_OFF, FAR, confidence=[0.4, 0.9], num_tokens=90, token_limit=100, label="rose")
    values = {reward(answer, target, rules=rules) for rules in ("strict", "paper", "published_code")}
    assert len(values) == 1
    kind = DetectionTarget if reward in DETECTION else GroundingTarget if reward in GROUNDING else object
    applies = isinstance(target, kind) and not (reward is cosine_length_reward and target is None)
    assert (values != {None}) == applies
    with pytest.raises(ConfigConflictError, match=re.escape("strict, paper, published_code, found 'lenient'")):
        reward(answer, target, rules="lenient")


@pytest.mark.parametrize("reward", GROUNDING)
def test_grounding_without_a_true_box_is_not_judged(reward: Callable):
    assert reward(said(TRUTH), GroundingTarget(torch.zeros(0, 4))) is None


@pytest.mark.parametrize(
    ("reward", "option", "wrong"),
    [
        (detection_iou_reward, "matching", "optimal"),
        (detection_confidence_reward, "matching", None),
        (detection_iou_reward, "denominator", "objects"),
        (completeness_reward, "miss_weight", 1.5),
        (completeness_reward, "miss_weight", "half"),
        (precision_reward, "full_threshold", 1.5),
        (repetition_reward, "ngram_size", 0),
        (repetition_reward, "ngram_size", 2.5),
        (repetition_reward, "ngram_size", True),
        (repetition_reward, "max_penalty", 0.5),
        (repetition_reward, "max_penalty", -math.inf),
        (repetition_reward, "max_penalty", math.nan),
        (overlong_reward, "soft_punish_cache", 0),
        (overlong_reward, "soft_punish_cache", 101),
        (overlong_reward, "max_completion_length", 0),
        (cosine_length_reward, "max_completion_length", 1.5),
        (cosine_length_reward, "max_value_wrong", 0.75),
        (cosine_length_reward, "min_value_correct", 2),
        (cosine_length_reward, "max_value_correct", math.inf),
        (cosine_length_reward, "min_value_wrong", "low"),
        (cosine_length_reward, "threshold", 1.1),
    ],
)
def test_options_out_of_range_are_refused_by_name(reward: Callable, option: str, wrong: object):
    with pytest.raises(ConfigConflictError, match=option):
        reward(Answer(num_tokens=5, token_limit=100), None, **{option: wrong})


@pytest.mark.parametrize(
    ("reward", "options"),
    [
        (detection_iou_reward, {"matching": "hungarian"}),
        (detection_iou_reward, {"threshold": 0.6}),
        (detection_iou_reward, {"threshold": {0: 0.5}}),
        (detection_iou_reward, {"denominator": "predictions"}),
        (detection_iou_reward, {"true_negative": 1.0}),
        (detection_confidence_reward, {"matching": "hungarian"}),
        (detection_confidence_reward, {"threshold": 0.6}),
    ],
)
def test_the_published_code_has_no_options(reward: Callable, options: dict):
    with pytest.raises(ConfigConflictError, match=f"takes no options.*{next(iter(options))}"):
        reward(Answer(), None, rules="published_code", **options)
    assert reward(Answer(), None, rules="published_code") is None
