"""The greedy matching of COCO and LVIS on tensors: detections to objects, at ten IoU thresholds in four area ranges.

The forty combinations of threshold and range are forty matchings of the same pairs. They run side by side as the bits
of one int64 (*planes*: bit ``10 * range + threshold``). In each plane the evaluators let every detection of a picture
and class, best score first, take the free object that it prefers. Objects all prefer the detection of better rank, so
that order has the same outcome as deferred acceptance (Gale and Shapley 1962): every detection points at the object it
likes best, every object turns away all but the best that point at it, and so on until nothing changes. That takes a
handful of rounds instead of one step per detection, and no round looks at single pictures.

Shape legend: N detections, M objects, P pairs of one picture and class, E pairs that overlap enough (edges), S entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

N_THRESHOLDS, N_AREAS = 10, 4
# From numpy, like the evaluators': torch.linspace differs in the last bit, and an IoU of exactly 0.55 then falls out.
THRESHOLDS = np.linspace(0.5, 0.95, N_THRESHOLDS)
AREA_RANGES = ((0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0), (9216.0, 1e10))  # both ends inclusive
_ALL_BUT_SIGN = (1 << 63) - 1
_EVERY_AREA = sum(1 << N_THRESHOLDS * area for area in range(N_AREAS))
_EVERY_THRESHOLD = (1 << N_THRESHOLDS) - 1
# Pairs whose overlap is computed at once; bounds the memory.
PAIRS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Edges:
    """Pairs of a detection and an object of its picture and class with an IoU of at least 0.5, in any order.

    Attributes:
        det: [E] int64, row of the detection.
        gt: [E] int64, row of the object.
        iou: [E] float64.
    """

    det: Tensor
    gt: Tensor
    iou: Tensor


@dataclass(frozen=True)
class Matches:
    """Detections that are matched in some plane.

    Attributes:
        det: [D] int64, their rows, ascending.
        right: [D] int64, the planes in which they are matched to an object that counts.
        ignored: [D] int64, the planes in which they are matched to one that does not.
    """

    det: Tensor
    right: Tensor
    ignored: Tensor


def falling(values: Tensor) -> Tensor:
    """The row numbers of float64 values by falling value, equal ones in their order, NaN last.

    Sorts the bits as whole numbers, which takes a seventh of the time that sorting floats does.
    """
    negative = (-values + 0.0).masked_fill_(values.isnan(), torch.nan)  # one zero of two, one NaN of many
    bits = negative.view(torch.int64)
    return torch.sort(bits ^ ((bits >> 63) & _ALL_BUT_SIGN), stable=True).indices


def area_planes(area: Tensor) -> Tensor:
    """[N] int64: the planes of those ranges that an area [N] lies in."""
    planes = torch.zeros_like(area, dtype=torch.int64)
    for number, (low, high) in enumerate(AREA_RANGES):
        inside = (area >= low) & (area <= high)
        planes |= inside.long() * (_EVERY_THRESHOLD << N_THRESHOLDS * number)
    return planes


def box_edges(det: Tensor, gt: Tensor, crowd: Tensor, starts: Tensor, counts: Tensor) -> Edges:
    """The edges of boxes; the IoU in float64 in pycocotools' order of operations.

    Args:
        det: [4, N] float64 x, y, w, h; detections of one picture and class stand together.
        gt: [4, M] likewise.
        crowd: [M] bool, objects whose overlap is divided by the detection's area alone.
        starts: [M] int64, row of the first detection of the object's picture and class.
        counts: [M] int64, number of these detections.
    """
    found = [_overlapping(det, gt, crowd, *pairs) for pairs in _pairs(starts, counts)]
    if not found:
        empty = starts.new_zeros(0)
        return Edges(empty, empty, det.new_zeros(0))
    return Edges(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _pairs(starts: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs (detection, object), object by object, at most about PAIRS_AT_ONCE at a time."""
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    steps = torch.arange(0, total, PAIRS_AT_ONCE, device=ends.device)
    cuts = torch.searchsorted(ends, steps, right=True)
    sizes = ends[cuts - 1].masked_fill(cuts == 0, 0)
    bounds = [*zip(cuts.tolist(), sizes.tolist(), strict=True), (len(ends), total)]
    for (first, before), (last, after) in pairwise(bounds):
        objects = torch.arange(first, last, device=ends.device)
        here = counts[first:last]
        gt = objects.repeat_interleave(here, output_size=after - before)
        shift = starts[first:last] - (ends[first:last] - here) + before
        det = shift.repeat_interleave(here, output_size=after - before)
        yield det.add_(torch.arange(after - before, device=ends.device)), gt


def _overlapping(det: Tensor, gt: Tensor, crowd: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the pairs with an IoU of at least the lowest threshold."""
    width = _common_side(det[0], det[2], gt[0], gt[2], d, g)
    kept = (width > 0).nonzero()[:, 0]  # most pairs end here
    d, g, width = d.index_select(0, kept), g.index_select(0, kept), width.index_select(0, kept)
    height = _common_side(det[1], det[3], gt[1], gt[3], d, g)
    kept = (height > 0).nonzero()[:, 0]
    d, g, width, height = (values.index_select(0, kept) for values in (d, g, width, height))
    common = width * height
    own = (det[2] * det[3]).index_select(0, d)
    both = own + (gt[2] * gt[3]).index_select(0, g) - common
    iou = common / torch.where(crowd.index_select(0, g), own, both)
    kept = (iou >= THRESHOLDS[0]).nonzero()[:, 0]
    return d.index_select(0, kept), g.index_select(0, kept), iou.index_select(0, kept)


def _common_side(low: Tensor, side: Tensor, gt_low: Tensor, gt_side: Tensor, d: Tensor, g: Tensor) -> Tensor:
    """Length of what two intervals have in common; negative for disjoint ones."""
    end = torch.minimum((low + side).index_select(0, d), (gt_low + gt_side).index_select(0, g))
    return end.sub_(torch.maximum(low.index_select(0, d), gt_low.index_select(0, g)))


def match(edges: Edges, gt_counts: Tensor, crowd: Tensor) -> Matches:
    """Match detections to objects in every plane.

    In order of preference a detection takes: the object that counts with the largest IoU, of equal ones the later; if
    there is none, likewise among those that do not count. An object is used up, a crowd never is.

    Args:
        edges: their rows of detections ascend by rank within a picture and class.
        gt_counts: [M] int64, the planes in which an object counts.
        crowd: [M] bool.
    """
    order = _preference(edges)
    det, gt = (values.index_select(0, order) for values in (edges.det, edges.gt))
    limits = torch.from_numpy(np.minimum(THRESHOLDS, 1 - 1e-10)).to(edges.iou)
    reached = torch.searchsorted(limits, edges.iou.index_select(0, order), right=True)
    planes = ((1 << reached) - 1) * _EVERY_AREA
    counting = gt_counts.index_select(0, gt)
    # Each edge stands twice: in the planes where its object counts, and behind all of these in the others.
    entries = torch.cat([planes & counting, planes & ~counting])
    by_det = torch.sort(torch.cat([det, det]), stable=True)
    owner, from_edge = by_det.values, by_det.indices
    entries = entries.index_select(0, from_edge)
    objects = torch.cat([gt, gt]).index_select(0, from_edge)
    right = from_edge < len(det)
    pointed = _deferred_acceptance(entries, owner, objects, crowd)
    distinct, segment = owner.unique_consecutive(return_inverse=True)
    planes_right, planes_ignored = (pointed.new_zeros(len(distinct)) for _ in range(2))
    # A detection points at one object in a plane, so that sums are unions.
    planes_right.index_add_(0, segment, pointed * right)
    planes_ignored.index_add_(0, segment, pointed * ~right)
    matched = (planes_right | planes_ignored).nonzero()[:, 0]
    return Matches(*(values.index_select(0, matched) for values in (distinct, planes_right, planes_ignored)))


def _preference(edges: Edges) -> Tensor:
    """The edges by falling IoU, equal ones by falling row of the object."""
    later_first = torch.sort(-edges.gt, stable=True).indices
    by_iou = falling(edges.iou.index_select(0, later_first))
    return later_first.index_select(0, by_iou)


def _deferred_acceptance(entries: Tensor, owner: Tensor, objects: Tensor, crowd: Tensor) -> Tensor:
    """[S] the planes in which the owner of an entry ends with its object.

    Args:
        entries: [S] planes in which the pair may match, by owner, in the owner's order of preference.
        owner: [S] ascending; the detection, of which a smaller one has better rank.
        objects: [S] the object.
        crowd: [M] bool.
    """
    by_object = torch.sort(objects, stable=True)
    of_owner, of_object = _SegmentedOr(owner), _SegmentedOr(by_object.values)
    exclusive = -(~crowd).long().index_select(0, by_object.values)  # all bits, or none for a crowd
    back = torch.empty_like(by_object.indices)
    back[by_object.indices] = torch.arange(len(back), device=back.device)
    while True:
        pointed = entries & ~of_owner.before(entries)
        taken = of_object.before(pointed.index_select(0, by_object.indices)) & exclusive
        left = entries & ~taken.index_select(0, back)
        if torch.equal(left, entries):
            return pointed
        entries = left


class _SegmentedOr:
    """For rows in segments: the bitwise or of all rows before each one in its segment.

    Args:
        keys: [S] rows of a segment have the same key and stand together.
    """

    def __init__(self, keys: Tensor) -> None:
        _, counts = keys.unique_consecutive(return_counts=True)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=len(keys))
        place = torch.arange(len(keys), device=keys.device) - starts
        longest = int(counts.max()) if len(counts) else 0
        steps = [1 << power for power in range(max(longest - 1, 0).bit_length())]
        # Whether the row that many places before is of the same segment.
        self._reach = [(step, place[step:] >= step) for step in steps]

    def before(self, rows: Tensor) -> Tensor:
        """[S] int64."""
        found = torch.zeros_like(rows)
        for step, reach in self._reach:
            if step == 1:
                found[1:] = torch.where(reach, rows[:-1], 0)
            found[step:] |= torch.where(reach, found[:-step], 0)  # doubles how far each row has looked back
        return found
