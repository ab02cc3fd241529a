"""Questions as they are handed to an average precision, and the rows that its states keep of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EVERYTHING = -(2**63)  # the query of an update that asks for all classes at once
_PREDICTION = ("boxes", "scores", "labels")
_TARGET = ("boxes", "labels", "area", "iscrowd", "ignore")


class Question(NamedTuple):
    """One question.

    Attributes:
        image: key of the picture.
        query: what was asked.
        det: the tensors of `_PREDICTION`.
        gt: the tensors of `_TARGET`, None where one was not given.
        marks: (class, kind) pairs that say what is known of the picture beside its objects.
    """

    image: int
    query: int
    det: tuple[Any, ...]
    gt: tuple[Any, ...]
    marks: tuple[tuple[int, int], ...] = ()

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the boxes of detections and objects."""
        return self.det[0].dtype, self.gt[0].dtype


def read_question(pred: Mapping[str, Any], target: Mapping[str, Any], image: int) -> Question:
    """A question, checked as far as that needs no look at values.

    Raises:
        ValueError: something is missing or has another shape than expected, or tensors lie on different devices.
    """
    query = target.get("query")
    try:
        det = [_tensor(pred.get(name)) for name in _PREDICTION]
        gt = [_tensor(target.get(name)) for name in _TARGET]
        _check(det, _PREDICTION, 3)
        _check(gt, _TARGET, 2)
        devices = {tensor.device for tensor in (*det, *gt) if tensor is not None}
        if len(devices) > 1 or torch.device("meta") in devices:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"expected tensors on one device, with data, found them on {found}.")
    except (ValueError, TypeError) as error:
        raise ValueError(f"Image {target.get('image_id', 'without image_id')!r}: {error}") from error
    return Question(image, EVERYTHING if query is None else int(query), tuple(det), tuple(gt))


def _tensor(value: Any) -> Tensor | None:
    return value if value is None or isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


def _check(tensors: list[Tensor | None], names: Sequence[str], required: int) -> None:
    """Refuse what is missing or does not fit; boxes without any entry may have any shape."""
    for tensor, name in zip(tensors[:required], names, strict=False):
        if tensor is None:
            hint = " Give every box a score, such as 1." if name == "scores" else ""
            raise ValueError(f"expected {name}, found none.{hint}")
    boxes = tensors[0]
    assert boxes is not None
    if boxes.shape[-1:] != (4,) or boxes.ndim != 2:
        if boxes.numel():
            raise ValueError(f"expected boxes of shape [N, 4] (x1, y1, x2, y2), found {list(boxes.shape)}.")
        tensors[0] = boxes = boxes.reshape(0, 4)
    for tensor, name in zip(tensors[1:], names[1:], strict=True):
        if tensor is not None and tensor.shape != boxes.shape[:1]:
            raise ValueError(
                f"expected one of {name} per box, found shape {list(tensor.shape)} for {len(boxes)} boxes."
            )


class Pending:
    """Questions that are not yet rows: packing many at once costs a fraction of packing each."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int, int, int, int]] = []
        self._det: list[tuple[Tensor, ...]] = []
        self._gt: list[tuple[Tensor, ...]] = []
        self._marks: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        return bool(self._keys)

    def takes(self, questions: Sequence[Question]) -> bool:
        """Whether these questions have boxes of the dtypes of those that are here."""
        return not self._keys or self._dtypes == questions[0].dtypes

    def add(self, questions: Sequence[Question]) -> None:
        """Copy a batch of questions, so that the caller may go on writing into its tensors."""
        self._dtypes = questions[0].dtypes
        self._keys += [(q.image, q.query, len(q.det[0]), len(q.gt[0]), len(q.marks)) for q in questions]
        self._marks += [mark for q in questions for mark in q.marks]
        self._det.append(tuple(torch.cat(column) for column in zip(*(q.det for q in questions), strict=True)))
        self._gt.append(_joined([q.gt for q in questions]))

    def rows(self) -> dict[str, Tensor]:
        """The rows of each state."""
        boxes, scores, labels = (torch.cat(column) for column in zip(*self._det, strict=True))
        det = torch.cat([labels[:, None].double(), _xywh(boxes), scores[:, None].double()], 1)
        boxes, labels, area, crowd, ignore = (torch.cat(column) for column in zip(*self._gt, strict=True))
        gt_boxes = _xywh(boxes)
        # NaN: no area was given.
        area = torch.where(area.isnan(), gt_boxes[:, 2] * gt_boxes[:, 3], area)
        gt = torch.cat([labels[:, None].double(), gt_boxes, torch.stack([area, crowd, ignore], 1)], 1)
        keys, marks = (torch.tensor(rows, dtype=torch.int64) for rows in (self._keys, self._marks))
        return {"questions": keys, "det": det, "gt": gt, "marks": marks}


def _joined(targets: Sequence[tuple[Any, ...]]) -> tuple[Tensor, ...]:
    """The columns of some targets; what is optional in float64, NaN for an area and 0 for a mark not given."""
    boxes = [target[0] for target in targets]
    columns = [torch.cat(boxes), torch.cat([target[1] for target in targets])]
    for number, default in ((2, torch.nan), (3, 0.0), (4, 0.0)):
        given = [target[number] for target in targets]
        if all(value is None for value in given):
            columns.append(torch.full((len(columns[0]),), default, dtype=torch.float64, device=columns[0].device))
        else:
            parts = [
                box.new_full((len(box),), default, dtype=torch.float64) if value is None else value.double()
                for box, value in zip(boxes, given, strict=True)
            ]
            columns.append(torch.cat(parts))
    return tuple(columns)


def _xywh(boxes: Tensor) -> Tensor:
    """Corners as left, top, width, height: subtracted in the dtype of the input and then widened, like torchmetrics."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double()
