"""LVIS average precision of boxes.

Shape legend: N detections, M objects, K classes, T IoU thresholds, R recall points, A area ranges, P marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rft_lightning.metrics.ap_evaluation import Detections, Objects, evaluate
from rft_lightning.metrics.ap_files import read_files
from rft_lightning.metrics.ap_matching import falling
from rft_lightning.metrics.ap_summary import (
    mean_by,
    mean_of_classes,
    mean_present,
    summarize_precision,
    summarize_recall,
)
from rft_lightning.metrics.ap_tables import AveragePrecision, Tables, packed

MAX_DETECTIONS = 300  # of a picture, over all classes
FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}
_NEGATIVE, _NOT_EXHAUSTIVE = 0, 1  # kinds of marks; others are the letter of a frequency


class LVISAveragePrecision(AveragePrecision):
    """LVIS average precision: the numbers of lvis-api, in float64, computed on the metric's device.

    LVIS is federated: of a picture it is known for some classes that they are absent, and for some that not all of
    their objects are annotated. Detections count only of classes that have an object in the picture or are known to be
    absent; where not all objects are annotated, a detection that matches none is ignored. The 300 detections of a
    picture with the highest scores take part, over all classes. Boxes and objects without area do not.

    What counts as one picture, and how ties are broken, see :class:`rft_lightning.metrics.ap_tables.AveragePrecision`.

    Args:
        frequency: class id -> ``r``, ``c`` or ``f``; None: as the targets say. Without any there is no ``map_rare
            map_common map_frequent``.
        classes: class ids to evaluate; a label that is none of them is an error. None: all that occur.
        selected: class ids whose average precisions are averaged as ``map_selected``.
        protocol: ``lvis``, or ``published_code``: the authors' notebook averages the precision of a class over all four
            area ranges, not over that of all areas. Then ``map_per_class`` is that, and ``map`` and ``map_selected``
            are means of it over classes that have objects; the other numbers stay LVIS's.
        arrays: whether `compute` returns the arrays of precision and recall, too.
        on_conflict: what to do where a question comes twice with different content: ``error``, or take the ``first``.
        **kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an option is unknown.
    """

    marks = packed("marks")

    def __init__(
        self,
        *,
        frequency: Mapping[int, str] | None = None,
        classes: Sequence[int] | None = None,
        selected: Sequence[int] | None = None,
        protocol: Literal["lvis", "published_code"] = "lvis",
        arrays: bool = False,
        on_conflict: Literal["error", "first"] = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(classes=classes, on_conflict=on_conflict, **kwargs)
        if protocol not in ("lvis", "published_code"):
            raise ValueError(f"Expected protocol to be lvis or published_code, found {protocol!r}.")
        unknown = sorted(set((frequency or {}).values()) - set(FREQUENCIES.values()))
        if unknown:
            raise ValueError(f"Expected frequencies r, c and f, found {', '.join(map(repr, unknown))}.")
        self.frequency = None if frequency is None else dict(frequency)
        self.selected = None if selected is None else list(selected)
        self.protocol, self.arrays = protocol, arrays
        self._add_rows_state("marks", 2, torch.int64)

    def update(self, preds: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add the answers to some questions. Nothing here waits for the device.

        Args:
            preds: per question ``boxes`` [N, 4] xyxy, ``scores`` [N] and ``labels`` [N].
            targets: per question ``boxes`` [M, 4] xyxy and ``labels`` [M]; ``neg_labels`` and
                ``not_exhaustive_labels``: class ids that are known to be absent from the picture, and those of which
                not all objects are annotated (none); optional ``area`` [M] (the box area; files hold the mask area),
                ``ignore`` [M] (0), ``image_id`` (int or str; a new one each time, so that nothing is pooled or counted
                once), ``query`` (int, the class that was asked for) and ``frequency`` (class id -> letter, where the
                metric was given none).

        Raises:
            ValueError: the lists, or the tensors of a question, do not fit together; names the picture.
        """
        super().update(preds, targets)

    def compute(self) -> dict[str, Tensor]:
        """The LVIS summary.

        Returns:
            ``map map_50 map_75 map_small map_medium map_large mar_300 mar_small mar_medium mar_large`` and, with
            `frequency`, ``map_rare map_common map_frequent``: float64 scalars in [0, 1], -1 where no object falls in
            the range. ``map_per_class`` [K] and ``classes`` [K] int64 (0-dimensional for a single class: torchmetrics
            squeezes results of one element). With `selected`, ``map_selected``: the mean over those of them that have
            objects. With `arrays`, ``precision`` [T, R, K, A] and ``recall`` [T, K, A]; areas all, small, medium,
            large.

        Raises:
            ValueError: a label outside of `classes`, or an image that was added twice with different content.
        """
        tables = self._tables()
        precision, recall = self._evaluate(tables)
        areas: Any = precision if self.protocol == "published_code" else precision[..., :1]
        per_class = mean_by(areas, (0, 1, 3))
        result = summarize_precision(precision)
        if self.protocol == "published_code":
            result["map"] = mean_present(per_class)
        frequency = self.frequency or self._known_frequency()
        if frequency:
            letters = [frequency.get(number) for number in tables.classes.tolist()]
            for name, letter in FREQUENCIES.items():
                chosen = torch.tensor([found == letter for found in letters], dtype=torch.bool, device=precision.device)
                result[f"map_{name}"] = mean_present(precision[:, :, chosen, 0])
        result |= summarize_recall(recall, (MAX_DETECTIONS,))
        if self.selected is not None:
            result["map_selected"] = mean_of_classes(per_class, tables.classes, self.selected)
        if self.arrays:
            result |= {"precision": precision, "recall": recall[..., 0]}
        return {**result, "map_per_class": per_class, "classes": tables.classes}

    @classmethod
    def from_lvis_json(
        cls, gt: str | Path | Mapping[str, Any], results: str | Path | Sequence[Mapping[str, Any]], **kwargs: Any
    ) -> LVISAveragePrecision:
        """A metric filled from files in LVIS format.

        Boxes stay in the xywh of the files. All images of the ground truth take part; results of unknown categories
        are dropped.

        Args:
            gt: ground truth (path or content): ``images`` with ``neg_category_ids`` and
                ``not_exhaustive_category_ids``, ``annotations``, ``categories`` with ``frequency``.
            results: list of ``image_id, category_id, bbox (xywh), score`` (path or content); may be empty.
            **kwargs: arguments of the class; ``classes`` are the categories of the file by default, and of others
                neither results nor annotations count.

        Raises:
            DatasetNotFoundError: a file does not exist.
            AnnotationError: a file is no LVIS file, or results name images that the ground truth does not have.
        """
        metric = cls(**kwargs)
        rows = read_files(gt, results, classes=metric.class_ids, what="LVIS", most_per_image=MAX_DETECTIONS)
        metric.class_ids = rows.classes
        letters = {number: info["frequency"] for number, info in rows.categories.items() if "frequency" in info}
        if metric.frequency is None and letters:
            metric.frequency = letters
        kept = None if rows.classes is None else set(rows.classes)
        marks = [_marks(info, "neg_category_ids", "not_exhaustive_category_ids", kept) for info in rows.infos]
        metric._add_file(rows, [len(some) for some in marks])
        metric._add_rows("marks", [mark for some in marks for mark in some])
        return metric

    def _marks_of(self, targets: Sequence[Mapping[str, Any]]) -> list[Sequence[tuple[int, int]]]:
        known = (_marks(target, "neg_labels", "not_exhaustive_labels", None) for target in targets)
        return [(*marks, *_frequencies(target)) for marks, target in zip(known, targets, strict=True)]

    def _known_frequency(self) -> dict[int, str]:
        """What the targets say."""
        kinds = {ord(letter): letter for letter in FREQUENCIES.values()}
        return {number: kinds[kind] for number, kind in self._rows("marks").unique(dim=0).tolist() if kind in kinds}

    def _sizes(self, questions: Tensor) -> dict[str, Tensor]:
        return {**super()._sizes(questions), "marks": questions[:, 4]}

    def _evaluate(self, tables: Tables) -> tuple[Tensor, Tensor]:
        n_classes = len(tables.classes)
        area = tables.gt[:, 5]
        kept_gt = _with_area(area)
        gt_image, gt_class = (values.index_select(0, kept_gt) for values in (tables.gt_image, tables.gt_class))
        rows = tables.gt.index_select(0, kept_gt)
        none = torch.zeros_like(gt_image, dtype=torch.bool)
        gt = Objects(gt_image, gt_class, rows[:, 1:5], rows[:, 5].contiguous(), none, rows[:, 7] > 0)
        asked, exempt = self._known(tables, gt)
        pair = tables.det_image * n_classes + tables.det_class
        side = tables.det[:, 1:5]
        det_area = side[:, 2] * side[:, 3]
        counts = (det_area > 0) & (det_area < torch.inf) & _within_cap(tables) & asked[pair]
        kept = counts.nonzero()[:, 0]
        det = Detections(
            image=tables.det_image.index_select(0, kept),
            classes=tables.det_class.index_select(0, kept),
            boxes=side.index_select(0, kept),
            area=det_area.index_select(0, kept),
            score=tables.det[:, 5].index_select(0, kept),
            exempt=exempt[pair.index_select(0, kept)],
        )
        return evaluate(det, gt, tables.n_images, n_classes, caps=(MAX_DETECTIONS,))

    def _known(self, tables: Tables, gt: Objects) -> tuple[Tensor, Tensor]:
        """For each picture and class, flat: do detections count; are not all objects annotated."""
        n_classes, marks = len(tables.classes), self._kept("marks", tables.questions)
        image = tables.image.repeat_interleave(self._rows("questions")[tables.questions, 4])
        position = torch.searchsorted(tables.classes, marks[:, 0].contiguous()).clamp(max=max(n_classes - 1, 0))
        asked, exempt = torch.zeros(2, tables.n_images * n_classes, dtype=torch.bool, device=marks.device)
        if n_classes:
            known = tables.classes[position] == marks[:, 0]
            for table, kind in ((asked, _NEGATIVE), (exempt, _NOT_EXHAUSTIVE)):
                chosen = known & (marks[:, 1] == kind)
                table[(image * n_classes + position)[chosen]] = True
            asked[gt.image * n_classes + gt.classes] = True
        return asked, exempt


def _marks(
    source: Mapping[str, Any], negative: str, not_exhaustive: str, classes: set[int] | None
) -> tuple[tuple[int, int], ...]:
    """(class, kind) of what a picture states about classes."""
    return tuple(
        (int(number), kind)
        for name, kind in ((negative, _NEGATIVE), (not_exhaustive, _NOT_EXHAUSTIVE))
        for number in _numbers(source.get(name))
        if classes is None or int(number) in classes
    )


def _frequencies(target: Mapping[str, Any]) -> list[tuple[int, int]]:
    frequency = target.get("frequency") or {}
    if not set(frequency.values()) <= set(FREQUENCIES.values()):
        where = f"Image {target.get('image_id', 'without image_id')!r}"
        raise ValueError(f"{where}: expected frequencies r, c and f, found {frequency}.")
    return [(int(number), ord(letter)) for number, letter in frequency.items()]


def _numbers(values: Any) -> Sequence[int]:
    if values is None:
        return ()
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else values


def _with_area(area: Tensor) -> Tensor:
    return ((area > 0) & (area < torch.inf)).nonzero()[:, 0]


def _within_cap(tables: Tables) -> Tensor:
    """[N] whether a detection is among those of the highest scores of its picture; ties by the order of writing."""
    counts = torch.bincount(tables.det_image, minlength=tables.n_images)
    if not len(counts) or int(counts.max()) <= MAX_DETECTIONS:
        return torch.ones_like(tables.det_image, dtype=torch.bool)
    by_score = falling(tables.det[:, 5])
    by_image = by_score[torch.sort(tables.det_image[by_score], stable=True).indices]
    rank = torch.arange(len(by_image), device=by_image.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    kept = torch.empty_like(rank, dtype=torch.bool)
    kept[by_image] = rank < MAX_DETECTIONS
    return kept
