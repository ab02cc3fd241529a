"""The callbacks that score predictions of every kind, each silent about what is not its own."""

from __future__ import annotations

from typing import Any

from rft_lightning.callbacks.base import MetricCallback
from rft_lightning.callbacks.detection_map import DetectionMAP
from rft_lightning.callbacks.grounding_iou import GroundingIoU
from rft_lightning.callbacks.grounding_masks import GroundingMaskIoU
from rft_lightning.callbacks.label_accuracy import LabelAccuracy
from rft_lightning.callbacks.presence import PresenceAccuracy


def metric_callbacks(
    *, protocol: Any = "coco", score_from: Any = "confidence", mask_protocol: Any = "lisa"
) -> list[MetricCallback]:
    """One callback of each kind.

    Args:
        protocol: of :class:`DetectionMAP`.
        score_from: of :class:`DetectionMAP`.
        mask_protocol: of :class:`GroundingMaskIoU`, which scores the masks that answers have.
    """
    return [
        DetectionMAP(score_from=score_from, protocol=protocol),
        GroundingIoU(),
        GroundingMaskIoU(segmenter=None, protocol=mask_protocol),
        LabelAccuracy(),
        PresenceAccuracy(),
    ]


__all__ = ["metric_callbacks"]
