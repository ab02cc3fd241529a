"""Masks of polygons, painted as OpenCV paints them (`fillPoly` with its outline), which published masks are made with.

The same pixels as `cv2.fillPoly` and `cv2.polylines` (compared with OpenCV 5.0) for polygons inside the picture. OpenCV
cuts an edge that leaves the picture before it draws it, which moves some of its pixels; here it is drawn whole.

Shape legend: H rows and W columns of the picture, E edges of a polygon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHIFT = 16  # OpenCV's fixed-point numbers have 16 fractional bits


@dataclass(frozen=True, slots=True)
class Region:
    """A polygon of a mask.

    Attributes:
        points: corners (x, y) in whole pixels; pixels on the outline belong to it.
        value: what it is painted with: 1 for the object, 255 for what is not scored.
    """

    points: tuple[tuple[int, int], ...]
    value: int = 1


def paint(regions: Sequence[Region], size: tuple[int, int]) -> np.ndarray:
    """[H, W] uint8: the regions from the largest to the smallest, each over those before; 0 elsewhere.

    Args:
        regions: the polygons.
        size: (width, height) of the picture.
    """
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    covered = [_cover(region, size) for region in regions]
    # Of equal areas the later one is painted first, as in the published code (a sort, reversed).
    for number in np.argsort([inside.sum() for _, _, inside in covered], kind="stable")[::-1]:
        left, top, inside = covered[number]
        part = mask[top : top + inside.shape[0], left : left + inside.shape[1]]
        part[inside] = regions[number].value
    return mask


def _cover(region: Region, size: tuple[int, int]) -> tuple[int, int, np.ndarray]:
    """What a region covers of the picture: left, top and a boolean array from there."""
    corners = np.asarray(region.points, dtype=np.int64).reshape(-1, 2)
    left, top = np.clip(corners.min(0), 0, size)
    right, bottom = np.clip(corners.max(0) + 1, 0, size)
    inside = np.zeros((bottom - top, right - left), dtype=bool)
    shifted = corners - (left, top)
    edges = np.concatenate([np.roll(shifted, 1, axis=0), shifted], axis=1)  # [E, 4]: from x, y to x, y
    if inside.size:
        _fill(inside, edges)
        _outline(inside, edges)
    return int(left), int(top), inside


def _fill(inside: np.ndarray, edges: np.ndarray) -> None:
    """Fill between the odd and the even crossings of each row with the edges."""
    height, width = inside.shape
    crossings = [_crossings(edge, height) for edge in edges.tolist() if edge[1] != edge[3]]
    if not crossings:
        return
    rows, columns = np.concatenate(crossings, axis=1)
    order = np.lexsort((columns, rows))
    rows, columns = rows[order], columns[order]  # every row has an even number of crossings
    first, last = -(-columns[::2] >> _SHIFT), (columns[1::2] >> _SHIFT) + 1
    change = np.zeros((height, width + 1), dtype=np.int32)
    np.add.at(change, (rows[::2], first.clip(0, width)), 1)
    np.add.at(change, (rows[::2], last.clip(0, width)), -1)
    inside |= change.cumsum(1)[:, :-1] > 0


def _crossings(edge: list[int], height: int) -> np.ndarray:
    """[2, rows] row and fixed-point column where an edge crosses the rows of the picture; its lower end not counted."""
    x1, y1, x2, y2 = edge if edge[1] < edge[3] else (*edge[2:], *edge[:2])
    run, rise = (x2 - x1) << _SHIFT, y2 - y1
    slope = run // rise if run >= 0 else -(-run // rise)  # C++ rounds towards zero
    rows = np.arange(max(y1, 0), max(min(y2, height), 0))
    return np.stack([rows, (x1 << _SHIFT) + slope * (rows - y1)])


def _outline(inside: np.ndarray, edges: np.ndarray) -> None:
    """Bresenham lines, from left to right, half steps rounded back to where they come from."""
    height, width = inside.shape
    for edge in edges.tolist():
        x1, y1, x2, y2 = edge if edge[0] <= edge[2] else (*edge[2:], *edge[:2])
        dx, dy = x2 - x1, abs(y2 - y1)
        major, minor = max(dx, dy), min(dx, dy)
        steps = np.arange(major + 1)
        aside = (2 * minor * steps + major - 1) // (2 * major) if major else steps
        along_x, along_y = (aside, steps) if dy > dx else (steps, aside)
        columns, rows = x1 + along_x, y1 + (along_y if y2 >= y1 else -along_y)
        kept = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        inside[rows[kept], columns[kept]] = True


__all__ = ["Region", "paint"]
