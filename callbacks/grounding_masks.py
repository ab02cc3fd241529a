"""Mask metrics of grounding samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torchmetrics import Metric

from rft_lightning.callbacks.base import MetricCallback
from rft_lightning.metrics import MaskIoU
from rft_lightning.metrics.base import SampleId
from rft_lightning.sample import GroundingTarget, Prediction
from rft_lightning.segmenter import Segmenter, add_masks, as_segmenter

_PART = 64


class GroundingMaskIoU(MetricCallback):
    """IoU of masks with the object that the expression refers to: LISA's gIoU and cIoU, Visual-RFT's Table 6.

    Answers that come without a mask get the one that a segmenter makes of their first box, and keep it; one without a
    box that has an area gets an empty mask. Logs ``mask_iou_mean mask_iou_cumulative parse_rate``, with
    ``published_code`` also ``n_skipped``, see :class:`rft_lightning.metrics.MaskIoU`. Samples whose target has no
    regions are left out.

    Args:
        segmenter: a :class:`~rft_lightning.segmenter.Segmenter` or its checkpoint; Visual-RFT's:
            facebook/sam-vit-huge. None scores only answers that come with a mask, and loads nothing.
        protocol: ``lisa``: all targets, ignored regions not scored. ``published_code``: what Visual-RFT's evaluation
            does, the first polygon as the object and boxes cut to whole pixels.
    """

    target_type = GroundingTarget
    kind = "grounding masks"

    def __init__(
        self,
        segmenter: str | Segmenter | None = None,
        protocol: Literal["lisa", "published_code"] = "lisa",
    ) -> None:
        super().__init__()
        self.segmenter = None if segmenter is None else as_segmenter(segmenter)
        self.mask_iou = MaskIoU(protocol=protocol)
        self._some_have_masks = False

    @property
    def scoring(self) -> dict[str, str]:
        return {"mask_protocol": self.mask_iou.protocol}

    def complete(self, predictions: list[Prediction]) -> None:
        """Make the masks that are missing, on the device of the module."""
        lacking = [item for item in predictions if not item.answer.has_mask and _has_regions(item)]
        if self.segmenter is None or not lacking:
            return
        add_masks(
            [item.answer for item in lacking],
            [item.sample.load_image() for item in lacking],
            self.segmenter.to(self.device),
            whole_pixels=self.mask_iou.protocol == "published_code",
        )

    @property
    def completed_by(self) -> dict[str, Any]:
        if self.segmenter is None:
            return {}
        protocol, dtype = self.mask_iou.protocol, self.segmenter.dtype
        return {"segmenter": self.segmenter.checkpoint, "dtype": dtype, "protocol": protocol}

    def metrics(self) -> list[Metric]:
        return [self.mask_iou]

    def score(self, predictions: Sequence[Prediction]) -> tuple[dict[str, float], dict[str, float]]:
        """See the base class; where some answers have masks, those without one count as empty."""
        self._some_have_masks = any(item.answer.has_mask for item in self._measured(predictions))
        try:
            return super().score(predictions)
        finally:
            self._some_have_masks = False

    def update(self, predictions: list[Prediction], targets: list[Any], ids: list[SampleId], loader: int) -> None:
        # In parts: masks of rows are decoded where they are read, and those of a whole data set fill the memory.
        for start in range(0, len(predictions) or 1, _PART):
            part = slice(start, start + _PART)
            masks = [_mask(prediction) for prediction in predictions[part]]
            self.mask_iou.update(masks, targets[part], ids[part])

    def compute(self) -> tuple[dict[str, float], dict[str, float]]:
        return {name: float(value) for name, value in self.mask_iou.compute().items()}, {}

    def summary(self) -> str:
        how = "of the answers" if self.segmenter is None else f"by {self.segmenter.checkpoint}"
        return f"mask IoU by protocol {self.mask_iou.protocol}, masks {how}"

    def _update(self, predictions: list[Prediction], loader: int) -> None:
        # Left out here, so that a run without any such sample has no results.
        wanted = [item for item in predictions if _has_regions(item)]
        scored = wanted if self._some_have_masks else [item for item in wanted if item.answer.has_mask]
        super()._update(scored, loader)


def _mask(prediction: Prediction) -> np.ndarray:
    mask = prediction.answer.mask
    width, height = prediction.sample.image_size
    return np.zeros((height, width), dtype=bool) if mask is None else mask


def _has_regions(prediction: Prediction) -> bool:
    return isinstance(prediction.target, GroundingTarget) and bool(prediction.target.regions)


__all__ = ["GroundingMaskIoU"]
