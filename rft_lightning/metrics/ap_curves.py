"""Precision and recall of COCO and LVIS from matched detections.

Only detections that are matched in some plane are looked at one by one; all others are false positives and enter
through four running counts, one per area range.

Shape legend: N detections, D matched detections, M objects, K classes, T = 10 thresholds, A = 4 area ranges, R = 101
recall points; L = A * T planes (see :mod:`rft_lightning.metrics.ap_matching`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rft_lightning.metrics.ap_matching import N_AREAS, N_THRESHOLDS, Matches

RECALL_POINTS = np.linspace(0.0, 1.0, 101)
N_PLANES = N_AREAS * N_THRESHOLDS


@dataclass(frozen=True)
class Pool:
    """All detections in the order in which they are pooled: class, falling score, picture, order of writing.

    Attributes:
        classes: [N] int64, position of the class, ascending.
        rank: [N] int64, place among the detections of its picture and class, from 0.
        counted: [N] int64, the planes in which it is a false positive if nothing matches it.
    """

    classes: Tensor
    rank: Tensor
    counted: Tensor


def precision_recall(pool: Pool, matches: Matches, n_objects: Tensor, caps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Interpolated precision, and the recall that is reached.

    Args:
        pool: the detections, none of a rank beyond the largest cap.
        matches: of them; `det` is the place in the pool.
        n_objects: [K, A] int64, objects that count.
        caps: how many detections of a picture and class take part in each recall; ascending, the last one all.

    Returns:
        precision [T, R, K, A] and recall [T, K, A, caps], float64; -1 where a class has no object in a range.
    """
    n_classes = len(n_objects)
    det = matches.det
    classes = pool.classes.index_select(0, det)
    right = _bits(matches.right)
    starts = torch.searchsorted(classes, torch.arange(n_classes, device=classes.device))
    n_right = _running(right, classes, starts)
    n_wrong = _wrong(pool, det, classes, n_classes)
    n_wrong -= _running(_bits((matches.right | matches.ignored) & pool.counted.index_select(0, det)), classes, starts)
    absent = (n_objects == 0)[None]  # [1, K, A]
    precision = _envelope(right, n_right, n_wrong, classes, n_objects)
    precision = precision.view(len(RECALL_POINTS), n_classes, N_AREAS, N_THRESHOLDS).permute(3, 0, 1, 2)
    rank = pool.rank.index_select(0, det)
    found = torch.stack([_count(right, classes, rank < cap, n_classes) for cap in caps], -1)
    found = found.view(n_classes, N_AREAS, N_THRESHOLDS, len(caps)).permute(2, 0, 1, 3)
    recall = found.double() / n_objects.clamp(min=1).double()[None, ..., None]
    return precision.masked_fill(absent[None], -1), recall.masked_fill(absent[..., None], -1)


def _bits(planes: Tensor) -> Tensor:
    """[D] planes as [D, L] int16, 0 or 1."""
    areas = torch.arange(0, N_PLANES, N_THRESHOLDS, device=planes.device)
    thresholds = torch.arange(N_THRESHOLDS, dtype=torch.int16, device=planes.device)
    by_area = (planes[:, None] >> areas).bitwise_and_((1 << N_THRESHOLDS) - 1).short()  # narrow before it is unfolded
    return (by_area[..., None] >> thresholds).bitwise_and_(1).flatten(1)


def _running(bits: Tensor, classes: Tensor, starts: Tensor) -> Tensor:
    """[D, L] int32 running counts of bits [D, L], which begin anew with each class."""
    total = bits.cumsum(0, dtype=torch.int32)
    if len(total):
        before = total.index_select(0, (starts - 1).clamp_(min=0)).masked_fill_((starts == 0)[:, None], 0)
        total -= before.index_select(0, classes)
    return total


def _wrong(pool: Pool, det: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """[D, L] int32: of the pool up to each of `det`, those of its class that count if nothing matches them."""
    starts = torch.searchsorted(pool.classes, torch.arange(n_classes, device=classes.device)).index_select(0, classes)
    columns = []
    for area in range(N_AREAS):
        counts = (pool.counted >> (area * N_THRESHOLDS)).bitwise_and_(1)
        total = counts.cumsum(0, dtype=torch.int32)
        first = starts.clamp(max=max(len(total) - 1, 0))
        before = total.index_select(0, first) - counts.index_select(0, first).int()
        columns.append(total.index_select(0, det) - before)
    return torch.stack(columns, 1).repeat_interleave(N_THRESHOLDS, 1)


def _envelope(right: Tensor, n_right: Tensor, n_wrong: Tensor, classes: Tensor, n_objects: Tensor) -> Tensor:
    """[R, K, L] the largest precision at each recall point or beyond; 0 where it is not reached.

    Precision is largest, and recall steps, at true positives: no other place of the curve matters.
    """
    place, plane = right.nonzero(as_tuple=True)
    count, wrong = n_right[place, plane].long(), n_wrong[place, plane]
    value = count.double() / ((wrong + count).double() + np.spacing(1))
    class_area = classes.index_select(0, place) * N_AREAS + plane // N_THRESHOLDS
    sizes = n_objects.flatten()
    offsets = sizes.cumsum(0) - sizes
    point = _recall_points(sizes).index_select(0, offsets.index_select(0, class_area) + count - 1)
    width = len(n_objects) * N_PLANES
    best = value.new_zeros(len(RECALL_POINTS) * width)
    column = class_area // N_AREAS * N_PLANES + plane
    best.scatter_reduce_(0, point * width + column, value, "amax")
    best = best.view(len(RECALL_POINTS), width)
    rows = best.unbind()
    for row, beyond in reversed(list(pairwise(rows))):
        torch.maximum(row, beyond, out=row)
    return best


def _recall_points(sizes: Tensor) -> Tensor:
    """For n = each of `sizes` and c = 1 ... n: the last recall point that c of n objects reach; one after the other."""
    total = sizes.cumsum(0)
    length = int(total[-1]) if len(total) else 0
    n = sizes.repeat_interleave(sizes, output_size=length)
    c = torch.arange(1, length + 1, device=sizes.device) - (total - sizes).repeat_interleave(sizes, output_size=length)
    points = torch.from_numpy(RECALL_POINTS).to(sizes.device)
    return torch.searchsorted(points, c.double() / n.double(), right=True) - 1


def _count(bits: Tensor, classes: Tensor, rows: Tensor, n_classes: int) -> Tensor:
    """[K, L] int64 number of bits of each class in those rows."""
    return (
        torch.zeros(n_classes, bits.shape[1], dtype=torch.int32, device=bits.device)
        .index_add_(0, classes, (bits * rows[:, None]).int())
        .long()
    )
