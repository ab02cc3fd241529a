"""What must hold for the strict rewards of boxes, whatever the answer; and where it does not hold, an example each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rft_lightning.boxes import box_giou, box_iou, match_hungarian
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
    matching,
    od_length_reward,
    point_in_box_reward,
    precision_reward,
    recall_reward,
)
from rft_lightning.rewards.matching import MAX_PREDICTIONS, best_total, prepare_scenes
from rft_lightning.sample import Answer, DetectionTarget, GroundingTarget

Box = list[float]

# (reward, the lowest IoU from which a pair may count); every reward of detection, with its options.
THRESHOLDS = [0.0, 0.3, 0.5, 0.75]
DETECTION: list[tuple[Callable, float]] = [
    *((reward, 0.5) for reward in (average_precision_reward, ap50_reward, od_length_reward)),
    *((partial(cosine_length_reward, threshold=t, max_completion_length=10), 0.5) for t in (0.3, 0.9)),
]
for _threshold in THRESHOLDS:
    for _matching in ("greedy", "hungarian"):
        _settings: dict[str, Any] = {"matching": _matching, "threshold": _threshold}
        DETECTION += [
            (partial(detection_iou_reward, **_settings), _threshold),
            (partial(detection_iou_reward, denominator="predictions", **_settings), _threshold),
            (partial(detection_confidence_reward, **_settings), _threshold),
        ]
    _settings = {"threshold": _threshold}
    DETECTION += [
        (partial(recall_reward, **_settings), _threshold),
        (partial(precision_reward, **_settings), _threshold),
        (partial(precision_reward, full_threshold=0.9, **_settings), _threshold),
        (partial(precision_reward, full_threshold=1, **_settings), _threshold),
        *((partial(completeness_reward, miss_weight=weight, **_settings), _threshold) for weight in (0, 0.3, 1)),
    ]
GROUNDING = [grounding_iou_reward, giou_reward, grounding_iou_squared_reward, point_in_box_reward]

# Few places and few confidences, so that overlaps, ties and IoUs at a threshold are frequent.
CONFIDENCE = st.sampled_from([0.0, 0.3, 0.9, 1.0])


@st.composite
def true_boxes(draw: st.DrawFn) -> Box:
    x, y, w, h = (10 * draw(st.integers(low, 5)) for low in (0, 0, 1, 1))
    return [x, y, x + w, y + h]


@st.composite
def written_boxes(draw: st.DrawFn, truths: list[Box]) -> Box:
    """Near a true box, or anywhere, in any order of corners."""
    if draw(st.booleans()):
        return [c + draw(st.integers(-3, 3)) for c in draw(st.sampled_from(truths))]
    return draw(st.lists(st.integers(-1, 11).map(lambda n: 10 * n), min_size=4, max_size=4))


@st.composite
def questions(draw: st.DrawFn, most_truths: int = 4) -> tuple[list[Box], list[tuple[Box, float]]]:
    """True boxes, and predictions with confidences."""
    truths = draw(st.lists(true_boxes(), min_size=1, max_size=most_truths))
    return truths, draw(st.lists(st.tuples(written_boxes(truths), CONFIDENCE), max_size=6))


def said(rows: list[tuple[Box, float]]) -> Answer:
    boxes, confidences = [box for box, _ in rows], [confidence for _, confidence in rows]
    return Answer(text="x", boxes=boxes, confidences=confidences, num_tokens=5)


def inserted(rows: list, place: int, row: Any) -> list:
    place = min(place, len(rows))
    return [*rows[:place], row, *rows[place:]]


def same(value: float) -> Any:
    return pytest.approx(value, abs=1e-9)


# ---------------------------------------------------------------- closer is never worse


@settings(deadline=None)
@given(true_boxes(), st.data())
def test_a_closer_box_on_one_object_never_scores_less(truth: Box, data: st.DataObject):
    pair = [data.draw(written_boxes([truth])) for _ in range(2)]
    far, near = sorted(pair, key=lambda box: float(box_iou(box, truth)))
    confidence = data.draw(CONFIDENCE)
    for reward, _ in DETECTION:
        values = [reward(said([(box, confidence)]), DetectionTarget(truth)) for box in (far, near)]
        assert values[0] <= values[1], reward
    for reward in (grounding_iou_reward, grounding_iou_squared_reward):
        values = [reward(said([(box, confidence)]), GroundingTarget(truth)) for box in (far, near)]
        assert values[0] <= values[1], reward


@settings(deadline=None)
@given(true_boxes(), true_boxes(), true_boxes())
def test_giou_rises_with_the_giou(truth: Box, one: Box, other: Box):
    far, near = sorted((one, other), key=lambda box: float(box_giou(box, truth)))
    target = GroundingTarget(truth)
    assert giou_reward(said([(far, 1)]), target) <= giou_reward(said([(near, 1)]), target)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.data())
def test_a_better_pair_never_lowers_a_hungarian_total(n_pred: int, n_gt: int, row: int, data: st.DataObject):
    value = st.sampled_from([0.0, 0.5, 0.51, 0.6, 0.75, 0.9, 1.0])
    iou = np.array(data.draw(st.lists(value, min_size=n_pred * n_gt, max_size=n_pred * n_gt))).reshape(n_pred, n_gt)
    better = iou.copy()
    row = row % n_pred
    for column in range(n_gt):
        better[row, column] = max(iou[row, column], data.draw(value))

    def gains(iou: np.ndarray) -> list[np.ndarray]:
        return [np.where(iou > 0.5, worth, 0) for worth in (iou, 1.0, np.where(iou >= 0.75, 1, iou))]

    for before, after in zip(gains(iou), gains(better), strict=True):
        assert best_total(before) <= best_total(after) + 1e-12
        pairs = [(row, column) for row, column in enumerate(match_hungarian(before)) if column >= 0]
        assert best_total(before) == pytest.approx(sum(before[pair] for pair in pairs))


# ---------------------------------------------------------------- more boxes are never free money


@settings(deadline=None, max_examples=200)
@given(questions(), st.integers(0, 6), st.data())
def test_a_box_that_matches_nothing_never_raises_a_reward(question, place: int, data: st.DataObject):
    truths, rows = question
    extra = data.draw(written_boxes(truths)), data.draw(CONFIDENCE)
    highest = float(box_iou(extra[0], truths).max())
    for reward, threshold in DETECTION:
        # Average precision counts from 0.5 on, all others above their threshold.
        if highest < threshold or highest == threshold == 0:
            before = reward(said(rows), DetectionTarget(truths))
            after = reward(said(inserted(rows, place, extra)), DetectionTarget(truths))
            assert after <= before + 1e-9, (reward, before, after)


@settings(deadline=None)
@given(questions(), st.integers(0, 6), st.integers(0, 5), CONFIDENCE)
def test_an_exact_copy_changes_nothing_wherever_it_stands(question, place: int, which: int, confidence: float):
    truths, rows = question
    assume(rows)
    box, highest = rows[which % len(rows)]
    longer = inserted(rows, place, (list(box), min(confidence, highest)))
    for reward, _ in DETECTION:
        value = reward(said(rows), DetectionTarget(truths))
        assert reward(said(longer), DetectionTarget(truths)) == same(value), reward


@settings(deadline=None)
@given(questions(most_truths=1), st.integers(0, 6), st.data())
def test_a_second_box_on_a_taken_object_never_raises_a_greedy_reward(question, place: int, data: st.DataObject):
    (truth,), rows = question
    rows = [(truth, 1.0), *rows]
    extra = data.draw(written_boxes([truth])), data.draw(st.sampled_from([0.0, 0.3, 0.9]))
    for reward, _ in DETECTION:
        before = reward(said(rows), DetectionTarget(truth))
        after = reward(said(inserted(rows, place, extra)), DetectionTarget(truth))
        assert after <= before + 1e-9, (reward, before, after)


@settings(deadline=None)
@given(questions(most_truths=1), st.integers(0, 6), st.data())
def test_further_boxes_never_raise_a_reward_of_grounding(question, place: int, data: st.DataObject):
    (truth,), rows = question
    assume(rows)
    target, extra = GroundingTarget(truth), (data.draw(written_boxes([truth])), 1.0)
    for reward in GROUNDING:
        value = reward(said(rows), target)
        # The first box is the answer: what follows is not read, and its copy before it is the same answer.
        assert reward(said(inserted(rows, place + 1, extra)), target) == value
        assert reward(said([rows[0], *rows]), target) == value
        if reward(said([extra]), target) == 0:
            assert reward(said([extra, *rows]), target) <= value


@pytest.mark.parametrize("n_truths", [1, 200])
def test_a_carpet_of_boxes_is_worth_nothing(n_truths: int):
    truths = [[20 * n, 0, 20 * n + 10, 10] for n in range(n_truths)]
    most = max(MAX_PREDICTIONS, 2 * n_truths)
    rows = [(box, 1.0) for box in truths] + [([20 * n, 50, 20 * n + 10, 60], 0.0) for n in range(most - n_truths)]
    target = DetectionTarget(truths)
    for reward, _ in DETECTION:
        one_more = said([*rows, ([0, 90, 10, 99], 0.0)])
        assert reward(one_more, target) <= 0, reward
        assert reward(said([*rows, rows[0], rows[-1]]), target) == same(reward(said(rows), target)), reward
    assert recall_reward(said(rows), target) == 1


# ---------------------------------------------------------------- bounds, order, odd numbers

ANY_NUMBER = st.one_of(
    st.integers(-10, 60),
    st.floats(-1e3, 1e3),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e200, -1e200, 1.7e308, -1.7e308, -0.0, 5e-324]),
)


@settings(deadline=None)
@given(
    st.lists(true_boxes(), max_size=3),
    st.lists(st.tuples(st.lists(ANY_NUMBER, min_size=4, max_size=4), ANY_NUMBER), max_size=5),
    st.booleans(),
    st.sampled_from(["strict", "paper"]),
)
def test_any_numbers_are_scored_within_bounds(truths: list[Box], rows: list, no_objects: bool, rules: str):
    answer = said(rows)
    answer.no_objects = no_objects
    for reward, _ in DETECTION:
        low = -1 if getattr(reward, "func", None) is cosine_length_reward else 0
        assert low <= reward(answer, DetectionTarget(truths), rules=rules) <= 1, reward
    for truth in truths:
        for reward in GROUNDING:
            high = 2 if reward is giou_reward and rules == "strict" else 1
            assert 0 <= reward(answer, GroundingTarget(truth), rules=rules) <= high, reward


@settings(deadline=None)
@given(questions(), st.randoms(use_true_random=False), st.sampled_from(["strict", "paper"]))
def test_the_order_of_writing_does_not_matter(question, random, rules: str):
    truths, rows = question
    shuffled = random.sample(rows, len(rows))
    for reward, _ in DETECTION:
        value = reward(said(rows), DetectionTarget(truths), rules=rules)
        assert reward(said(shuffled), DetectionTarget(truths), rules=rules) == same(value), reward


@settings(deadline=None)
@given(st.data(), st.booleans())
def test_answers_looked_at_together_score_as_alone(data: st.DataObject, hardened: bool):
    truths, first = data.draw(questions())
    rest = data.draw(st.lists(st.lists(st.tuples(written_boxes(truths), CONFIDENCE), max_size=6), max_size=4))
    answers = [said(rows) for rows in (first, *rest)]
    answers.append(Answer(text="x", boxes=[[0, 0, math.nan, 1], [0, 0, 10, 10]], confidences=[1, math.inf]))
    target, rules = DetectionTarget(truths), "strict" if hardened else "paper"

    def scores() -> list[float | None]:
        rewards = (detection_iou_reward, detection_confidence_reward)
        return [reward(answer, target, rules=rules) for answer in answers for reward in rewards]

    prepare_scenes(answers[:1], DetectionTarget([[0, 0, 1, 1]]))  # forgets
    alone = scores()
    prepare_scenes(answers, target, hardened=hardened)
    assert len(matching._scenes) >= len({(a.boxes.numpy().tobytes(), a.confidences.numpy().tobytes()) for a in answers})
    assert scores() == alone


# ---------------------------------------------------------------- where it does not hold

TRUTH = [0, 0, 100, 100]


def test_greedy_matching_lets_a_worse_box_take_an_object():
    def scores(first: Box, **options: Any) -> float:
        rows = [(first, 0.9), ([0, 0, 100, 90], 0.8)]
        return detection_iou_reward(said(rows), DetectionTarget(TRUTH), **options)

    off, closer = [0, 0, 100, 40], [0, 0, 100, 60]
    assert scores(off) == pytest.approx(0.9 / 2)
    assert scores(closer) == pytest.approx(0.6 / 2)
    assert scores(off, matching="hungarian") == scores(closer, matching="hungarian") == pytest.approx(0.9 / 2)


def test_a_better_overlap_may_move_the_match_to_a_box_that_is_less_sure():
    def score(first: Box) -> float:
        rows = [(first, 0.1), ([0, 0, 100, 55], 0.9)]
        return detection_confidence_reward(said(rows), DetectionTarget(TRUTH), matching="hungarian")

    assert score([0, 0, 100, 52]) == pytest.approx(0.4)
    assert score([0, 0, 100, 60]) == 0


def test_the_confidence_of_the_paper_pays_for_wrong_boxes_that_are_not_meant():
    wrong, right = [500, 500, 600, 600], TRUTH
    for box, confidence, paper, strict in [(wrong, 0.0, 1, 0), (right, 0.0, 0, 0), (wrong, 0.3, 0.7, 0)]:
        answer = said([(box, confidence)])
        assert detection_confidence_reward(answer, DetectionTarget(TRUTH), rules="paper") == pytest.approx(paper)
        assert detection_confidence_reward(answer, DetectionTarget(TRUTH)) == strict
    # Adding wrong boxes that are not meant raises it, too.
    more = [(right, 0.5), *(([500, 500, 600 + n, 600], 0.0) for n in range(9))]
    assert detection_confidence_reward(said(more[:1]), DetectionTarget(TRUTH), rules="paper") == 0.5
    assert detection_confidence_reward(said(more), DetectionTarget(TRUTH), rules="paper") == pytest.approx(0.95)
    assert detection_confidence_reward(said(more), DetectionTarget(TRUTH)) == pytest.approx(0.05)


def test_the_iou_of_the_paper_is_best_with_a_single_sure_box():
    target, rows = DetectionTarget([TRUTH, [200, 0, 300, 100]]), [(TRUTH, 1.0), ([200, 0, 300, 60], 0.5)]
    assert detection_iou_reward(said(rows[:1]), target, rules="paper") == 1
    assert detection_iou_reward(said(rows), target, rules="paper") == pytest.approx(0.8)
    assert detection_iou_reward(said(rows[:1]), target) == 0.5
    assert detection_iou_reward(said(rows), target) == pytest.approx(0.8)
