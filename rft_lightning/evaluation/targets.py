"""The right answers in rows of predictions: written, and read with all that scoring needs of them checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rft_lightning.masks import Region
from rft_lightning.metrics.ap_files import END_OF_CLASS_IDS
from rft_lightning.sample import ClassTarget, DetectionTarget, GroundingTarget, PresenceTarget, Target, as_boxes

# What a row calls its task -> the kind of the right answer.
TARGETS: dict[str, type] = {
    "classification": ClassTarget,
    "detection": DetectionTarget,
    "grounding": GroundingTarget,
    "presence": PresenceTarget,
}
Size = tuple[int, int] | None
# Most rows of a detection data set are without boxes; they share these.
_NO_BOXES, _NO_NUMBERS = as_boxes(None), torch.zeros(0, dtype=torch.float64)


def target_row(target: Target) -> dict[str, Any]:
    """A right answer as plain data."""
    if isinstance(target, ClassTarget):
        return {"label": target.label, "aliases": list(target.aliases)}
    if isinstance(target, PresenceTarget):
        return {"present": target.present, "category": target.category, "category_id": target.category_id}
    if isinstance(target, GroundingTarget):
        regions = [{"points": [list(point) for point in r.points], "value": r.value} for r in target.regions]
        return {"expression": target.expression, "boxes": target.boxes.tolist(), "regions": regions}
    lists = {name: _list(getattr(target, name)) for name in ("boxes", "areas", "ignore_boxes", "ignore_areas")}
    words = {name: getattr(target, name) for name in ("not_exhaustive", "frequency")}
    return {"category": target.category, "category_id": target.category_id, **lists, **words}


def read_target(task: str, row: Mapping[str, Any], size: Size) -> Target:
    """The right answer of a row.

    Args:
        task: what the row calls its task.
        row: the right answer as plain data.
        size: (width, height) of the picture in pixels, where it is known.

    Raises:
        KeyError, TypeError, ValueError: something is missing or of another kind.
    """
    target: Target = _READERS[task](row, size)
    return target


def read_boxes(boxes: Any) -> Tensor:
    """Boxes [K, 4]; raises a ValueError unless they are a list of boxes as JSON has them."""
    if boxes is None:
        return _NO_BOXES
    check_boxes(boxes)
    return as_boxes(boxes) if boxes else _NO_BOXES


def read_numbers(values: list[float] | None) -> Tensor:
    """[K] float64."""
    return torch.tensor(values, dtype=torch.float64) if values else _NO_NUMBERS


def check_boxes(boxes: Any) -> None:
    """Raise a ValueError unless it is a list of boxes as JSON has them."""
    if not isinstance(boxes, list):
        raise ValueError(f"boxes is {boxes!r}, expected a list of [x1, y1, x2, y2]")
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            raise ValueError(f"the box {box!r} is not of four finite numbers [x1, y1, x2, y2]")


def is_number(value: Any) -> bool:
    """Whether JSON holds a finite number there."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list(values: Any) -> list[Any]:
    return [] if values is None else values.tolist()


def _class_target(row: Mapping[str, Any], size: Size) -> ClassTarget:
    label, aliases = row["label"], row.get("aliases") or []
    if not isinstance(label, str) or not label:
        raise ValueError(f"the label of the target is {label!r}, expected the name of a class")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError(f"aliases is {aliases!r}, expected a list of strings")
    return ClassTarget(label, aliases=tuple(aliases), image_size=size)


def _detection_target(row: Mapping[str, Any], size: Size) -> DetectionTarget:
    check_boxes(row["boxes"])
    frequency = row.get("frequency")
    if frequency not in (None, "r", "c", "f"):
        raise ValueError(f"frequency is {frequency!r}, expected r, c or f (LVIS), or null")
    return DetectionTarget(
        read_boxes(row["boxes"]),
        category=str(row.get("category") or ""),
        category_id=_category_id(row),
        areas=_areas(row, "areas"),
        ignore_boxes=read_boxes(row.get("ignore_boxes")),
        ignore_areas=_areas(row, "ignore_areas"),
        image_size=size,
        not_exhaustive=bool(row.get("not_exhaustive", False)),
        frequency=frequency,
    )


def _grounding_target(row: Mapping[str, Any], size: Size) -> GroundingTarget:
    check_boxes(row["boxes"])
    if not row["boxes"]:
        raise ValueError("the target has no boxes, expected at least one")
    regions = tuple(map(_region, row.get("regions") or ()))
    if regions and size is None:
        raise ValueError("the target has regions, and the row no image_size; expected [width, height] of the picture")
    return GroundingTarget(row["boxes"], expression=str(row.get("expression") or ""), image_size=size, regions=regions)


def _region(row: Mapping[str, Any]) -> Region:
    points = row["points"]
    if not isinstance(points, list) or not points:
        raise ValueError(f"the points of a region are {points!r}, expected a list of [x, y]")
    return Region(tuple((int(x), int(y)) for x, y in points), int(row.get("value", 1)))


def _presence_target(row: Mapping[str, Any], size: Size) -> PresenceTarget:
    if not isinstance(row["present"], bool):
        raise ValueError(f"present is {row['present']!r}, expected true or false")
    return PresenceTarget(row["present"], str(row.get("category") or ""), _category_id(row), size)


_READERS: dict[str, Any] = {
    "classification": _class_target,
    "detection": _detection_target,
    "grounding": _grounding_target,
    "presence": _presence_target,
}


def _category_id(row: Mapping[str, Any]) -> int:
    value = row["category_id"]
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"category_id is {value!r}, expected a whole number")
    if abs(int(value)) >= END_OF_CLASS_IDS:
        raise ValueError(f"category_id is {value!r}, expected one below 2^53, up to which floats tell them apart")
    return int(value)


def _areas(row: Mapping[str, Any], name: str) -> Tensor | None:
    values = row.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or not all(map(is_number, values)):
        raise ValueError(f"{name} is {values!r}, expected a list of finite numbers")
    return read_numbers(values)


__all__ = ["TARGETS", "check_boxes", "is_number", "read_boxes", "read_numbers", "read_target", "target_row"]
