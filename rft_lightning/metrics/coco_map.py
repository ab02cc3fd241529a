"""COCO average precision of boxes and masks.

Shape legend: N detections, M objects, H x W pixels, K classes, T IoU thresholds, R recall points, A area ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rft_lightning.metrics.ap_evaluation import Detections, Objects, evaluate
from rft_lightning.metrics.ap_files import file_masks, read_files
from rft_lightning.metrics.ap_masks import mask_edges, mask_overlaps
from rft_lightning.metrics.ap_matching import Edges
from rft_lightning.metrics.ap_summary import (
    mean_by,
    mean_of_classes,
    summarize_precision,
    summarize_recall,
)
from rft_lightning.metrics.ap_tables import AveragePrecision, Tables, check_lengths

CAPS = (1, 10, 100)


class COCOMeanAveragePrecision(AveragePrecision):
    """COCO average precision and recall: the numbers of pycocotools, in float64, computed on the metric's device.

    What counts as one picture, and how ties are broken, see :class:`rft_lightning.metrics.ap_tables.AveragePrecision`.

    Args:
        classes: class ids to evaluate; a label that is none of them is an error. None: all that occur.
        selected: class ids whose average precisions are averaged as ``map_selected``.
        iou_type: ``bbox``, or ``segm`` for masks.
        arrays: whether `compute` returns the arrays of precision and recall, too.
        on_conflict: what to do where a question comes twice with different content: ``error``, or take the ``first``.
        **kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an option is unknown.
    """

    def __init__(
        self,
        *,
        classes: Sequence[int] | None = None,
        selected: Sequence[int] | None = None,
        iou_type: Literal["bbox", "segm"] = "bbox",
        arrays: bool = False,
        on_conflict: Literal["error", "first"] = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(classes=classes, on_conflict=on_conflict, **kwargs)
        if iou_type not in ("bbox", "segm"):
            raise ValueError(f"Expected iou_type to be bbox or segm, found {iou_type!r}.")
        self.selected = None if selected is None else list(selected)
        self.iou_type, self.arrays = iou_type, arrays
        if iou_type == "segm":  # of each question, what no sum over boxes can tell
            self._add_rows_state("overlaps")
            self._add_rows_state("mask_area")

    def update(self, preds: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add the answers to some questions. Nothing here waits for the device.

        Args:
            preds: per question ``boxes`` [N, 4] xyxy (for ``segm`` ``masks`` [N, H, W], true on the object; boxes are
                not looked at then, and an area is that of the mask), ``scores`` [N] and ``labels`` [N].
            targets: per question ``boxes`` [M, 4] xyxy (``masks`` [M, H, W]) and ``labels`` [M]; optional ``iscrowd``
                [M] (0), ``area`` [M] (that of box or mask; COCO files hold the mask area), ``image_id`` (int or str; a
                new one each time, so that nothing is pooled or counted once) and ``query`` (int, the class that was
                asked for).

        Raises:
            ValueError: the lists, or the tensors of a question, do not fit together; names the picture.
        """
        if self.iou_type == "segm":
            self._update_masks(preds, targets)
        else:
            super().update(preds, targets)

    def _update_masks(self, preds: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        check_lengths(preds, targets)
        for pred, target in zip(preds, targets, strict=True):
            overlaps, area, true_area = mask_overlaps(pred, target)
            given = true_area if target.get("area") is None else target["area"]
            # No box is looked at.
            found = {**pred, "boxes": area.new_zeros(len(area), 4)}
            super().update([found], [{**target, "area": given, "boxes": area.new_zeros(len(true_area), 4)}])
            self._add_rows("overlaps", overlaps)
            self._add_rows("mask_area", area)

    def compute(self) -> dict[str, Tensor]:
        """The COCO summary.

        Returns:
            ``map map_50 map_75 map_small map_medium map_large mar_1 mar_10 mar_100 mar_small mar_medium mar_large``:
            float64 scalars in [0, 1], -1 where no object falls in the range. ``map_per_class`` [K] and ``classes`` [K]
            int64 (0-dimensional for a single class: torchmetrics squeezes results of one element). With `selected`,
            ``map_selected``: the mean over those of them that have objects. With `arrays`, ``precision`` [T, R, K, A]
            at 100 detections and ``recall`` [T, K, A, 3] at 1, 10 and 100; areas all, small, medium, large.

        Raises:
            ValueError: a label outside of `classes`, or an image that was added twice with different content.
        """
        tables = self._tables()
        precision, recall = self._evaluate(tables)
        per_class = mean_by(precision[..., 0], (0, 1))
        result = {**summarize_precision(precision), **summarize_recall(recall, CAPS)}
        if self.selected is not None:
            result["map_selected"] = mean_of_classes(per_class, tables.classes, self.selected)
        if self.arrays:
            result |= {"precision": precision, "recall": recall}
        return {**result, "map_per_class": per_class, "classes": tables.classes}

    @classmethod
    def from_coco_json(
        cls,
        gt: str | Path | Mapping[str, Any],
        results: str | Path | Sequence[Mapping[str, Any]],
        *,
        iou_type: Literal["bbox", "segm"] = "bbox",
        **kwargs: Any,
    ) -> COCOMeanAveragePrecision:
        """A metric filled from files in COCO format.

        Boxes stay in the xywh of the files. All images of the ground truth take part; results of unknown categories
        are dropped, as pycocotools does. Masks are polygons or run lengths and are compared by pycocotools' mask
        functions; as there, the area of a detection is that of its box if the first result has one.

        Args:
            gt: ground truth (path or content): ``images``, ``annotations``, ``categories``.
            results: list of ``image_id, category_id, bbox (xywh) or segmentation, score`` (path or content); may be
                empty.
            iou_type: ``bbox`` or ``segm``.
            **kwargs: arguments of the class; ``classes`` are the categories of the file by default, and of others
                neither results nor annotations count.

        Raises:
            DatasetNotFoundError: a file does not exist.
            AnnotationError: a file is no COCO file, or results name images that the ground truth does not have.
        """
        metric = cls(iou_type=iou_type, **kwargs)
        rows = read_files(gt, results, classes=metric.class_ids, boxes=iou_type == "bbox")
        metric.class_ids = rows.classes
        rows.gt[:, 7] = rows.gt[:, 6]  # COCO overwrites a file's own `ignore` by `iscrowd`
        metric._add_file(rows)
        if iou_type == "segm":
            overlaps, area = file_masks(rows)
            metric._add_rows("overlaps", overlaps)
            metric._add_rows("mask_area", area)
        return metric

    def _evaluate(self, tables: Tables) -> tuple[Tensor, Tensor]:
        boxes, gt_boxes = tables.det[:, 1:5], tables.gt[:, 1:5]
        area, edges = boxes[:, 2] * boxes[:, 3], None
        if self.iou_type == "segm":
            area, edges = self._masks(tables)
        det = Detections(tables.det_image, tables.det_class, boxes, area, tables.det[:, 5])
        area, crowd, ignore = tables.gt[:, 5:8].unbind(1)
        gt = Objects(tables.gt_image, tables.gt_class, gt_boxes, area.contiguous(), crowd > 0, ignore > 0)
        return evaluate(det, gt, tables.n_images, len(tables.classes), caps=CAPS, edges=edges)

    def _sizes(self, questions: Tensor) -> dict[str, Tensor]:
        n_det, n_gt = questions[:, 2], questions[:, 3]
        masks = {"overlaps": n_det * n_gt, "mask_area": n_det} if self.iou_type == "segm" else {}
        return {**super()._sizes(questions), **masks}

    def _masks(self, tables: Tables) -> tuple[Tensor, Edges]:
        """Areas of the detections, and their overlaps."""
        n_det, n_gt = self._rows("questions")[tables.questions, 2:4].unbind(1)
        overlaps = self._kept("overlaps", tables.questions)
        edges = mask_edges(overlaps, n_det, n_gt, tables.det_class, tables.gt_class)
        return self._kept("mask_area", tables.questions), edges
