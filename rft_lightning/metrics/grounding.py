"""Box metrics of grounding: one answer box against the object an expression refers to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rft_lightning.boxes import box_giou, box_iou, valid_boxes
from rft_lightning.metrics.base import SampleId, SampleMetric, boxes_of, mean_or_absent


class BoxIoU(SampleMetric):
    """IoU of the answer's first box with the target's first box; without a box that has an area it is 0, the GIoU -1.

    ``compute`` returns ``box_iou_mean`` and ``acc_50`` in [0, 1] (-1 without samples), the latter being the share of
    samples with an IoU of at least 0.5 (RefCOCO's Acc@0.5), and ``box_giou_mean`` in [-1, 1] (generalised IoU of boxes;
    not the "gIoU" of LISA, which is a mean of mask IoUs).

    Args:
        strict: count IoU > 0.5 instead of IoU >= 0.5, as VLM-R1 does.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, *, strict: bool = False, **kwargs: Any) -> None:
        super().__init__(2, **kwargs)  # IoU, GIoU
        self.strict = strict

    def update(
        self, answers: Sequence[Any], targets: Sequence[Any], ids: Sequence[SampleId | None] | None = None
    ) -> None:
        """Add samples.

        Args:
            answers: per sample an Answer, a dict with ``boxes`` or boxes [N, 4] xyxy; N may be 0.
            targets: per sample a GroundingTarget, a dict with ``boxes`` or boxes [M, 4] xyxy in the same unit.
            ids: the samples' ids; a sample counts once. None: all are different.

        Raises:
            ValueError: a target has no box.
        """
        rows = [_scores(boxes_of(answer), boxes_of(target)) for answer, target in zip(answers, targets, strict=True)]
        self._add_samples(ids, rows)

    def compute(self) -> dict[str, Tensor]:
        """The three means; float64 scalars."""
        iou, giou = self._samples().unbind(1)
        right = iou > 0.5 if self.strict else iou >= 0.5
        return {
            "box_iou_mean": mean_or_absent(iou),
            "acc_50": mean_or_absent(right),
            "box_giou_mean": mean_or_absent(giou),
        }


def _scores(boxes: Tensor, truth: Tensor) -> Tensor:
    """[2] IoU and GIoU of the first boxes."""
    if len(truth) == 0:
        raise ValueError("Expected a box in every grounding target, found none; leave such samples out of the split.")
    if len(boxes) == 0:
        return truth.new_tensor([0.0, -1.0])
    boxes = boxes[:1].to(truth.device)
    giou = torch.where(valid_boxes(boxes)[0], box_giou(boxes, truth[:1])[0, 0], -1.0)
    return torch.stack([box_iou(boxes, truth[:1])[0, 0], giou])


__all__ = ["BoxIoU"]
