"""The two rewards of detection: how well boxes overlap, and whether confidences are honest.

Shape legend: K predicted boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rft_lightning.boxes import box_iou, match_greedy
from rft_lightning.rewards import published
from rft_lightning.rewards.format import Rule, select_rule
from rft_lightning.sample import Answer, DetectionTarget, Target

# The paper leaves tau open ("below tau invalid"); this is the value of the published code, and > is its comparison.
TAU = 0.5


def detection_iou_reward(
    answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
) -> float | None:
    """How well the predicted boxes overlap with the true ones.

    Predictions are matched by falling confidence (:func:`rft_lightning.boxes.match_greedy`, IoU > 0.5).

    - ``strict``: sum of matched IoU / max(number of true boxes, number of predictions), so that missing and surplus
      boxes both cost; a box that is repeated exactly counts once. "No Objects" is worth 1 where there are none; boxes
      where there are none, and no boxes where there are some, are worth 0.
    - ``paper``: mean over the predictions of the IoU, 0 where unmatched (Eq. 6); 0 without predictions.
    - ``published_code``: see :func:`rft_lightning.rewards.published.detection_iou_reward`.

    Args:
        answer: the completion as read.
        target: the true boxes of one category.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        A number in [0, 1]; None where the target is no DetectionTarget.

    Raises:
        ValueError: unknown rules, or ``published_code`` without `target.solution_text`.
    """
    rule = select_rule(_IOU, rules)
    return rule(answer, target) if isinstance(target, DetectionTarget) else None


def detection_confidence_reward(
    answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
) -> float | None:
    """Whether matched boxes are confident and unmatched ones are not.

    - ``strict``: (sum of confidences of matched boxes - sum of those of unmatched ones) / max(number of true boxes,
      number of predictions), at least 0: a wrong box never earns anything. Repeated boxes and "No Objects" as in
      :func:`detection_iou_reward`.
    - ``paper``: mean over the predictions of c where matched and 1 - c where not (Eq. 7-8); 0 without predictions. A
      wrong box with confidence 0 earns 1.
    - ``published_code``: see :func:`rft_lightning.rewards.published.detection_confidence_reward`.

    Args:
        answer: the completion as read; its confidences are clamped to [0, 1] under ``strict``.
        target: the true boxes of one category.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        A number in [0, 1] (NaN under ``published_code`` if the model wrote NaN); None where the target is no
        DetectionTarget.

    Raises:
        ValueError: unknown rules, or ``published_code`` without `target.solution_text`.
    """
    rule = select_rule(_CONFIDENCE, rules)
    return rule(answer, target) if isinstance(target, DetectionTarget) else None


def _strict_iou(answer: Answer, target: DetectionTarget) -> float:
    boxes, confidences = _predictions(answer)
    if len(boxes) == 0 or len(target.boxes) == 0:
        return _strict_without_boxes(answer, target)
    ious, _ = _matched_ious(boxes, confidences, target)
    return min(1.0, float(ious.sum()) / max(len(boxes), len(target.boxes)))


def _strict_confidence(answer: Answer, target: DetectionTarget) -> float:
    boxes, confidences = _predictions(answer)
    if len(boxes) == 0 or len(target.boxes) == 0:
        return _strict_without_boxes(answer, target)
    _, matched = _matched_ious(boxes, confidences, target)
    balance = float(torch.where(matched, confidences, -confidences).sum())
    return min(1.0, max(0.0, balance / max(len(boxes), len(target.boxes))))


def _strict_without_boxes(answer: Answer, target: DetectionTarget) -> float:
    # Saying nothing is not saying that there is nothing, hence no_objects and not just an empty list of boxes.
    return float(bool(answer.no_objects) and len(answer.boxes) == 0 and len(target.boxes) == 0)


def _predictions(answer: Answer) -> tuple[Tensor, Tensor]:
    """Boxes [K, 4] and confidences [K] in [0, 1]: finite ones, each box once (the first occurrence)."""
    finite = answer.boxes.isfinite().all(1) & answer.confidences.isfinite()
    first: dict[tuple[float, ...], int] = {}
    for index in finite.nonzero()[:, 0].tolist():
        first.setdefault(tuple(answer.boxes[index].tolist()), index)
    kept = torch.tensor(list(first.values()), dtype=torch.long)
    return answer.boxes[kept], answer.confidences[kept].clamp(0, 1)


def _paper_iou(answer: Answer, target: DetectionTarget) -> float:
    if len(answer.boxes) == 0:
        return 0.0
    ious, _ = _matched_ious(answer.boxes, answer.confidences, target)
    return min(1.0, float(ious.mean()))


def _paper_confidence(answer: Answer, target: DetectionTarget) -> float:
    if len(answer.boxes) == 0:
        return 0.0
    confidences = answer.confidences
    _, matched = _matched_ious(answer.boxes, confidences, target)
    return float(torch.where(matched, confidences, 1 - confidences).mean())


def _matched_ious(boxes: Tensor, confidences: Tensor, target: DetectionTarget) -> tuple[Tensor, Tensor]:
    """IoU [K] of each prediction with its match, 0 where unmatched, and [K] bool whether it is matched."""
    iou = box_iou(boxes, target.boxes)
    matches = match_greedy(iou, confidences, TAU)
    values = [float(iou[row, column]) if column >= 0 else 0.0 for row, column in enumerate(matches)]
    return torch.tensor(values, dtype=torch.float64), torch.tensor([column >= 0 for column in matches])


_IOU: dict[str, Rule] = {
    "strict": _strict_iou,
    "paper": _paper_iou,
    "published_code": published.detection_iou_reward,
}
_CONFIDENCE: dict[str, Rule] = {
    "strict": _strict_confidence,
    "paper": _paper_confidence,
    "published_code": published.detection_confidence_reward,
}
