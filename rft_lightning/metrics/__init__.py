"""Metrics on answers in pixels: torchmetrics with flat states that sync over any number of ranks and samples."""

from rft_lightning.metrics.base import ClassNames, ParseRate, stable_id
from rft_lightning.metrics.classification import ClassificationAccuracy
from rft_lightning.metrics.coco_map import COCOMeanAveragePrecision
from rft_lightning.metrics.grounding import BoxIoU
from rft_lightning.metrics.lvis_ap import LVISAveragePrecision
from rft_lightning.metrics.mask_iou import MaskIoU
from rft_lightning.metrics.matched_iou import MatchedIoU
from rft_lightning.metrics.presence import PresenceScores

__all__ = [
    "BoxIoU",
    "COCOMeanAveragePrecision",
    "ClassNames",
    "ClassificationAccuracy",
    "LVISAveragePrecision",
    "MaskIoU",
    "MatchedIoU",
    "ParseRate",
    "PresenceScores",
    "stable_id",
]
