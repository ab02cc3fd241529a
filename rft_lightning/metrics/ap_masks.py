"""Overlaps of masks for average precision.

Shape legend: N predicted masks, M true masks, H x W pixels, Q questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rft_lightning.metrics.ap_matching import THRESHOLDS, Edges

# Sums of so many ones are exact in float32.
_EXACT_IN_FLOAT32 = 1 << 24


def mask_overlaps(pred: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """IoU of each pair of masks of a question.

    Args:
        pred: ``masks`` [N, H, W], true, or a whole number above 0, on the object.
        target: ``masks`` [M, H, W], and ``iscrowd`` [M] where there are crowds.

    Returns:
        float64 IoU [N * M], M values for each prediction (for a crowd the share of the prediction that lies in it), and
        the areas [N] and [M] in pixels.

    Raises:
        ValueError: masks are missing, differ in size, or are no truth values; names the picture.
    """
    found, truth = _masks(pred, target, "prediction"), _masks(target, target, "target")
    if found.device != truth.device:
        raise ValueError(
            f"Image {target.get('image_id', 'without image_id')!r}: expected masks on one device, found them on "
            f"{found.device} and {truth.device}."
        )
    if found.shape[1:] != truth.shape[1:] and len(found) and len(truth):
        raise ValueError(
            f"Image {target.get('image_id', 'without image_id')!r}: expected masks of one size, found "
            f"{list(found.shape[1:])} in the prediction and {list(truth.shape[1:])} in the target."
        )
    dtype = torch.float32 if found[0:1].numel() < _EXACT_IN_FLOAT32 else torch.float64
    a, b = (masks.flatten(1).to(dtype) for masks in (found, truth))
    common = (a @ b.T).double() if len(a) and len(b) else torch.zeros(len(a), len(b), dtype=torch.float64)
    common = common.to(found.device)
    area, true_area = found.flatten(1).sum(1).double(), truth.flatten(1).sum(1).double()
    crowd = torch.as_tensor(target.get("iscrowd", torch.zeros(len(truth))), device=found.device).bool()
    union = torch.where(crowd, area[:, None], area[:, None] + true_area - common)
    return torch.where(common > 0, common / union, 0.0).flatten(), area, true_area


def _masks(item: Mapping[str, Any], target: Mapping[str, Any], what: str) -> Tensor:
    if item.get("masks") is None:
        raise ValueError(
            f"Image {target.get('image_id', 'without image_id')!r}: expected masks in the {what}, found none; iou_type "
            "segm compares masks."
        )
    masks = torch.as_tensor(item["masks"])
    if masks.is_floating_point():
        raise ValueError(
            f"Image {target.get('image_id', 'without image_id')!r}: expected masks of truth values or whole numbers in "
            f"the {what}, found {masks.dtype}; give logits > 0 or probabilities > 0.5."
        )
    masks = masks > 0
    if masks.ndim != 3 and masks.numel():
        raise ValueError(
            f"Image {target.get('image_id', 'without image_id')!r}: expected masks of shape [N, H, W] in the {what}, "
            f"found {list(masks.shape)}."
        )
    return masks if masks.ndim == 3 else masks.reshape(0, 0, 0)


def mask_edges(overlaps: Tensor, n_det: Tensor, n_gt: Tensor, det_class: Tensor, gt_class: Tensor) -> Edges:
    """The pairs of one class with an IoU of at least 0.5.

    Args:
        overlaps: of all pairs of each question, one question after the other.
        n_det: [Q] detections of each question.
        n_gt: [Q] objects of each question.
        det_class: class of each detection.
        gt_class: class of each object.
    """
    pairs = (overlaps >= THRESHOLDS[0]).nonzero()[:, 0]
    ends = (n_det * n_gt).cumsum(0)
    question = torch.searchsorted(ends, pairs, right=True)
    place = pairs - (ends - n_det * n_gt)[question]
    det = (n_det.cumsum(0) - n_det)[question] + place // n_gt[question]
    gt = (n_gt.cumsum(0) - n_gt)[question] + place % n_gt[question]
    same = (det_class[det] == gt_class[gt]).nonzero()[:, 0]
    return Edges(det[same], gt[same], overlaps[pairs[same]])
