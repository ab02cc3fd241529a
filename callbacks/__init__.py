"""Callbacks: metrics over predictions, what training changed, and how fast it is."""

from rft_lightning.callbacks.base import MetricCallback
from rft_lightning.callbacks.before_after import BeforeAfter
from rft_lightning.callbacks.checkpoint import RolloutCheckpoint
from rft_lightning.callbacks.detection_map import DetectionMAP
from rft_lightning.callbacks.grounding_iou import GroundingIoU
from rft_lightning.callbacks.grounding_masks import GroundingMaskIoU
from rft_lightning.callbacks.hf_export import HFExport
from rft_lightning.callbacks.label_accuracy import LabelAccuracy
from rft_lightning.callbacks.measures import metric_callbacks
from rft_lightning.callbacks.predictions import PredictionWriter
from rft_lightning.callbacks.presence import PresenceAccuracy
from rft_lightning.callbacks.progress import RolloutProgressBar
from rft_lightning.callbacks.throughput import Throughput

__all__ = [
    "BeforeAfter",
    "DetectionMAP",
    "GroundingIoU",
    "GroundingMaskIoU",
    "HFExport",
    "LabelAccuracy",
    "MetricCallback",
    "PredictionWriter",
    "PresenceAccuracy",
    "RolloutCheckpoint",
    "RolloutProgressBar",
    "Throughput",
    "metric_callbacks",
]
