"""COCO box average precision.

Shape legend: N detections, M objects, Q questions, K classes, T IoU thresholds, R recall points, A area ranges.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft_lightning.errors import AnnotationError, DatasetNotFoundError
from rft_lightning.metrics.base import FlatMetric, SampleId, first_of_each, mean_or_absent

_EVERYTHING = -(2**63)  # the query of an update that asks for all classes at once
_AREAS = ("all", "small", "medium", "large")
_CAPS = (1, 10, 100)
_AP50, _AP75 = 0, 5  # positions of 0.50 and 0.75 among the IoU thresholds 0.50, 0.55, ..., 0.95


class COCOMeanAveragePrecision(FlatMetric):
    """COCO average precision and recall of boxes, with the numbers of pycocotools in float64.

    The unit of evaluation is a *question*: a picture together with what was asked about it. A model that is asked for
    one category at a time makes several updates with the same ``image_id`` and different ``query`` (the category id);
    they are pooled into one picture. The same question twice (samplers repeat samples to fill the last batch) counts
    once. Without ``query`` an update covers all classes of its picture.

    A picture takes part as soon as one question about it was added: without objects its detections are false
    positives. Ties between scores are broken by image id, query and order in the update, so the result depends neither
    on the number of ranks nor on the order of updates.

    States: ``questions`` [Q, 4] int64 (image id, query, number of detections, number of objects), ``det`` [N, 6]
    (class, x, y, w, h, score) and ``gt`` [M, 8] (class, x, y, w, h, area, crowd, ignore), float64; rows of ``det`` and
    ``gt`` are in the order of the questions. The image id is no column of a float tensor, which could not hold every
    int64.

    Args:
        classes: class ids to evaluate; others are dropped. None: all that occur.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, *, classes: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.class_ids = None if classes is None else sorted(set(classes))
        self._add_rows_state("questions", 4, torch.int64)
        self._add_rows_state("det", 6)
        self._add_rows_state("gt", 8)

    def update(self, preds: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add the answers to some questions.

        Args:
            preds: per question ``boxes`` [N, 4] xyxy, ``scores`` [N] and ``labels`` [N].
            targets: per question ``boxes`` [M, 4] xyxy and ``labels`` [M]; optional ``iscrowd`` [M] (0), ``area`` [M]
                (the box area; COCO files hold the mask area), ``image_id`` (int or str; a new one each time, so that
                nothing is pooled or counted once) and ``query`` (int; see the class).

        Raises:
            ValueError: the lists, or the tensors of a question, do not fit together.
        """
        if len(preds) != len(targets):
            raise ValueError(f"Expected one target per prediction, found {len(targets)} for {len(preds)}.")
        det = [self._detections(pred) for pred in preds]
        gt = [self._objects(target) for target in targets]
        for target, d, g in zip(targets, det, gt, strict=True):
            self._add_question(target.get("image_id"), target.get("query"), len(d), len(g))
        if det:
            self._add_rows("det", torch.cat(det))
            self._add_rows("gt", torch.cat(gt))

    def compute(self) -> dict[str, Tensor]:
        """The COCO summary.

        Returns:
            ``map map_50 map_75 map_small map_medium map_large mar_1 mar_10 mar_100 mar_small mar_medium mar_large``:
            float64 scalars in [0, 1], -1 where no object falls in the range. ``map_per_class`` [K] and ``classes`` [K]
            int64 (0-dimensional for a single class: torchmetrics squeezes results of one element).
        """
        det, gt, images, classes = self._tables()
        precision, recall = coco_precision_recall(det, gt, len(images), len(classes))
        return {**summarize(precision, recall), "classes": classes}

    @classmethod
    def from_coco_json(
        cls, gt: str | Path | Mapping[str, Any], results: str | Path | Sequence[Mapping[str, Any]], **kwargs: Any
    ) -> COCOMeanAveragePrecision:
        """A metric filled from files in COCO format.

        Boxes stay in the xywh of the files. All images of the ground truth take part; results of unknown categories
        are dropped.

        Args:
            gt: ground truth (path or content): ``images``, ``annotations``, ``categories``.
            results: list of ``image_id, category_id, bbox (xywh), score`` (path or content); may be empty.
            **kwargs: arguments of the class; ``classes`` are the categories of the file by default.

        Raises:
            DatasetNotFoundError: a file does not exist.
            AnnotationError: a file is no COCO file, or results name images that the ground truth does not have.
        """
        truth, found = _load(gt, "ground truth"), _load(results, "results")
        if not isinstance(truth, Mapping) or "images" not in truth or isinstance(found, Mapping):
            raise AnnotationError(
                "Expected a COCO ground truth (a dict with `images`, `annotations`, `categories`) and a list of "
                f"results, found {_outline(truth)} and {_outline(found)}; check the order of the two arguments."
            )
        if "categories" in truth:
            kwargs.setdefault("classes", [category["id"] for category in truth["categories"]])
        metric = cls(**kwargs)
        metric._fill(truth, found)
        return metric

    def _fill(self, truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> None:
        ids = sorted({image["id"] for image in truth["images"]})
        by_image: dict[Any, tuple[list, list]] = {image: ([], []) for image in ids}
        unknown = {result["image_id"] for result in found} - set(ids)
        if unknown:
            raise AnnotationError(
                f"The results name {len(unknown)} images that the ground truth does not have, for example "
                f"{min(unknown, key=str)!r}; evaluate them against the split they were made for."
            )
        for result in found:
            by_image[result["image_id"]][0].append([result["category_id"], *result["bbox"], result["score"]])
        for note in truth.get("annotations", ()):
            if note["image_id"] in by_image:
                by_image[note["image_id"]][1].append(_object_row(note))
        integers = all(isinstance(image, int) for image in ids)
        for position, image in enumerate(ids):  # positions keep the file's order of string ids, hashes would not
            det, gt = by_image[image]
            self._add_question(image if integers else position, None, len(det), len(gt))
        self._add_rows("det", [row for det, _ in by_image.values() for row in det])
        self._add_rows("gt", [row for _, gt in by_image.values() for row in gt])
        self._update_count += 1

    def _add_question(self, image: SampleId | Tensor | None, query: int | None, found: int, objects: int) -> None:
        image = int(image) if isinstance(image, Tensor) else image
        self._add_rows("questions", [[self._key(image), _EVERYTHING if query is None else int(query), found, objects]])

    def _detections(self, pred: Mapping[str, Any]) -> Tensor:
        columns = self._columns(pred, "boxes", "labels", "scores")
        return torch.cat([columns["labels"][:, None], columns["boxes"], columns["scores"][:, None]], 1)

    def _objects(self, target: Mapping[str, Any]) -> Tensor:
        optional = [name for name in ("area", "iscrowd") if target.get(name) is not None]
        columns = self._columns(target, "boxes", "labels", *optional)
        boxes = columns["boxes"]
        area = columns.get("area", boxes[:, 2] * boxes[:, 3])
        crowd = columns.get("iscrowd", torch.zeros_like(area))
        return torch.cat([columns["labels"][:, None], boxes, torch.stack([area, crowd, crowd], 1)], 1)

    def _columns(self, item: Mapping[str, Any], *names: str) -> dict[str, Tensor]:
        """The named entries as float64 on the metric's device, the boxes as xywh."""
        missing = [name for name in names if name not in item]
        if missing:
            raise ValueError(f"Expected the keys {list(names)}, found {sorted(item)}; {missing} missing.")
        boxes = torch.as_tensor(item["boxes"], device=self.device).reshape(-1, 4)
        # Subtracted in the dtype of the input and widened afterwards, as torchmetrics does.
        columns = {"boxes": torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).double()}
        for name in names[1:]:
            columns[name] = torch.as_tensor(item[name], device=self.device).reshape(-1).double()
            if len(columns[name]) != len(boxes):
                raise ValueError(f"Expected one of {name} per box, found {len(columns[name])} for {len(boxes)} boxes.")
        return columns

    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is evaluated: every question once, pictures ascending by id, order of the update kept inside.

        Returns:
            det [N, 7] (image, class, x, y, w, h, score) and gt [M, 9] (image, class, x, y, w, h, area, crowd, ignore),
            where image and class are positions in the ascending tables `images` and `classes` that follow.
        """
        questions = self._rows("questions")
        kept = first_of_each(questions[:, :2])
        images, image = questions[kept, 0].unique(return_inverse=True)
        det = self._rows("det")[_segments(questions[:, 2], kept)]
        gt = self._rows("gt")[_segments(questions[:, 3], kept)]
        if self.class_ids is None:
            classes = torch.cat([det[:, 0], gt[:, 0]]).unique()
        else:
            classes = torch.tensor(self.class_ids, dtype=torch.float64, device=det.device)
        det = _placed(det, image.repeat_interleave(questions[kept, 2]), classes)
        gt = _placed(gt, image.repeat_interleave(questions[kept, 3]), classes)
        return det, gt, images, classes.long()


def coco_precision_recall(det: Tensor, gt: Tensor, n_images: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """COCO's precision [T, R, K, A] at 100 detections and recall [T, K, A, 3] at 1, 10 and 100, by pycocotools.

    Args:
        det: [N, 7] float64 (image, class, x, y, w, h, score); image and class are positions from 0.
        gt: [M, 9] float64 (image, class, x, y, w, h, area, crowd, ignore).
        n_images: number of pictures, empty ones included.
        n_classes: number of classes K.

    Returns:
        float64 tensors on the device of `det`, -1 where a class has no object in an area range.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()  # loadRes would crash on an empty list of results
        for coco, rows in ((truth, gt), (found, det)):
            coco.dataset = {
                "images": [{"id": image + 1} for image in range(n_images)],
                "categories": [{"id": category + 1} for category in range(n_classes)],
                "annotations": [_annotation(number, row) for number, row in enumerate(rows.tolist(), start=1)],
            }
            coco.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = torch.from_numpy(evaluation.eval["precision"][..., -1])
    return precision.to(det.device), torch.from_numpy(evaluation.eval["recall"]).to(det.device)


def summarize(precision: Tensor, recall: Tensor) -> dict[str, Tensor]:
    """COCO's twelve numbers and the AP of each class from precision [T, R, K, A] and recall [T, K, A, 3].

    Each is the mean over the entries that are not -1, or -1 if there is none.
    """
    result = {"map": _mean(precision[..., 0])}
    result["map_50"], result["map_75"] = _mean(precision[_AP50, ..., 0]), _mean(precision[_AP75, ..., 0])
    for position, name in enumerate(_AREAS[1:], start=1):
        result[f"map_{name}"] = _mean(precision[..., position])
    for position, cap in enumerate(_CAPS):
        result[f"mar_{cap}"] = _mean(recall[:, :, 0, position])
    for position, name in enumerate(_AREAS[1:], start=1):
        result[f"mar_{name}"] = _mean(recall[:, :, position, -1])
    classes = range(precision.shape[2])
    per_class = [_mean(precision[:, :, k, 0]) for k in classes]
    result["map_per_class"] = torch.stack(per_class) if per_class else precision.new_zeros(0)
    return result


def _mean(values: Tensor) -> Tensor:
    return mean_or_absent(values[values > -1])


def _segments(counts: Tensor, kept: Tensor) -> Tensor:
    """Row numbers of the segments `kept`, where segment i is `counts[i]` rows long and follows segment i - 1."""
    starts, lengths = (counts.cumsum(0) - counts)[kept], counts[kept]
    shift = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return shift + torch.arange(len(shift), device=counts.device)


def _placed(rows: Tensor, image: Tensor, classes: Tensor) -> Tensor:
    """Rows of known classes, with a first column for the image and the class as its position in `classes`."""
    known = torch.isin(rows[:, 0], classes)
    rows, image = rows[known], image[known]
    position = torch.searchsorted(classes, rows[:, 0].contiguous())
    return torch.cat([image[:, None].double(), position[:, None].double(), rows[:, 1:]], 1)


def _annotation(number: int, row: list[float]) -> dict[str, Any]:
    """One row of either table for pycocotools; numbered from 1, for which an object with id 0 is never matched."""
    x, y, w, h = row[2:6]
    note: dict[str, Any] = {"id": number, "image_id": int(row[0]) + 1, "category_id": int(row[1]) + 1}
    note.update(bbox=[x, y, w, h], area=w * h, iscrowd=0)
    if len(row) == 9:
        note.update(area=row[6], iscrowd=int(row[7]))
    else:
        note["score"] = row[6]
    return note


def _object_row(note: Mapping[str, Any]) -> list[float]:
    x, y, w, h = note["bbox"]
    crowd = float(note.get("iscrowd", 0))  # COCO overwrites a file's own `ignore` by `iscrowd`
    return [note["category_id"], x, y, w, h, note.get("area", w * h), crowd, crowd]


def _load(source: Any, what: str) -> Any:
    if not isinstance(source, str | Path):
        return source
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f"The COCO {what} {source} does not exist; check the path.") from error
    except json.JSONDecodeError as error:
        raise AnnotationError(f"The COCO {what} {source} is no JSON file ({error}); write it again.") from error


def _outline(content: Any) -> str:
    return f"a dict with {sorted(map(str, content))[:5]}" if isinstance(content, Mapping) else "a list"


__all__ = ["COCOMeanAveragePrecision", "coco_precision_recall", "summarize"]
