"""The rewards of grounding: how well the one box overlaps with the one it should be."""

from __future__ import annotations

import math

from rft_lightning.boxes import box_giou, box_iou, valid_boxes
from rft_lightning.rewards import published
from rft_lightning.rewards.format import Rule, select_rule
from rft_lightning.sample import Answer, GroundingTarget, Target


def giou_reward(
    answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
) -> float | None:
    """Generalised IoU of the first box with the true one, plus 1: it still has a slope where boxes do not overlap.

    - ``strict``: GIoU + 1 in [0, 2]; 0 without a box and for one with x1 >= x2 or y1 >= y2.
    - ``paper``: plain IoU in [0, 1], not GIoU: the paper's reward for LISA is an "IoU reward"; the generalised
      one is in the code only.
    - ``published_code``: unbounded GIoU + 1; see :func:`rft_lightning.rewards.published.giou_reward`.

    Args:
        answer: the completion as read.
        target: the true box; its first one counts.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        A number in the range above; None where the target is no GroundingTarget or (strict, paper) has no box.

    Raises:
        ValueError: unknown rules, or ``published_code`` without `target.solution_text`.
    """
    return _apply(select_rule(_GIOU, rules), answer, target, rules)


def grounding_iou_reward(
    answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
) -> float | None:
    """IoU of the first box with the true one.

    - ``strict`` and ``paper``: IoU in [0, 1]; 0 without a box and for one with x1 >= x2 or y1 >= y2.
    - ``published_code``: the published training code has no such reward, so this is the IoU of its evaluation; see
      :func:`rft_lightning.rewards.published.grounding_iou_reward`.

    Args:
        answer: the completion as read.
        target: the true box; its first one counts.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        A number in [0, 1]; None where the target is no GroundingTarget or (strict, paper) has no box.

    Raises:
        ValueError: unknown rules, or ``published_code`` without `target.solution_text`.
    """
    return _apply(select_rule(_IOU, rules), answer, target, rules)


def _apply(rule: Rule, answer: Answer, target: Target | None, rules: str) -> float | None:
    if not isinstance(target, GroundingTarget):
        return None
    if rules != "published_code" and len(target.boxes) == 0:
        return None
    return rule(answer, target)


def _giou_plus_one(answer: Answer, target: GroundingTarget) -> float:
    if len(answer.boxes) == 0 or not bool(valid_boxes(answer.boxes[:1])[0]):
        return 0.0
    value = float(box_giou(answer.boxes[:1], target.boxes[:1])) + 1
    # Corners like 1e200 are finite, their area is not.
    return min(2.0, max(0.0, value)) if math.isfinite(value) else 0.0


def _iou(answer: Answer, target: GroundingTarget) -> float:
    if len(answer.boxes) == 0:
        return 0.0
    return min(1.0, float(box_iou(answer.boxes[:1], target.boxes[:1])))


_GIOU: dict[str, Rule] = {"strict": _giou_plus_one, "paper": _iou, "published_code": published.giou_reward}
_IOU: dict[str, Rule] = {"strict": _iou, "paper": _iou, "published_code": published.grounding_iou_reward}
