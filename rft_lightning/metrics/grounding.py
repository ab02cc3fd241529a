"""Box metrics of grounding: one answer box against the object an expression refers to.

Shape legend: M samples, K boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rft_lightning.boxes import box_giou, box_iou, valid_boxes
from rft_lightning.metrics.base import SampleId, SampleMetric, boxes_of, mean_or_absent


class BoxIoU(SampleMetric):
    """IoU of the answer's first box with the target's first box; without a box that has an area it is 0, the GIoU -1.

    ``compute`` returns ``box_iou_mean`` and ``acc_50`` in [0, 1] (-1 without samples), the latter being the share of
    samples with an IoU of at least 0.5 (RefCOCO's Acc@0.5), and ``box_giou_mean`` in [-1, 1] (generalised IoU of boxes;
    not the "gIoU" of LISA, which is a mean of mask IoUs: :class:`rft_lightning.metrics.MaskIoU`).

    The state is a pair of boxes per sample; `update` only collects them, on the device of the metric.

    Args:
        strict: count IoU > 0.5 instead of IoU >= 0.5, as VLM-R1 does.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, *, strict: bool = False, **kwargs: Any) -> None:
        super().__init__(8, **kwargs)  # the answer's box, the target's box
        self.strict = strict

    def update(
        self, answers: Sequence[Any], targets: Sequence[Any], ids: Sequence[SampleId | None] | None = None
    ) -> None:
        """Add samples.

        Args:
            answers: per sample an Answer, a dict with ``boxes`` or boxes [K, 4] xyxy; K may be 0.
            targets: per sample a GroundingTarget, a dict with ``boxes`` or boxes [K, 4] xyxy in the same unit.
            ids: the samples' ids; a sample counts once. None: all are different.

        Raises:
            ValueError: boxes of another shape, a target without a box, or a sample whose boxes are on two devices.
        """
        rows = []
        for name, answer, target in named_pairs(answers, targets, ids):
            boxes, truth = box_pair(name, answer, target)
            if len(truth) == 0:
                raise ValueError(
                    f"{name}: expected a box in every grounding target, found none; leave such samples out."
                )
            first = boxes[0] if len(boxes) else truth.new_zeros(4)  # scored like any other box without area
            rows.append(torch.cat([first, truth[0]]).to(self.device))
        self._add_samples(ids, rows)

    def compute(self) -> dict[str, Tensor]:
        """The three means; float64 scalars."""
        boxes, truth = self._samples().split(4, dim=1)
        iou, giou = (torch.vmap(overlap)(boxes[:, None], truth[:, None])[:, 0, 0] for overlap in (box_iou, box_giou))
        # Numbers as large as a model can write overflow the hull, whose GIoU is NaN then.
        giou = torch.where(valid_boxes(boxes) & valid_boxes(truth) & giou.isfinite(), giou, -1.0)
        return {
            "box_iou_mean": mean_or_absent(iou),
            "acc_50": mean_or_absent(iou > 0.5 if self.strict else iou >= 0.5),
            "box_giou_mean": mean_or_absent(giou),
        }


def named_pairs(
    answers: Sequence[Any] | Tensor | np.ndarray,
    targets: Sequence[Any] | Tensor | np.ndarray,
    ids: Sequence[SampleId | None] | None,
) -> Iterator[tuple[str, Any, Any]]:
    """What errors call a sample, its answer and its target, for each sample of an update.

    Raises:
        ValueError: the lists are not of one length.
    """
    count = len(answers)
    if len(targets) != count:
        raise ValueError(f"Expected one target per answer, found {len(targets)} for {count} answers.")
    if ids is not None and len(ids) != count:
        raise ValueError(f"Expected one id per sample, found {len(ids)} for {count} samples.")
    for number, (answer, target) in enumerate(zip(answers, targets, strict=True)):
        key = None if ids is None else ids[number]
        yield f"Number {number} of the batch" if key is None else f"Sample {key!r}", answer, target


def box_pair(name: str, answer: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Boxes [K, 4] of an answer and [K, 4] of its target, float64 on one device.

    Raises:
        ValueError: something else was found; the message begins with `name`.
    """
    boxes, truth = _boxes(name, "answer", answer), _boxes(name, "target", target)
    # No boxes are no tensor to speak of: they are on the CPU only because an empty list became one.
    boxes, truth = (boxes if len(boxes) else truth[:0]), (truth if len(truth) else boxes[:0])
    check_devices(name, boxes, truth)
    return boxes, truth


def check_devices(name: str, answer: Tensor, target: Tensor) -> None:
    """Raise a ValueError that begins with `name` unless both are on one device."""
    if answer.device != target.device:
        raise ValueError(
            f"{name}: expected both on one device, found the answer on {answer.device} and the target on "
            f"{target.device}. Move one of them."
        )


def _boxes(name: str, what: str, item: Any) -> Tensor:
    if isinstance(item, Mapping) and "boxes" not in item:
        raise ValueError(f"{name}: expected 'boxes' in the {what}, found the keys {list(item)}.")
    try:
        return boxes_of(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: the boxes of the {what} cannot be read. {error}") from error


__all__ = ["BoxIoU", "box_pair", "check_devices", "named_pairs"]
