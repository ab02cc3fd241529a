"""Boxes: formats, overlaps and matching.

Boxes are xyxy unless a name says otherwise. All overlaps are pairwise, in float64, on the device of their input, and
treat coordinates as continuous: no +1 for the last pixel, no clipping to a picture, no epsilon in a denominator.

Shape legend: K boxes; N and M boxes of two lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rft_lightning.sample import BoxesLike, as_boxes


def xywh_to_xyxy(boxes: BoxesLike) -> Tensor:
    """COCO's (left, top, width, height) [K, 4] as corners [K, 4], float64 in the same unit."""
    boxes = as_boxes(boxes)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def xyxy_to_xywh(boxes: BoxesLike) -> Tensor:
    """Corners [K, 4] as COCO's (left, top, width, height) [K, 4], float64 in the same unit."""
    boxes = as_boxes(boxes)
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def valid_boxes(boxes: BoxesLike) -> Tensor:
    """[K] bool: True where a box [K, 4] has finite corners and x1 < x2 and y1 < y2."""
    boxes = as_boxes(boxes)
    return boxes.isfinite().all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1)


def box_iou(a: BoxesLike, b: BoxesLike) -> Tensor:
    """Intersection over union of each pair.

    Zero unless the intersection is strictly positive, which a box without area or with swapped corners never is.

    Args:
        a: [N, 4] xyxy.
        b: [M, 4] xyxy in the same unit.

    Returns:
        [N, M] float64 in [0, 1].

    Raises:
        ValueError: `a` or `b` is no list of boxes.
    """
    intersection, union = _intersection_and_union(as_boxes(a), as_boxes(b))
    return torch.where(intersection > 0, intersection / union, 0.0)


def box_giou(a: BoxesLike, b: BoxesLike) -> Tensor:
    """Generalised IoU of each pair: IoU - (C - U) / C, with C the area of the smallest box around both and U the union.

    Source: Rezatofighi et al. 2019 (arXiv 1902.09630), Algorithm 1.

    Args:
        a: [N, 4] xyxy with x1 < x2 and y1 < y2; the value means nothing for other boxes (see :func:`valid_boxes`).
        b: [M, 4] likewise, in the same unit.

    Returns:
        [N, M] float64 in (-1, 1].

    Raises:
        ValueError: `a` or `b` is no list of boxes.
    """
    a, b = as_boxes(a), as_boxes(b)
    intersection, union = _intersection_and_union(a, b)
    iou = torch.where(intersection > 0, intersection / union, 0.0)
    low = torch.minimum(a[:, None, :2], b[None, :, :2])
    high = torch.maximum(a[:, None, 2:], b[None, :, 2:])
    hull = (high - low).prod(-1)
    return iou - (hull - union) / hull


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """:func:`box_iou` to the last bit, on arrays: for few boxes the overhead of tensors is most of the time.

    Args:
        a: [N, 4] float64 xyxy.
        b: [M, 4] float64 xyxy in the same unit.

    Returns:
        [N, M] float64 in [0, 1].
    """
    # Corners may be as large as float64 allows; an infinite area is an overlap of 0, and nothing to warn of.
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = a.T[:, :, None], np.ascontiguousarray(b.T)[:, None]  # both axes at once: half as many calls
        sides = np.minimum(a[2:], b[2:])
        sides -= np.maximum(a[:2], b[:2])
        np.maximum(sides, 0, out=sides)
        intersection = sides[0] * sides[1]
        (aw, ah), (bw, bh) = a[2:] - a[:2], b[2:] - b[:2]
        union = aw * ah + bw * bh
        union -= intersection
        return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)


def match_greedy(iou: ArrayLike, confidences: ArrayLike, threshold: float = 0.5) -> list[int]:
    """Match predictions to ground truth by falling confidence, each to the free ground truth it overlaps most.

    Equal confidences keep their order (stable sort), equal overlaps go to the ground truth that comes first.

    Args:
        iou: [n_pred, n_gt] in [0, 1], a tensor or an array.
        confidences: [n_pred], finite.
        threshold: a pair counts only if its IoU is strictly greater.

    Returns:
        For each prediction, in the order of the rows, the index of its ground truth, or -1.

    Raises:
        ValueError: there is not one confidence per row.
    """
    overlaps, certain = np.asarray(iou), np.asarray(confidences)
    if len(certain) != len(overlaps):
        raise ValueError(f"Expected one confidence per prediction, found {len(certain)} for {len(overlaps)}.")
    matches = [-1] * len(overlaps)
    if overlaps.size == 0:
        return matches
    order = (-certain).argsort(kind="stable")
    found = match_in_order(overlaps[order], threshold)
    for prediction, truth in zip(order.tolist(), found, strict=True):
        matches[prediction] = truth
    return matches


def match_in_order(
    iou: np.ndarray, threshold: float, *, best: Sequence[int] | None = None, largest: Sequence[float] | None = None
) -> list[int]:
    """:func:`match_greedy` of predictions that stand by falling confidence.

    Args:
        iou: [n_pred, n_gt], n_gt > 0.
        threshold: a pair counts only if its IoU is strictly greater.
        best: for each prediction the ground truth that it overlaps most, where that is known.
        largest: the IoU with it.
    """
    best = iou.argmax(1).tolist() if best is None else best
    largest = iou.max(1).tolist() if largest is None else largest
    matches: list[int] = []
    taken: list[int] = []
    for prediction, (truth, overlap) in enumerate(zip(best, largest, strict=True)):
        if overlap > threshold and truth in taken:  # few are: only these look at their row again
            row = iou[prediction].copy()
            row[taken] = -np.inf
            truth = int(row.argmax())
            overlap = row[truth]
        if overlap > threshold:
            taken.append(truth)
            matches.append(truth)
        else:
            matches.append(-1)
    return matches


def match_hungarian(gain: ArrayLike) -> list[int]:
    """Match predictions to ground truth so that the summed gain of the pairs is greatest.

    Args:
        gain: [n_pred, n_gt] finite and >= 0, what a pair is worth; pairs that are worth 0 stay unmatched.

    Returns:
        For each prediction, in the order of the rows, the index of its ground truth, or -1.
    """
    from scipy.optimize import linear_sum_assignment

    gains = np.asarray(gain, dtype=np.float64)
    # Without what cannot match: adding such a row must not change which of several best assignments is found.
    rows, columns = np.flatnonzero(gains.any(1)), np.flatnonzero(gains.any(0))
    matches = [-1] * len(gains)
    for row, column in zip(*linear_sum_assignment(gains[np.ix_(rows, columns)], maximize=True), strict=True):
        prediction, truth = int(rows[row]), int(columns[column])
        if gains[prediction, truth] > 0:
            matches[prediction] = truth
    return matches


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    # Clamped per side: the product of two negative sides would be a positive area.
    intersection = (high - low).clamp(min=0).prod(-1)
    return intersection, _areas(a)[:, None] + _areas(b)[None, :] - intersection


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
