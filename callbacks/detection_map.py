"""Average precision and mean IoU of detections."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from rft_lightning.boxes import valid_boxes
from rft_lightning.callbacks.base import MetricCallback, loader_id
from rft_lightning.errors import ConfigConflictError
from rft_lightning.metrics import ClassNames, COCOMeanAveragePrecision, MatchedIoU
from rft_lightning.sample import DetectionTarget, Prediction

SCORES = ("confidence", "one", "area", "rank")
_LOGGED = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")
_LOGGED_IOU = ("box_iou_mean", "box_iou_mean_parsed")


class DetectionMAP(MetricCallback):
    """COCO average precision of detection samples, and their mean IoU under one-to-one matching.

    Logs ``map map_50 map_75 map_small map_medium map_large mar_100 box_iou_mean box_iou_mean_parsed parse_rate`` in
    [0, 1]; -1 where no object falls in the range. `per_class` holds the AP of each category.

    A sample asks for one category of one picture. Samples without objects take part: their detections are false
    positives. Crowds (``ignore_boxes``) make an answer neither right nor wrong.

    Args:
        score_from: what ranks the boxes of all pictures, which average precision depends on: ``confidence`` as the
            model wrote it (1 where it wrote none), ``one`` (all equal; ties go by image id and order), ``area`` (share
            of the picture, larger first) or ``rank`` (position in the answer, first box first). Report it with the
            number.

    Raises:
        ConfigConflictError: unknown `score_from`.
    """

    target_type = DetectionTarget

    def __init__(self, score_from: Literal["confidence", "one", "area", "rank"] = "confidence") -> None:
        super().__init__()
        if score_from not in SCORES:
            raise ConfigConflictError(f"Expected score_from to be one of {', '.join(SCORES)}, found {score_from!r}.")
        self.score_from = score_from
        self.table_title = f"AP (scores from {score_from})"
        self.average_precision = COCOMeanAveragePrecision()
        self.matched_iou = MatchedIoU()
        self.names = ClassNames()

    def metrics(self) -> list[Metric]:
        return [self.average_precision, self.matched_iou, self.names]

    def update(self, predictions: list[Prediction], targets: list[Any], ids: list[int], loader: int) -> None:
        preds = [self._detections(p, target) for p, target in zip(predictions, targets, strict=True)]
        images = [loader_id(prediction.sample.image_id, loader) for prediction in predictions]
        truth = [_objects(target, image) for target, image in zip(targets, images, strict=True)]
        self.average_precision.update(preds, truth)
        self.matched_iou.update([prediction.answer for prediction in predictions], targets, ids)
        self.names.update({target.category_id: target.category or str(target.category_id) for target in targets})

    def compute(self) -> tuple[dict[str, float], dict[str, float]]:
        precision, iou, names = self.average_precision.compute(), self.matched_iou.compute(), self.names.compute()
        results = {name: float(precision[name]) for name in _LOGGED}
        results.update({name: float(iou[name]) for name in _LOGGED_IOU})
        classes = precision["classes"].reshape(-1).tolist()  # torchmetrics squeezes a single class
        by_id = dict(zip(classes, precision["map_per_class"].reshape(-1).tolist(), strict=True))
        return results, {name: by_id[key] for key, name in names.items() if key in by_id}

    def _detections(self, prediction: Prediction, target: DetectionTarget) -> dict[str, Tensor]:
        boxes = prediction.answer.boxes
        # An answer with swapped corners is wrong; COCO would ignore it for its negative area, but not without any area.
        boxes = torch.where(valid_boxes(boxes)[:, None], boxes, boxes[:, [0, 1, 0, 1]])
        labels = torch.full((len(boxes),), target.category_id)
        return {"boxes": boxes, "scores": self._scores(prediction), "labels": labels}

    def _scores(self, prediction: Prediction) -> Tensor:
        boxes = prediction.answer.boxes
        if self.score_from == "confidence":
            return prediction.answer.confidences
        if self.score_from == "one":
            return torch.ones(len(boxes), dtype=torch.float64)
        if self.score_from == "rank":
            return 1 / torch.arange(1, len(boxes) + 1, dtype=torch.float64)
        width, height = prediction.sample.image_size
        return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) / (width * height)


def _objects(target: DetectionTarget, image: int) -> dict[str, Tensor | int]:
    # The target fills in the optional fields when it is made.
    assert target.areas is not None
    assert target.ignore_boxes is not None
    assert target.ignore_areas is not None
    objects, crowds = len(target.boxes), len(target.ignore_boxes)
    return {
        "boxes": torch.cat([target.boxes, target.ignore_boxes]),
        "labels": torch.full((objects + crowds,), target.category_id),
        "area": torch.cat([target.areas, target.ignore_areas]),
        "iscrowd": torch.arange(objects + crowds) >= objects,
        "image_id": image,
        "query": target.category_id,
    }


__all__ = ["DetectionMAP"]
