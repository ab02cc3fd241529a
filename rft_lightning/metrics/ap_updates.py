"""Questions as they are handed to an average precision, and the rows that its states keep of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

EVERYTHING = -(2**63)  # the query of an update that asks for all classes at once
_PREDICTION = {"boxes": True, "scores": True, "labels": True}  # name -> required
_TARGET = {"boxes": True, "labels": True, "area": False, "iscrowd": False, "ignore": False}

_BOXES = itemgetter("boxes")

Items = Sequence[Mapping[str, Any]]
Columns = tuple[Tensor | None, ...]


class Batch(NamedTuple):
    """Some questions, their tensors behind one another.

    Attributes:
        n_det: detections of each.
        n_gt: objects of each.
        det: boxes [N, 4] xyxy, scores [N], labels [N].
        gt: boxes [M, 4] xyxy, labels [M]; area, iscrowd, ignore [M], or None.
        kind: what batches that are packed together have in common: dtypes of the boxes, device, optional columns.
    """

    n_det: list[int]
    n_gt: list[int]
    det: Columns
    gt: Columns
    kind: tuple[Any, ...]


def read_batches(preds: Items, targets: Items) -> list[Batch]:
    """The questions of an update: one batch, or a batch for each question where they do not go together.

    Raises:
        ValueError: something is missing or has another shape than expected, or tensors lie on different devices; names
            the picture.
    """
    try:
        return [_joined(preds, targets)]
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError):
        # One by one: each as a tensor, and what is wrong with one by name.
        pairs = zip(preds, targets, strict=True)
        return [_joined(*([item] for item in _checked_pair(pred, target))) for pred, target in pairs]


def _joined(preds: Items, targets: Items) -> Batch:
    n_det, det = _columns(preds, _PREDICTION)
    n_gt, gt = _columns(targets, _TARGET)
    given = [column for column in (*det, *gt) if column is not None]
    if len({column.device for column in given}) > 1:
        raise ValueError
    kind = (given[0].dtype, given[len(det)].dtype, given[0].device, *(column is None for column in gt))
    return Batch(n_det, n_gt, det, gt, kind)


def _columns(items: Items, names: Mapping[str, bool]) -> tuple[list[int], Columns]:
    """Sizes and joined columns; raises something where the items are not all alike."""
    # There are as many calls as pictures: hence no loop in Python where map does.
    boxes: list[Tensor] = list(map(_BOXES, items))
    joined = torch.cat(boxes)
    if joined.shape[1:] != (4,) or joined.is_meta or len({box.dtype for box in boxes}) > 1:
        raise ValueError
    sizes = [count // 4 for count in map(Tensor.numel, boxes)]
    columns: list[Tensor | None] = [joined]
    for name, required in names.items():
        if name == "boxes":
            continue
        values: list[Any] = [item.get(name) for item in items]
        if not required and values[0] is None:
            if set(map(type, values)) != {type(None)}:
                raise ValueError
            columns.append(None)
            continue
        joined = torch.cat(values)
        if joined.ndim != 1 or list(map(Tensor.numel, values)) != sizes:
            raise ValueError
        if name == "labels" and joined.is_floating_point():
            raise ValueError
        columns.append(joined)
    return sizes, tuple(columns)


def _checked_pair(pred: Mapping[str, Any], target: Mapping[str, Any]) -> list[dict[str, Tensor | None]]:
    """The entries of one question as tensors.

    Raises:
        ValueError: see :func:`read_batches`.
    """
    where = f"Image {target.get('image_id', 'without image_id')!r}"
    found = [_checked(pred, _PREDICTION, where), _checked(target, _TARGET, where)]
    devices = {tensor.device for item in found for tensor in item.values() if tensor is not None}
    if len(devices) > 1 or torch.device("meta") in devices:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{where}: expected tensors on one device, with data, found them on {names}.")
    return found


def _checked(item: Mapping[str, Any], names: Mapping[str, bool], where: str) -> dict[str, Tensor | None]:
    tensors = {name: _tensor(item.get(name), f"{where}: {name}") for name in names}
    for name, required in names.items():
        if required and tensors[name] is None:
            hint = " Give every box a score, such as 1." if name == "scores" else ""
            raise ValueError(f"{where}: expected {name}, found none.{hint}")
    boxes = tensors["boxes"]
    assert boxes is not None
    if boxes.numel() == 0:
        tensors["boxes"] = boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{where}: expected boxes of shape [N, 4] (x1, y1, x2, y2), found {list(boxes.shape)}.")
    for name, tensor in tensors.items():
        if name != "boxes" and tensor is not None and tensor.shape != boxes.shape[:1]:
            shape = list(tensor.shape)
            raise ValueError(f"{where}: expected {name} of shape [{len(boxes)}], one per box, found {shape}.")
    labels = tensors["labels"]
    if labels is not None and labels.is_floating_point():
        if labels.numel():
            raise ValueError(f"{where}: expected labels as whole numbers (int64), found {labels.dtype}.")
        tensors["labels"] = labels.long()
    return tensors


def _tensor(value: Any, where: str) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=None if where.endswith("labels") else torch.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} are no numbers ({error}).") from error


class Pending:
    """Questions that are not yet rows: packing many at once costs a fraction of packing each."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int, int, int, int]] = []
        self._marks: list[tuple[int, int]] = []
        self._batches: list[Batch] = []

    def __bool__(self) -> bool:
        return bool(self._keys)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch can be packed with those that are here."""
        return not self._batches or self._batches[-1].kind == batch.kind

    def add(
        self, batch: Batch, keys: tuple[Sequence[int], Sequence[int]], marks: Sequence[Sequence[tuple[int, int]]]
    ) -> None:
        """Add a batch with the images and queries of its questions, and what is known of each beside its objects."""
        images, queries = keys
        self._keys += zip(images, queries, batch.n_det, batch.n_gt, map(len, marks), strict=True)
        self._marks += chain.from_iterable(marks)
        self._batches.append(batch)

    def rows(self) -> dict[str, Tensor]:
        """The rows of each state."""
        det, gt = ([_cat(column) for column in zip(*some, strict=True)] for some in self._sides())
        boxes, scores, labels = det
        found = _rows(6, labels, boxes)
        found[:, 5] = scores
        boxes, labels, area, crowd, ignore = gt
        truth = _rows(8, labels, boxes)
        truth[:, 5] = truth[:, 3] * truth[:, 4] if area is None else area
        for place, column in ((6, crowd), (7, ignore)):
            truth[:, place] = 0 if column is None else column
        keys, known = (torch.from_numpy(np.array(rows, dtype=np.int64)) for rows in (self._keys, self._marks))
        return {"questions": keys, "det": found, "gt": truth, "marks": known}

    def _sides(self) -> tuple[list[Columns], list[Columns]]:
        return [batch.det for batch in self._batches], [batch.gt for batch in self._batches]


def _cat(column: Sequence[Tensor | None]) -> Any:
    return None if column[0] is None else torch.cat(column)  # type: ignore[arg-type]


def _rows(columns: int, labels: Tensor, boxes: Tensor) -> Tensor:
    """Rows [N, columns] that begin with label, left, top, width and height; what follows is not yet written.

    Corners are subtracted in the dtype of the input and then widened, as torchmetrics does.
    """
    rows = boxes.new_empty(len(boxes), columns, dtype=torch.float64)
    rows[:, 0] = labels
    rows[:, 1:3] = boxes[:, :2]
    rows[:, 3:5] = boxes[:, 2:] - boxes[:, :2]
    return rows
