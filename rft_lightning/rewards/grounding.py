"""The rewards of grounding: how well the one box or point fits the one object it should."""

from __future__ import annotations

import math

from rft_lightning.boxes import box_giou, pairwise_iou, valid_boxes
from rft_lightning.rewards import published
from rft_lightning.rewards.format import Rule, select_rule
from rft_lightning.rewards.options import RULES
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
    return _apply(select_rule(_GIOU, rules), answer, target, reads_text=rules == "published_code")


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
    return _apply(select_rule(_IOU, rules), answer, target, reads_text=rules == "published_code")


def grounding_iou_squared_reward(
    answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
) -> float | None:
    """Square of the IoU of the first box with the true one: the last steps towards the object earn most.

    Source: Perception-R1 (arXiv 2504.07954). The paper and the published code have no such reward: all three rule sets
    compute the same.

    Args:
        answer: the completion as read.
        target: the true box; its first one counts.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        A number in [0, 1]; None where the target is no GroundingTarget or has no box.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules.
    """
    return _apply(select_rule(_IOU_SQUARED, rules), answer, target)


def point_in_box_reward(
    answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
) -> float | None:
    """1 if the point that is answered lies in the true box, its border included, else 0.

    The point is the first one of the answer; where there is none, the centre of the first box, unless that box has
    x1 >= x2 or y1 >= y2. How well a box fits is not measured. The paper and the published code have no such reward:
    all three rule sets compute the same.

    Args:
        answer: the completion as read.
        target: the true box; its first one counts.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        0.0 or 1.0; None where the target is no GroundingTarget or has no box.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules.
    """
    return _apply(select_rule(_POINT, rules), answer, target)


def _apply(rule: Rule, answer: Answer, target: Target | None, *, reads_text: bool = False) -> float | None:
    if not isinstance(target, GroundingTarget) or (len(target.boxes) == 0 and not reads_text):
        return None
    return rule(answer, target)


def _giou_plus_one(answer: Answer, target: GroundingTarget) -> float:
    if not _has_box(answer):
        return 0.0
    value = float(box_giou(answer.boxes[:1], target.boxes[:1])) + 1
    # Corners like 1e200 are finite, their area is not.
    return min(2.0, max(0.0, value)) if math.isfinite(value) else 0.0


def _iou(answer: Answer, target: GroundingTarget) -> float:
    if not _has_box(answer):
        return 0.0
    return min(1.0, float(pairwise_iou(answer.boxes[:1].numpy(), target.boxes[:1].numpy())[0, 0]))


def _iou_squared(answer: Answer, target: GroundingTarget) -> float:
    return _iou(answer, target) ** 2


def _point(answer: Answer, target: GroundingTarget) -> float:
    if len(answer.points) > 0:
        x, y = answer.points[0].tolist()
    elif _has_box(answer):
        left, top, right, bottom = answer.boxes[0].tolist()
        x, y = (left + right) / 2, (top + bottom) / 2
    else:
        return 0.0
    x1, y1, x2, y2 = target.boxes[0].tolist()
    return float(x1 <= x <= x2 and y1 <= y <= y2)


def _has_box(answer: Answer) -> bool:
    return len(answer.boxes) > 0 and bool(valid_boxes(answer.boxes[:1])[0])


_GIOU: dict[str, Rule] = {"strict": _giou_plus_one, "paper": _iou, "published_code": published.giou_reward}
_IOU: dict[str, Rule] = {"strict": _iou, "paper": _iou, "published_code": published.grounding_iou_reward}
_IOU_SQUARED: dict[str, Rule] = dict.fromkeys(RULES, _iou_squared)
_POINT: dict[str, Rule] = dict.fromkeys(RULES, _point)
