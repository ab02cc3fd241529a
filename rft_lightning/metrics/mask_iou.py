"""Mask metrics of grounding: LISA's gIoU and cIoU, and what Visual-RFT calls by these names.

Shape legend: M samples, H rows and W columns of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rft_lightning.errors import ConfigConflictError
from rft_lightning.masks import paint
from rft_lightning.metrics.base import ABSENT, FlatMetric, SampleId, first_of_each, mean_or_absent
from rft_lightning.metrics.grounding import check_devices, named_pairs
from rft_lightning.sample import GroundingTarget

PROTOCOLS = ("lisa", "published_code")

_IGNORED = 255
_DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64)


class MaskIoU(FlatMetric):
    """IoU of the answer's mask with the mask of the object: mean over samples and cumulated over all pixels.

    With I and U the numbers of pixels in the intersection and in the union of a sample's masks, ``compute`` returns
    float64 scalars, -1 without samples:

    - ``lisa`` (LISA's evaluation, github.com/dvlab-research/LISA at 3cb2d43): pixels whose target is 255 are not
      scored. ``mask_iou_mean`` (its gIoU) is the mean of I / (U + 1e-5), a sample with U = 0 counting 1: nothing was
      there and nothing was said. ``mask_iou_cumulative`` (its cIoU) is sum I / (sum U + 1e-10). Its totals are float32
      and its mean divides by M + 1e-5, a share of 1e-5 / M less; here pixels are counted in int64 and the mean divides
      by M.
    - ``published_code`` (Visual-RFT's evaluation): no pixel is left out, every value but 0 is the object.
      ``mask_iou_mean`` is the mean of I / (U + 1e-6), so that U = 0 counts 0, and ``mask_iou_cumulative`` is
      sum I / (sum U + 1e-6). A sample whose masks differ in size is left out of both; ``n_skipped`` counts these. Of a
      GroundingTarget only the first region counts, whatever its value, painted with Pillow. (The published code paints
      the first polygon of the file, also one labelled ``flag``, which a target of ReasonSeg does not hold.)

    The state is one row of counts per sample. Samples are deduplicated and ordered by id, so that the result is the
    same to the last bit for any order, any batches and any number of processes. Counting happens on the device of the
    masks; `update` waits for no result unless the metric is on another device than they are (``metric.to(device)``).

    Args:
        protocol: ``lisa`` or ``published_code``.
        **kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ConfigConflictError: unknown protocol.
    """

    higher_is_better = True

    def __init__(self, *, protocol: Literal["lisa", "published_code"] = "lisa", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if protocol not in PROTOCOLS:
            raise ConfigConflictError(f"Expected protocol to be one of {', '.join(PROTOCOLS)}, found {protocol!r}.")
        self.protocol = protocol
        # Named by the protocol: a MetricCollection takes equal states of equal names for the same metric.
        self._counts = f"counts_{protocol}"
        self._add_rows_state(self._counts, 4, torch.int64)  # id, intersection, union, skipped

    def update(
        self,
        preds: Sequence[Any] | Tensor | np.ndarray,
        targets: Sequence[Any] | Tensor | np.ndarray,
        ids: Sequence[SampleId | None] | None = None,
    ) -> None:
        """Add samples.

        Args:
            preds: per sample a mask [H, W], a tensor or an array of bool or whole numbers, not 0 where the object is;
                all 0 where an answer has no mask. Logits are refused: LISA's masks are ``logits > 0``.
            targets: per sample such a mask with 1 the object, 0 (or any other value) the rest and 255 what is not
                scored, or a GroundingTarget with regions, which is painted here. A mask with 255 for the object has to
                be passed as ``mask > 0``. Arrays follow the other mask to its device.
            ids: the samples' ids; a sample counts once, the first time. None: all are different.

        Raises:
            ValueError: a mask of another shape or type, masks of two sizes (not with ``published_code``), a target
                without regions, or masks on two devices; the message names the sample.
        """
        rows = [self._count(*pair) for pair in named_pairs(preds, targets, ids)]
        if rows:
            counts = torch.stack(rows)
            keys = torch.tensor(self._keys(ids, len(rows)))[:, None].to(counts.device, non_blocking=True)
            self._add_rows(self._counts, torch.cat([keys, counts], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """``mask_iou_mean``, ``mask_iou_cumulative`` and, with ``published_code``, ``n_skipped``; float64 scalars."""
        rows = self._rows(self._counts)
        rows = rows[first_of_each(rows[:, :1])]
        skipped = rows[:, 3]
        intersection, union = rows[skipped == 0, 1:3].unbind(1)
        lisa = self.protocol == "lisa"
        ious = intersection.double() / (union.double() + (1e-5 if lisa else 1e-6))
        if lisa:
            ious = torch.where(union == 0, 1.0, ious)
        cumulative = intersection.sum().double() / (union.sum().double() + (1e-10 if lisa else 1e-6))
        result = {
            "mask_iou_mean": mean_or_absent(ious),
            "mask_iou_cumulative": cumulative if len(union) else torch.full_like(cumulative, ABSENT),
        }
        return result if lisa else {**result, "n_skipped": skipped.sum().double()}

    def _count(self, name: str, pred: Any, target: Any) -> Tensor:
        """[3] int64 on the metric's device: pixels in the intersection, in the union, and 1 for a skipped sample."""
        said, truth = self._masks(name, pred, target)
        if said.shape != truth.shape:
            if self.protocol == "lisa":
                raise ValueError(
                    f"{name}: expected masks of one size, found a prediction of {list(said.shape)} for a target of "
                    f"{list(truth.shape)} ([H, W]). Resize the prediction to the original picture."
                )
            return torch.tensor([0, 0, 1]).to(self.device, non_blocking=True)
        said = said != 0
        is_object, scored = (truth == 1, truth != _IGNORED) if self.protocol == "lisa" else (truth != 0, True)
        intersection, union = (said & is_object).sum(), ((said | is_object) & scored).sum()
        return torch.stack([intersection, union, torch.zeros_like(union)]).to(self.device)

    def _masks(self, name: str, pred: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Both masks on one device."""
        try:
            if isinstance(target, GroundingTarget):
                target = _paint(target, self.protocol)
            said, truth = _as_mask(pred, "prediction"), _as_mask(target, "target")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        if not isinstance(pred, Tensor):
            said = said.to(truth.device, non_blocking=True)
        if not isinstance(target, Tensor):
            truth = truth.to(said.device, non_blocking=True)
        check_devices(name, said, truth)
        return said, truth


def _as_mask(value: Any, what: str) -> Tensor:
    # Arrays are copied: those of pictures are often read-only or flipped, which tensors cannot be.
    mask = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value, order="C"))
    if mask.ndim != 2 or mask.dtype not in _DTYPES:
        raise ValueError(
            f"Expected a {what} mask [H, W] of bool or whole numbers, found shape {list(mask.shape)} of "
            f"{str(mask.dtype).removeprefix('torch.')}. Pass one mask per sample; make logits a mask with `logits > 0`."
        )
    return mask


def _paint(target: GroundingTarget, protocol: str) -> np.ndarray:
    """[H, W] uint8: the target's mask, or for ``published_code`` its first region, edges included, as Pillow paints."""
    if not target.regions or target.image_size is None:
        raise ValueError(
            f"Expected a target with regions and an image size, found {len(target.regions)} regions and image size "
            f"{target.image_size}. Leave samples without a mask out."
        )
    if protocol == "lisa":
        return paint(target.regions, target.image_size)
    canvas = Image.new("L", target.image_size)
    ImageDraw.Draw(canvas).polygon(target.regions[0].points, fill=1, outline=1)
    return np.asarray(canvas)


__all__ = ["PROTOCOLS", "MaskIoU"]
