"""Mean IoU of detections under one-to-one matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rft_lightning.boxes import box_iou
from rft_lightning.metrics.base import ABSENT, SampleId, SampleMetric
from rft_lightning.metrics.grounding import box_pair, named_pairs


def matched_iou_sum(boxes: Tensor, truth: Tensor) -> Tensor:
    """Sum of the IoU of pairs matched one to one, greedily by descending IoU.

    Args:
        boxes: [N, 4] xyxy.
        truth: [M, 4] xyxy in the same unit.

    Returns:
        scalar in [0, min(N, M)]; equal IoUs are taken in the order of the boxes, then of the truth.
    """
    if not len(boxes) or not len(truth):
        return boxes.new_zeros((), dtype=torch.float64)
    iou = box_iou(boxes, truth)
    total = iou.new_zeros(())
    for _ in range(min(iou.shape)):
        value, place = iou.flatten().max(0)
        total = total + value
        # Used rows and columns become 0, not -1: what is left over can only add 0.
        row, column = place[None] // iou.shape[1], place[None] % iou.shape[1]
        iou = iou.index_fill(0, row, 0.0).index_fill(1, column, 0.0)
    return total


class MatchedIoU(SampleMetric):
    """Mean IoU over ground-truth boxes: a box that no answer box is matched to counts 0.

    Answer boxes that match nothing cost nothing here; average precision counts them.
    ``compute`` returns ``box_iou_mean``, ``box_iou_mean_parsed`` (over the boxes of samples whose answer was parsed) in
    [0, 1], -1 without boxes, and ``n_boxes``.

    Args:
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(3, **kwargs)  # sum of matched IoU, number of boxes, parsed

    def update(
        self, answers: Sequence[Any], targets: Sequence[Any], ids: Sequence[SampleId | None] | None = None
    ) -> None:
        """Add samples.

        Args:
            answers: per sample an Answer, a dict with ``boxes`` (and ``parsed``, True by default) or boxes [N, 4] xyxy.
            targets: per sample a DetectionTarget, a dict with ``boxes`` or boxes [M, 4] xyxy, in the same unit.
            ids: the samples' ids; a sample counts once. None: all are different.

        Raises:
            ValueError: boxes of another shape, or a sample whose boxes are on two devices.
        """
        totals, others = [], []
        for name, answer, target in named_pairs(answers, targets, ids):
            boxes, truth = box_pair(name, answer, target)
            totals.append(matched_iou_sum(boxes, truth))
            others.append([len(truth), _parsed(answer)])
        if totals:
            # Put together before they are moved. Samples without any box are on the CPU, wherever the others are.
            home = next((total.device for total in totals if total.device.type != "cpu"), totals[0].device)
            columns = torch.stack([total.to(home) for total in totals]), torch.tensor(others, dtype=torch.float64)
            self._add_rows("ids", self._keys(ids, len(totals)))
            self._add_rows("values", torch.column_stack([column.to(self.device) for column in columns]))

    def compute(self) -> dict[str, Tensor]:
        """The means over all boxes and over those of parsed answers, and the number of boxes; float64 scalars."""
        total, boxes, parsed = self._samples().unbind(1)
        return {
            "box_iou_mean": _ratio(total.sum(), boxes.sum()),
            "box_iou_mean_parsed": _ratio((total * parsed).sum(), (boxes * parsed).sum()),
            "n_boxes": boxes.sum(),
        }


def _parsed(answer: Any) -> float:
    if isinstance(answer, Mapping):
        return float(answer.get("parsed", True))
    return float(getattr(answer, "parsed", True))


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count.clamp(min=1), ABSENT)


__all__ = ["MatchedIoU", "matched_iou_sum"]
