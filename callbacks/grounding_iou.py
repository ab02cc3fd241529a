"""Box metrics of grounding samples."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric

from rft_lightning.callbacks.base import MetricCallback
from rft_lightning.metrics import BoxIoU
from rft_lightning.metrics.base import SampleId
from rft_lightning.sample import GroundingTarget, Prediction


class GroundingIoU(MetricCallback):
    """IoU of the answered box with the object that the expression refers to.

    Logs ``box_iou_mean acc_50 box_giou_mean parse_rate``; an answer without a box counts IoU 0 and GIoU -1.

    Args:
        strict: ``acc_50`` counts IoU > 0.5 instead of IoU >= 0.5.
    """

    target_type = GroundingTarget
    kind = "grounding"

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.box_iou = BoxIoU(strict=strict)

    @property
    def scoring(self) -> dict[str, str]:
        return {"acc_50": "strict" if self.box_iou.strict else "at least"}

    def metrics(self) -> list[Metric]:
        return [self.box_iou]

    def update(self, predictions: list[Prediction], targets: list[Any], ids: list[SampleId], loader: int) -> None:
        self.box_iou.update([prediction.answer for prediction in predictions], targets, ids)

    def compute(self) -> tuple[dict[str, float], dict[str, float]]:
        return {name: float(value) for name, value in self.box_iou.compute().items()}, {}


__all__ = ["GroundingIoU"]
