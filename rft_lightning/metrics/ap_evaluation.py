"""From tables of detections and objects to precision and recall: order, overlaps, matching, curves.

Shape legend: N detections, M objects, K classes, T thresholds, A area ranges, R recall points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rft_lightning.metrics.ap_curves import Pool, precision_recall
from rft_lightning.metrics.ap_matching import (
    AREA_RANGES,
    N_THRESHOLDS,
    Edges,
    Matches,
    area_planes,
    box_edges,
    falling,
    match,
)


@dataclass(frozen=True)
class Detections:
    """Detections, by picture; in a picture in the order of writing.

    Attributes:
        image: [N] int64 position of the picture, ascending.
        classes: [N] int64 position of the class.
        boxes: [N, 4] float64 x, y, w, h.
        area: [N] float64.
        score: [N] float64.
        exempt: [N] bool, ignored where nothing matches them (LVIS: more objects may be there); None for none.
    """

    image: Tensor
    classes: Tensor
    boxes: Tensor
    area: Tensor
    score: Tensor
    exempt: Tensor | None = None


@dataclass(frozen=True)
class Objects:
    """Objects, by picture; in a picture in the order of writing.

    Attributes:
        image: [M] int64 position of the picture, ascending.
        classes: [M] int64 position of the class.
        boxes: [M, 4] float64 x, y, w, h.
        area: [M] float64.
        crowd: [M] bool, never used up, and overlapped as a region.
        ignore: [M] bool, counts in no range.
    """

    image: Tensor
    classes: Tensor
    boxes: Tensor
    area: Tensor
    crowd: Tensor
    ignore: Tensor


def evaluate(
    det: Detections,
    gt: Objects,
    n_images: int,
    n_classes: int,
    *,
    caps: Sequence[int],
    edges: Edges | None = None,
) -> tuple[Tensor, Tensor]:
    """Precision [T, R, K, A] and recall [T, K, A, caps], float64, -1 where a class has no object in a range.

    Args:
        det: the detections.
        gt: the objects.
        n_images: number of pictures.
        n_classes: number of classes K.
        caps: most detections of a picture and class in each recall, ascending; the last one holds for the precision.
        edges: overlaps (of masks) that are known; rows of `det` and `gt`. None: those of the boxes.
    """
    order = _pool(det, n_images, caps[-1])
    planes = area_planes(gt.area).masked_fill_(gt.crowd | gt.ignore, 0)
    matches = _match(det, gt, order, planes, n_images, edges)
    counted = area_planes(det.area.index_select(0, order.rows))
    if det.exempt is not None:
        counted.masked_fill_(det.exempt.index_select(0, order.rows), 0)
    pool = Pool(det.classes.index_select(0, order.rows), order.rank, counted)
    return precision_recall(pool, matches, _count_objects(gt, planes, n_classes), caps)


@dataclass(frozen=True)
class _Order:
    """Two orders of the detections that take part.

    Attributes:
        rows: [N'] pooled: class, falling score, picture, order of writing.
        rank: [N'] of each in its picture and class.
        grouped: [N'] class, picture, rank; places in `rows`.
        groups: [N'] class and picture as one ascending number, in the order of `grouped`.
    """

    rows: Tensor
    rank: Tensor
    grouped: Tensor
    groups: Tensor


def _pool(det: Detections, n_images: int, cap: int) -> _Order:
    rows = _by_class_and_score(det)
    group = det.classes.index_select(0, rows) * n_images + det.image.index_select(0, rows)
    groups, grouped = torch.sort(group, stable=True)
    rank = _ranks(groups, grouped)
    if len(rank) and int(rank.max()) >= cap:
        kept = (rank < cap).nonzero()[:, 0]
        rows, rank, group = (values.index_select(0, kept) for values in (rows, rank, group))
        groups, grouped = torch.sort(group, stable=True)
    return _Order(rows, rank, grouped, groups)


def _by_class_and_score(det: Detections) -> Tensor:
    by_score = falling(det.score)
    return by_score.index_select(0, torch.sort(det.classes.index_select(0, by_score), stable=True).indices)


def _ranks(groups: Tensor, grouped: Tensor) -> Tensor:
    """The place of each row in its group; `groups` are in the order of the rows `grouped`."""
    places = torch.arange(len(groups), device=groups.device)
    begins = torch.ones_like(groups, dtype=torch.bool)
    begins[1:] = groups[1:] != groups[:-1]
    rank = torch.empty_like(groups)
    rank[grouped] = places - torch.where(begins, places, 0).cummax(0).values
    return rank


def _match(det: Detections, gt: Objects, order: _Order, planes: Tensor, n_images: int, edges: Edges | None) -> Matches:
    """The matches, with places in the pool."""
    if edges is None:
        group = gt.classes * n_images + gt.image
        starts = torch.searchsorted(order.groups, group)
        counts = torch.searchsorted(order.groups, group, right=True) - starts
        boxes = det.boxes.index_select(0, order.rows.index_select(0, order.grouped)).T.contiguous()
        edges = box_edges(boxes, gt.boxes.T.contiguous(), gt.crowd, starts, counts)
        del boxes
    else:
        edges = _placed(edges, order, len(det.score))
    found = match(edges, planes, gt.crowd)
    place, by_place = torch.sort(order.grouped.index_select(0, found.det))
    return Matches(place, found.right.index_select(0, by_place), found.ignored.index_select(0, by_place))


def _placed(edges: Edges, order: _Order, n_det: int) -> Edges:
    """Edges of rows as edges of places in the grouped order; without those of detections beyond the cap."""
    place = torch.full((n_det,), -1, device=order.rows.device)
    place[order.rows.index_select(0, order.grouped)] = torch.arange(len(order.rows), device=order.rows.device)
    det = place.index_select(0, edges.det)
    kept = (det >= 0).nonzero()[:, 0]
    return Edges(*(values.index_select(0, kept) for values in (det, edges.gt, edges.iou)))


def _count_objects(gt: Objects, planes: Tensor, n_classes: int) -> Tensor:
    """[K, A] int64 objects that count."""
    n_areas = len(AREA_RANGES)
    shifts = torch.arange(n_areas, device=planes.device) * N_THRESHOLDS
    counts = torch.zeros(n_classes, n_areas, dtype=torch.int64, device=planes.device)
    return counts.index_add_(0, gt.classes, (planes[:, None] >> shifts) & 1)
