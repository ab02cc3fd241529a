"""Rewards that count: how many objects were found, and how many boxes are false alarms.

Confidences are not read. Pairs are assigned so that the counted total is greatest (Hungarian method), so a better box
never lowers a reward. The paper and the published code have none of these: all three rule sets compute the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rft_lightning.errors import ConfigConflictError
from rft_lightning.rewards.curriculum import Threshold, threshold_at
from rft_lightning.rewards.detection import TAU
from rft_lightning.rewards.matching import Scene, best_total, score_scene
from rft_lightning.rewards.options import check_number, check_rules
from rft_lightning.sample import Answer, DetectionTarget, Target


def completeness_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    threshold: Threshold = TAU,
    miss_weight: float = 0.5,
    true_negative: float = 1.0,
) -> float | None:
    """1 - (w * share of objects missed + (1 - w) * share of boxes that are false alarms).

    Source: the completeness term of VLM-R1 (arXiv 2504.07615). There saying nothing about objects that exist misses
    all of them and raises no false alarm, which is worth 1 - w; here it is worth 0.

    Args:
        answer: the completion as read.
        target: the true boxes of one category.
        rules: strict, paper or published_code; not read further, see the module.
        step: the optimiser step, for a threshold that changes.
        threshold: in [0, 1), or {first step: threshold}; a pair counts only if its IoU is strictly greater.
        miss_weight: w, in [0, 1].
        true_negative: worth of a right "No Objects", in [0, 1].

    Returns:
        A number in [0, 1]; None where the target is no DetectionTarget.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules, or an option out of range.
    """
    check_rules(rules)
    check_number("miss_weight", miss_weight, 0, 1)
    threshold_now = threshold_at(threshold, step)

    def score(scene: Scene) -> float:
        found = best_total(scene.iou > threshold_now)
        return miss_weight * found / scene.n_gt + (1 - miss_weight) * found / scene.n_pred

    return _score(answer, target, score, true_negative)


def recall_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    threshold: Threshold = TAU,
    true_negative: float = 1.0,
) -> float | None:
    """Share of the objects that a box was matched to.

    Surplus boxes cost nothing, so it is made to stand beside :func:`precision_reward`. Source: Vision-R1 (arXiv
    2503.18013).

    Args:
        answer: the completion as read.
        target: the true boxes of one category.
        rules: strict, paper or published_code; not read further, see the module.
        step: the optimiser step, for a threshold that changes.
        threshold: in [0, 1), or {first step: threshold}; a pair counts only if its IoU is strictly greater.
        true_negative: worth of a right "No Objects", in [0, 1].

    Returns:
        A number in [0, 1]; None where the target is no DetectionTarget.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules, or an option out of range.
    """
    check_rules(rules)
    threshold_now = threshold_at(threshold, step)

    def score(scene: Scene) -> float:
        return best_total(scene.iou > threshold_now) / scene.n_gt

    return _score(answer, target, score, true_negative)


def precision_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    threshold: Threshold = TAU,
    full_threshold: Threshold | None = None,
    true_negative: float = 1.0,
) -> float | None:
    """Mean credit of the predicted boxes: 1 for a match, 0 without one.

    With `full_threshold` a match counts 1 from that IoU on and its IoU below. Missed objects cost nothing, so it is
    made to stand beside :func:`recall_reward`. Source: Vision-R1 (arXiv 2503.18013).

    Args:
        answer: the completion as read.
        target: the true boxes of one category.
        rules: strict, paper or published_code; not read further, see the module.
        step: the optimiser step, for thresholds that change.
        threshold: in [0, 1), or {first step: threshold}; a pair counts only if its IoU is strictly greater.
        full_threshold: in [0, 1], or {first step: threshold}, at every step at least `threshold`; 1 makes the credit
            the IoU itself. None: every match counts 1.
        true_negative: worth of a right "No Objects", in [0, 1].

    Returns:
        A number in [0, 1]; None where the target is no DetectionTarget.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules, an option out of range, or `full_threshold` < `threshold`.
    """
    check_rules(rules)
    threshold_now = threshold_at(threshold, step)
    full_now = threshold_now
    if full_threshold is not None:
        full_now = threshold_at(full_threshold, step, name="full_threshold", closed=True)
    if full_now < threshold_now:
        raise ConfigConflictError(
            f"Expected full_threshold to be at least threshold, found {full_now} and {threshold_now}; swap them."
        )

    def score(scene: Scene) -> float:
        credit = np.where(scene.iou >= full_now, 1.0, scene.iou)
        return best_total(np.where(scene.iou > threshold_now, credit, 0)) / scene.n_pred

    return _score(answer, target, score, true_negative)


def _score(
    answer: Answer, target: Target | None, score: Callable[[Scene], float], true_negative: float
) -> float | None:
    check_number("true_negative", true_negative, 0, 1)
    if not isinstance(target, DetectionTarget):
        return None
    return score_scene(answer, target, score, true_negative=true_negative)
