"""Average precision and mean IoU of detections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rft_lightning.callbacks.base import MetricCallback, loader_id
from rft_lightning.errors import ConfigConflictError
from rft_lightning.evaluation.results import SCORES, box_scores, evaluated_boxes
from rft_lightning.metrics import ClassNames, COCOMeanAveragePrecision, LVISAveragePrecision, MatchedIoU
from rft_lightning.metrics.ap_matching import falling
from rft_lightning.metrics.base import SampleId
from rft_lightning.metrics.lvis_ap import MAX_DETECTIONS
from rft_lightning.sample import DetectionTarget, Prediction

PROTOCOLS = ("coco", "lvis", "lvis_published_code")
_SIZES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
_LOGGED = {"coco": (*_SIZES, "mar_100"), "lvis": (*_SIZES, "map_rare", "map_common", "map_frequent", "mar_300")}
_LOGGED_IOU = ("box_iou_mean", "box_iou_mean_parsed")


class DetectionMAP(MetricCallback):
    """Average precision of detection samples, and their mean IoU under one-to-one matching.

    Logs ``map map_50 map_75 map_small map_medium map_large``, ``mar_100`` (under LVIS ``map_rare map_common
    map_frequent mar_300``), ``box_iou_mean box_iou_mean_parsed parse_rate`` in [0, 1]; -1 where no object falls in the
    range. `per_class` holds the AP of each category.

    A sample asks for one category of one picture. Samples without objects take part: their detections are false
    positives. Crowds (``ignore_boxes``) make an answer neither right nor wrong. Under LVIS a detection that matches
    nothing is ignored where not all objects of the category are annotated (``not_exhaustive``).

    Args:
        score_from: what ranks the boxes of all pictures, which average precision depends on: ``confidence`` as the
            model wrote it (1 where it wrote none), ``one`` (all equal; ties go by image id and order), ``area`` (share
            of the picture, larger first) or ``rank`` (position in the answer, first box first). Report it with the
            number.
        protocol: ``coco``; ``lvis``; or ``lvis_published_code``, the authors' average over area ranges (see
            :class:`rft_lightning.metrics.LVISAveragePrecision`).

    Raises:
        ConfigConflictError: unknown `score_from` or `protocol`.
    """

    target_type = DetectionTarget
    kind = "detection"

    def __init__(
        self,
        score_from: Literal["confidence", "one", "area", "rank"] = "confidence",
        protocol: Literal["coco", "lvis", "lvis_published_code"] = "coco",
    ) -> None:
        super().__init__()
        for name, value, known in (("score_from", score_from, SCORES), ("protocol", protocol, PROTOCOLS)):
            if value not in known:
                raise ConfigConflictError(f"Expected {name} to be one of {', '.join(known)}, found {value!r}.")
        self.score_from, self.protocol = score_from, protocol
        self.table_title = f"AP ({protocol}, scores from {score_from})"
        self.average_precision: COCOMeanAveragePrecision | LVISAveragePrecision
        # A sample that comes again in another batch may be answered in other words where numbers are half precision.
        if protocol == "coco":
            self.average_precision = COCOMeanAveragePrecision(on_conflict="first")
        else:
            published: Any = "published_code" if protocol == "lvis_published_code" else "lvis"
            self.average_precision = LVISAveragePrecision(protocol=published, on_conflict="first")
        self.matched_iou = MatchedIoU()
        self._asked: dict[tuple[SampleId, int], SampleId] = {}
        self._places: dict[SampleId, int] = {}
        self._within_cap: dict[str, Tensor] = {}
        self.names = ClassNames()

    def metrics(self) -> list[Any]:
        return [self.average_precision, self.matched_iou, self.names]

    def choose_from(self, predictions: Sequence[Prediction]) -> None:
        """See the base class: the cap of LVIS holds for a picture, over all classes, those left out included."""
        if self.protocol != "coco":
            self._within_cap = _within_cap(self._measured(predictions), self.score_from)

    def score(self, predictions: Sequence[Prediction]) -> tuple[dict[str, float], dict[str, float]]:
        """See the base class.

        Ties go by image id as it is, numbers before strings. Only who knows all pictures can number them so: in
        validation and test over several processes, strings have the order of a hash.
        """
        images = {prediction.sample.image_id for prediction in self._measured(predictions)}
        self._places = {image: place for place, image in enumerate(sorted(images, key=_by_kind))}
        try:
            return super().score(predictions)
        finally:
            self._places, self._within_cap = {}, {}

    def update(self, predictions: list[Prediction], targets: list[Any], ids: list[SampleId], loader: int) -> None:
        preds = [self._detections(p, target) for p, target in zip(predictions, targets, strict=True)]
        images = [loader_id(prediction.sample.image_id, loader) for prediction in predictions]
        for image, target, name in zip(images, targets, ids, strict=True):
            first = self._asked.setdefault((image, target.category_id), name)
            if first != name:
                raise ConfigConflictError(
                    f"The samples {first!r} and {name!r} ask for the same category {target.category_id} of the same "
                    f"image {image!r}, and only one answer can be scored. Give each picture an image_id of its own, "
                    "and ask once."
                )
        places = [self._places.get(image, image) for image in images]
        truth = [_objects(target, place) for target, place in zip(targets, places, strict=True)]
        self.average_precision.update(preds, truth)
        self.matched_iou.update([prediction.answer for prediction in predictions], targets, ids)
        self.names.update({target.category_id: target.category or str(target.category_id) for target in targets})

    def reset(self, device: torch.device) -> None:
        self._asked = {}
        super().reset(device)

    def compute(self) -> tuple[dict[str, float], dict[str, float]]:
        precision, iou, names = self.average_precision.compute(), self.matched_iou.compute(), self.names.compute()
        logged = _LOGGED[self.protocol.removesuffix("_published_code")]
        found = {name: precision[name] for name in logged if name in precision} | {n: iou[n] for n in _LOGGED_IOU}
        numbers = torch.stack([value.double() for value in found.values()]).tolist()
        classes = precision["classes"].reshape(-1).tolist()  # torchmetrics squeezes a single class
        by_id = dict(zip(classes, precision["map_per_class"].reshape(-1).tolist(), strict=True))
        per_class = {name: by_id[key] for key, name in names.items() if key in by_id}
        return dict(zip(found, numbers, strict=True)), per_class

    @property
    def scoring(self) -> dict[str, str]:
        return {"ap_protocol": self.protocol, "score_from": self.score_from}

    def summary(self) -> str:
        return f"AP {self.results['map']:.4f} ({self.protocol}, scores from {self.score_from})"

    def _detections(self, prediction: Prediction, target: DetectionTarget) -> dict[str, Tensor]:
        boxes, scores = evaluated_boxes(prediction.answer.boxes), box_scores(prediction, self.score_from)
        kept = self._within_cap.get(prediction.sample.id)
        if kept is not None:
            boxes, scores = boxes[kept], scores[kept]
        return {"boxes": boxes, "scores": scores, "labels": torch.full((len(boxes),), target.category_id)}


def _by_kind(image: SampleId) -> tuple[bool, SampleId]:
    return isinstance(image, str), image


def _within_cap(predictions: Iterable[Prediction], score_from: str) -> dict[str, Tensor]:
    """Sample id -> [K] whether each box is among those of the highest scores of its picture; ties as in the metric."""
    pictures: dict[SampleId, list[Any]] = defaultdict(list)
    for prediction in predictions:
        pictures[prediction.sample.image_id].append(prediction)
    found: dict[str, Tensor] = {}
    for asked in pictures.values():
        asked.sort(key=lambda prediction: prediction.target.category_id)
        scores = [box_scores(prediction, score_from) for prediction in asked]
        kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
        kept[falling(torch.cat(scores))[:MAX_DETECTIONS]] = True
        found |= {p.sample.id: part for p, part in zip(asked, kept.split(list(map(len, scores))), strict=True)}
    return found


def _objects(target: DetectionTarget, image: SampleId) -> dict[str, Any]:
    # The target fills in the optional fields when it is made.
    assert target.areas is not None
    assert target.ignore_boxes is not None
    assert target.ignore_areas is not None
    objects, crowds = len(target.boxes), len(target.ignore_boxes)
    ignored = (torch.arange(objects + crowds) >= objects).double()
    category = target.category_id
    return {
        "boxes": torch.cat([target.boxes, target.ignore_boxes]),
        "labels": torch.full((objects + crowds,), category),
        "area": torch.cat([target.areas, target.ignore_areas]),
        "iscrowd": ignored,
        "image_id": image,
        "query": category,
        # Read by LVIS alone.
        "ignore": ignored,
        "neg_labels": [] if objects else [category],
        "not_exhaustive_labels": [category] if target.not_exhaustive else [],
        "frequency": {category: target.frequency} if target.frequency else {},
    }


__all__ = ["DetectionMAP"]
