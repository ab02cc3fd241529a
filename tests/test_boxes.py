"""Overlaps against torchvision, matching against brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou as torchvision_iou
from torchvision.ops import generalized_box_iou as torchvision_giou

from rft_lightning.boxes import (
    box_giou,
    box_iou,
    match_greedy,
    match_hungarian,
    pairwise_iou,
    valid_boxes,
    xywh_to_xyxy,
    xyxy_to_xywh,
)

SIDE = st.one_of(st.integers(1, 20), st.floats(0.01, 2000))
CORNER = st.one_of(st.integers(-5, 20), st.floats(-2000, 2000))


@st.composite
def valid_box(draw: st.DrawFn) -> list[float]:
    x, y, width, height = draw(CORNER), draw(CORNER), draw(SIDE), draw(SIDE)
    return [x, y, x + width, y + height]


def box_lists(box: st.SearchStrategy) -> st.SearchStrategy[Tensor]:
    return st.lists(box, max_size=6).map(lambda rows: torch.tensor(rows, dtype=torch.float64).reshape(-1, 4))


@st.composite
def overlaps(draw: st.DrawFn, most: int = 5) -> Tensor:
    """[n_pred, n_gt] with many ties and values at the threshold."""
    n_pred, n_gt = draw(st.integers(0, most)), draw(st.integers(0, most))
    value = st.sampled_from([0.0, 0.25, 0.5, 0.5 + 1e-9, 0.75, 0.9, 1.0])
    rows = draw(st.lists(st.lists(value, min_size=n_gt, max_size=n_gt), min_size=n_pred, max_size=n_pred))
    return torch.tensor(rows, dtype=torch.float64).reshape(n_pred, n_gt)


@settings(deadline=None)
@given(box_lists(valid_box()), box_lists(valid_box()))
def test_iou_and_giou_agree_with_torchvision(a: Tensor, b: Tensor):
    torch.testing.assert_close(box_iou(a, b), torchvision_iou(a, b), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(box_giou(a, b), torchvision_giou(a, b), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(box_lists(st.lists(CORNER, min_size=4, max_size=4)), box_lists(valid_box()))
def test_boxes_without_area_overlap_nothing(a: Tensor, b: Tensor):
    iou = box_iou(a, b)
    assert iou.shape == (len(a), len(b))
    assert iou.dtype == torch.float64
    assert bool(((iou >= 0) & (iou <= 1 + 1e-12)).all())
    assert not bool(iou[~valid_boxes(a)].any())
    torch.testing.assert_close(iou, box_iou(b, a).T, rtol=0, atol=0)


def test_iou_by_hand():
    truth = [[0, 0, 10, 10]]
    others = [[0, 0, 10, 10], [0, 0, 5, 10], [10, 0, 20, 10], [10, 10, 0, 0], [5, 5, 5, 5], [-10, -10, 20, 20]]
    assert box_iou(truth, others).tolist() == [[1, 0.5, 0, 0, 0, 100 / 900]]
    assert box_giou(truth, [[20, 0, 30, 10]]).item() == pytest.approx(-1 / 3)


@settings(deadline=None)
@given(box_lists(st.lists(CORNER, min_size=4, max_size=4)), box_lists(valid_box()))
def test_pairwise_iou_is_box_iou_to_the_last_bit(a: Tensor, b: Tensor):
    assert torch.equal(torch.from_numpy(pairwise_iou(a.numpy(), b.numpy())), box_iou(a, b))


def test_pairwise_iou_of_boxes_as_large_as_numbers_go():
    huge = torch.tensor([[-1e308, -1e308, 1e308, 1e308], [1e308, 1e308, -1e308, -1e308]], dtype=torch.float64)
    truth = torch.tensor([[0, 0, 10, 10]], dtype=torch.float64)
    assert pairwise_iou(huge.numpy(), truth.numpy()).tolist() == [[0], [0]]


def test_float32_input_is_computed_in_float64():
    box = torch.tensor([[0, 0, 3, 3]], dtype=torch.float32)
    assert box_iou(box, [[0, 0, 1, 1]]).item() == 1 / 9


def test_valid_boxes():
    boxes = [[0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, float("inf"), 1], [float("nan"), 0, 1, 1]]
    assert valid_boxes(boxes).tolist() == [True, False, False, False, False, False]
    assert valid_boxes([]).shape == (0,)


@settings(deadline=None)
@given(box_lists(st.lists(st.integers(-1000, 1000), min_size=4, max_size=4)))
def test_formats_are_inverse(boxes: Tensor):
    assert torch.equal(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)


def test_formats_by_hand():
    assert xywh_to_xyxy([[1, 2, 3, 4]]).tolist() == [[1, 2, 4, 6]]
    assert xyxy_to_xywh([[1, 2, 4, 6]]).tolist() == [[1, 2, 3, 4]]


def greedy_by_hand(iou: list[list[float]], confidences: list[float], threshold: float) -> list[int]:
    """Pick the next prediction and its ground truth by going through everything."""
    matches: dict[int, int] = {}
    while len(matches) < len(iou):
        left = [row for row in range(len(iou)) if row not in matches]
        row = next(row for row in left if confidences[row] == max(confidences[other] for other in left))
        best = -1
        for column, value in enumerate(iou[row]):
            if column not in matches.values() and value > threshold and (best < 0 or value > iou[row][best]):
                best = column
        matches[row] = best
    return [matches[row] for row in range(len(iou))]


@settings(deadline=None)
@given(overlaps(), st.lists(st.sampled_from([0.0, 0.3, 0.9]), min_size=5, max_size=5), st.sampled_from([0.0, 0.5]))
def test_greedy_matching(iou: Tensor, confidences: list[float], threshold: float):
    confidences = confidences[: len(iou)]
    expected = greedy_by_hand(iou.tolist(), confidences, threshold)
    assert match_greedy(iou, torch.tensor(confidences), threshold) == expected


@settings(deadline=None)
@given(overlaps(most=4))
def test_hungarian_matching(gain: Tensor):
    matches = match_hungarian(gain)
    taken = [column for column in matches if column >= 0]
    assert len(matches) == len(gain)
    assert len(taken) == len(set(taken))
    assert all(gain[row, column] > 0 for row, column in enumerate(matches) if column >= 0)
    # -1 stands for "no ground truth": as many of them as there are predictions.
    columns = [*range(gain.shape[1]), *[-1] * len(gain)]
    sums = [
        sum(float(gain[row, column]) for row, column in enumerate(choice) if column >= 0)
        for choice in set(permutations(columns, len(gain)))
    ]
    assert sum(float(gain[row, column]) for row, column in enumerate(matches) if column >= 0) == pytest.approx(
        max(sums)
    )


@settings(deadline=None)
@given(overlaps(), st.integers(0, 5))
def test_hungarian_matching_does_not_see_a_row_of_zeros(gain: Tensor, place: int):
    place = min(place, len(gain))
    longer = torch.cat([gain[:place], gain.new_zeros(1, gain.shape[1]), gain[place:]])
    matches = match_hungarian(longer)
    assert matches.pop(place) == -1
    assert matches == match_hungarian(gain)


def test_greedy_and_hungarian_differ_where_the_confident_box_is_greedy():
    iou = torch.tensor([[0.8, 0.7], [0.75, 0.0]], dtype=torch.float64)
    assert match_greedy(iou, torch.tensor([0.9, 0.8])) == [0, -1]
    assert match_hungarian(iou) == [1, 0]


def test_the_threshold_is_strict():
    assert match_greedy(torch.tensor([[0.5]], dtype=torch.float64), torch.ones(1)) == [-1]


def test_one_confidence_per_prediction():
    with pytest.raises(ValueError, match="one confidence per prediction"):
        match_greedy(torch.zeros(2, 1), torch.ones(3))
