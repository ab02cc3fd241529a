"""Average precision, the part that COCO and LVIS share: what is kept of updates, and the tables that are evaluated.

Shape legend: N detections, M objects, Q questions, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from rft_lightning.errors import AnnotationError
from rft_lightning.metrics.ap_files import END_OF_CLASS_IDS, FileRows
from rft_lightning.metrics.ap_updates import EVERYTHING, Pending, read_batches
from rft_lightning.metrics.base import FlatMetric, first_of_each

# Up to this span class ids are looked up in a table, beyond it by bisection.
_LARGEST_TABLE = 1 << 20


@dataclass
class Tables:
    """What is evaluated: every question once, pictures ascending by id, the order of the update kept inside.

    Attributes:
        n_images: number of pictures.
        classes: [K] int64 ids that are evaluated, ascending.
        questions: [Q] int64, rows of the state `questions` that count.
        image: [Q] int64 position of the picture of each of them.
        det: [N, 6] float64 rows of the state.
        det_image: [N] int64 position of the picture.
        det_class: [N] int64 position of the class.
        gt: [M, 8] float64 rows of the state.
        gt_image: [M] int64.
        gt_class: [M] int64.
    """

    n_images: int
    classes: Tensor
    questions: Tensor
    image: Tensor
    det: Tensor
    det_image: Tensor
    det_class: Tensor
    gt: Tensor
    gt_image: Tensor
    gt_class: Tensor


def packed(name: str) -> property:
    """A state into which pending updates are packed as soon as somebody looks at it."""
    hidden = f"_packed_{name}"

    def look(self: AveragePrecision) -> Any:
        self._pack()
        return self.__dict__[hidden]

    return property(look, lambda self, value: self.__dict__.__setitem__(hidden, value))


class AveragePrecision(FlatMetric):
    """States and tables of the average precisions.

    The unit of evaluation is a *question*: a picture together with what was asked about it. A model that is asked for
    one category at a time makes several updates with the same ``image_id`` and different ``query`` (the category id);
    they are pooled into one picture. The same question twice (samplers repeat samples to fill the last batch) counts
    once. Without ``query`` an update covers all classes of its picture.

    A picture takes part as soon as one question about it was added: without objects its detections are false
    positives. Ties between scores are broken by image id, query and order in the update, so the result depends neither
    on the number of ranks nor on the order of updates.

    States: ``questions`` [Q, 5] int64 (image id, query, and how many detections, objects and marks it has), ``det``
    [N, 6] (class, x, y, w, h, score) and ``gt`` [M, 8] (class, x, y, w, h, area, crowd, ignore), float64; rows are in
    the order of the questions. The image id is no column of a float tensor, which could not hold every int64.

    Args:
        classes: class ids to evaluate; a label that is none of them is an error. None: all that occur.
        on_conflict: what to do where a question comes twice with different content: ``error``, or take the ``first``.
        **kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: unknown `on_conflict`, or a class id from 2**53 up.
    """

    higher_is_better = True
    questions = packed("questions")
    det = packed("det")
    gt = packed("gt")

    def __init__(
        self,
        *,
        classes: Sequence[int] | None = None,
        on_conflict: Literal["error", "first"] = "error",
        **kwargs: Any,
    ) -> None:
        self._pending = Pending()
        super().__init__(**kwargs)
        if on_conflict not in ("error", "first"):
            raise ValueError(f"Expected on_conflict to be error or first, found {on_conflict!r}.")
        self.class_ids = None if classes is None else sorted({int(number) for number in classes})
        _check_ends(self.class_ids or [])
        self.on_conflict = on_conflict
        self._image_names: dict[int, str] = {}  # never reset: forward() resets and then puts the old rows back
        self._add_rows_state("questions", 5, torch.int64)
        self._add_rows_state("det", 6)
        self._add_rows_state("gt", 8)

    def reset(self) -> None:
        """Forget all questions."""
        self._pending = Pending()
        super().reset()

    def update(self, preds: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add the answers to some questions.

        Nothing here waits for the device. Tensors are moved to the metric's device when it computes.

        Args:
            preds: per question ``boxes`` [N, 4] xyxy, ``scores`` [N] and ``labels`` [N].
            targets: per question ``boxes`` [M, 4] xyxy and ``labels`` [M]; optional ``area`` [M] (the box area; files
                hold the mask area), ``iscrowd`` [M] (0), ``ignore`` [M] (0), ``image_id`` (int or str; a new one each
                time, so that nothing is pooled or counted once) and ``query`` (int; see the class).

        Raises:
            ValueError: the lists, or the tensors of a question, do not fit together; names the picture.
        """
        check_lengths(preds, targets)
        if not targets:
            return
        batches = read_batches(preds, targets)
        images: list[Any] = [target.get("image_id") for target in targets]
        if set(map(type, images)) != {int} or max(map(abs, images)) >= 2**63:
            images = [self._image_key(image) for image in images]
        queries = [EVERYTHING if query is None else int(query) for query in (t.get("query") for t in targets)]
        marks = self._marks_of(targets)
        start = 0
        for batch in batches:
            # Corners are subtracted in their own dtype, whatever comes before, behind or beside them.
            if not self._pending.takes(batch):
                self._pack()
            here = slice(start, start + len(batch.n_det))
            self._pending.add(batch, (images[here], queries[here]), marks[here])
            start = here.stop

    def _image_key(self, image: Any) -> int:
        if isinstance(image, Tensor) and image.numel() == 1 and not image.is_floating_point():
            image = image.item()
        if not isinstance(image, Integral | str | None) or (isinstance(image, Integral) and abs(int(image)) >= 2**63):
            raise ValueError(f"Expected image_id to be a string or a whole number below 2**63, found {image!r}.")
        key = self._key(image if isinstance(image, str | None) else int(image))
        if isinstance(image, str):
            self._image_names[key] = image
        return key

    def _marks_of(self, targets: Sequence[Mapping[str, Any]]) -> list[Sequence[tuple[int, int]]]:
        """(class, kind) of what is known of each picture beside its objects."""
        return [()] * len(targets)

    def _add_file(self, rows: FileRows, n_marks: Sequence[int] | None = None) -> None:
        self._add_rows("questions", torch.from_numpy(rows.questions(n_marks)))
        self._add_rows("det", torch.from_numpy(rows.det))
        self._add_rows("gt", torch.from_numpy(rows.gt))
        self._update_count += 1

    def _pack(self) -> None:
        """Make rows of the states of what is pending."""
        if self._pending:
            pending, self._pending = self._pending, Pending()
            for name, rows in pending.rows().items():
                if name in self._defaults:
                    self._add_rows(name, rows)

    def _tables(self) -> Tables:
        questions, det, gt = self._rows("questions"), self._rows("det"), self._rows("gt")
        if _ascend(questions[:, 0], questions[:, 1]):
            kept = torch.arange(len(questions), device=questions.device)
        else:
            kept = first_of_each(questions[:, :2])
            if len(kept) < len(questions) and self.on_conflict == "error":
                self._check_repeats(questions, kept)
            det, gt = self._kept("det", kept), self._kept("gt", kept)
        images, image = questions[kept, 0].unique_consecutive(return_inverse=True)
        det_class, gt_class = det[:, 0].long(), gt[:, 0].long()
        if self.class_ids is None:
            classes = _distinct(torch.cat([det_class, gt_class]))
            _check_ends(classes[[0, -1]].tolist() if len(classes) else [])
        else:
            classes = torch.tensor(self.class_ids, dtype=torch.int64, device=det.device)
        tables = Tables(
            n_images=len(images),
            classes=classes,
            questions=kept,
            image=image,
            det=det,
            det_image=image.repeat_interleave(questions[kept, 2], output_size=len(det)),
            det_class=_positions(det_class, classes),
            gt=gt,
            gt_image=image.repeat_interleave(questions[kept, 3], output_size=len(gt)),
            gt_class=_positions(gt_class, classes),
        )
        if self.class_ids is not None:
            self._check_labels(tables, images)
        return tables

    def _sizes(self, questions: Tensor) -> dict[str, Tensor]:
        """State -> number of its rows for each question."""
        return {"det": questions[:, 2], "gt": questions[:, 3]}

    def _check_labels(self, tables: Tables, images: Tensor) -> None:
        for what, rows, position, image in (
            ("predictions", tables.det, tables.det_class, tables.det_image),
            ("targets", tables.gt, tables.gt_class, tables.gt_image),
        ):
            unknown = (position < 0).nonzero()[:, 0]
            if len(unknown):
                first = unknown[0]
                raise ValueError(
                    f"Expected labels among the {len(tables.classes)} declared classes, found "
                    f"{int(rows[first, 0])} in the {what} of image {self._name(int(images[image[first]]))}. Leave such "
                    "boxes out, or declare the class."
                )

    def _kept(self, name: str, kept: Tensor) -> Tensor:
        """The rows of a state that belong to some questions, in their order."""
        return self._rows(name)[segments(self._sizes(self._rows("questions"))[name], kept)]

    def _check_repeats(self, questions: Tensor, kept: Tensor) -> None:
        """Raise where a question that comes again has other rows than the first time."""
        keys = questions[:, :2]
        _, inverse = keys.unique(dim=0, return_inverse=True)
        first = kept[inverse]
        repeated = (first != torch.arange(len(first), device=first.device)).nonzero()[:, 0]
        first = first[repeated]
        differs = (questions[repeated, 2:] != questions[first, 2:]).any(1)
        same_size = (~differs).nonzero()[:, 0]
        for name, counts in self._sizes(questions).items():
            rows = self._rows(name)
            rows = rows if rows.ndim == 2 else rows[:, None]
            one, other = (rows[segments(counts, which[same_size])] for which in (repeated, first))
            owner = same_size.repeat_interleave(counts[repeated[same_size]])
            unlike = ((one != other) & ((one == one) | (other == other))).any(1)  # NaN is as NaN
            differs[owner[unlike]] = True
        if bool(differs.any()):
            image = int(questions[repeated[differs.nonzero()[0, 0]], 0])
            raise ValueError(
                f"Image {self._name(image)} was added twice with different content. Give every picture an image_id of "
                "its own and add it once, or set on_conflict to first."
            )

    def _name(self, key: int) -> str:
        """An image for an error message; strings are known on the rank that added them."""
        return repr(self._image_names[key]) if key in self._image_names else str(key)


def check_lengths(preds: Sequence[Any], targets: Sequence[Any]) -> None:
    """Raises ValueError where there is not one target for each prediction."""
    if len(preds) != len(targets):
        raise ValueError(f"Expected one target per prediction, found {len(targets)} for {len(preds)}.")


def _check_ends(classes: Sequence[int]) -> None:
    """Raise where class ids may not be what was given: as float64 two large ones are the same."""
    wrong = [number for number in classes if abs(number) >= END_OF_CLASS_IDS]
    if wrong:
        raise AnnotationError(
            f"Expected class ids (category_id) below 2**53, found {wrong[-1]}. Number the classes anew, in the "
            "annotations and in the results."
        )


def _ascend(first: Tensor, second: Tensor) -> bool:
    """Whether pairs of numbers stand in strictly ascending order."""
    later, same = first[1:] > first[:-1], first[1:] == first[:-1]
    return bool((later | (same & (second[1:] > second[:-1]))).all())


def segments(counts: Tensor, kept: Tensor) -> Tensor:
    """Row numbers of the segments `kept`, where segment i is `counts[i]` rows long and follows segment i - 1."""
    starts, lengths = (counts.cumsum(0) - counts)[kept], counts[kept]
    shift = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return shift + torch.arange(len(shift), device=counts.device)


def _distinct(values: Tensor) -> Tensor:
    """The distinct int64 values, ascending."""
    low, span = _low_and_span(values)
    if span > _LARGEST_TABLE:
        return values.unique()
    present = torch.zeros(span, dtype=torch.bool, device=values.device)
    present[values - low] = True
    return present.nonzero()[:, 0] + low


def _positions(values: Tensor, table: Tensor) -> Tensor:
    """Where values [N] stand in an ascending table [K]: [N] int64, -1 for those that do not."""
    low, span = _low_and_span(table)
    if span <= _LARGEST_TABLE:
        place = torch.full((span + 2,), -1, device=table.device)  # one beyond each end, for all that is outside
        place[table - low + 1] = torch.arange(len(table), device=table.device)
        return place.index_select(0, (values - (low - 1)).clamp_(0, span + 1))
    position = torch.searchsorted(table, values).clamp_(max=len(table) - 1)
    return position.masked_fill(table[position] != values, -1)


def _low_and_span(values: Tensor) -> tuple[int, int]:
    if not len(values):
        return 0, 0
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high - low + 1
