"""The two rewards of detection: how well boxes overlap, and whether confidences are honest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from rft_lightning.rewards import published
from rft_lightning.rewards.curriculum import Threshold, threshold_at
from rft_lightning.rewards.matching import MATCHINGS, Matching, Scene, score_scene
from rft_lightning.rewards.options import check_choice, check_number, check_rules, refuse_changed
from rft_lightning.sample import Answer, DetectionTarget, Target

# The paper leaves tau open ("below tau invalid"); this is the value of the published code, and > is its comparison.
TAU = 0.5

_DENOMINATORS = (None, "predictions", "max")


def detection_iou_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    matching: Matching = "greedy",
    threshold: Threshold = TAU,
    denominator: Literal["predictions", "max"] | None = None,
    true_negative: float | None = None,
) -> float | None:
    """How well the predicted boxes overlap with the true ones.

    Predictions are matched one to one with true boxes of an IoU above the threshold.

    - ``strict``: sum of matched IoU / max(number of true boxes, number of predictions), so that missing and surplus
      boxes both cost; hardened as :func:`rft_lightning.rewards.matching.score_scene` says. "No Objects" is worth 1
      where there are none; boxes where there are none, and no boxes where there are some, are worth 0.
    - ``paper``: mean over the predictions of the IoU, 0 where unmatched (Eq. 6); 0 without predictions.
    - ``published_code``: see :func:`rft_lightning.rewards.published.detection_iou_reward`; takes no options.

    Args:
        answer: the completion as read.
        target: the true boxes of one category.
        rules: strict, paper or published_code.
        step: the optimiser step, for a threshold that changes.
        matching: ``greedy`` by falling confidence as published, or ``hungarian`` for the largest total.
        threshold: in [0, 1), or {first step: threshold}; a pair counts only if its IoU is strictly greater.
        denominator: ``predictions`` or ``max`` (of both numbers); None: as the rules say.
        true_negative: worth of a right "No Objects", in [0, 1]; None: as the rules say (strict 1, paper 0).

    Returns:
        A number in [0, 1]; None where the target is no DetectionTarget.

    Raises:
        ValueError: unknown rules, an option out of range or under ``published_code``, or ``published_code`` without
            `target.solution_text`.
    """
    check_choice("denominator", denominator, _DENOMINATORS)
    threshold_now = _checked_options(rules, step, matching, threshold, true_negative)
    if rules == "published_code":
        refuse_changed(denominator=(denominator or "max", "max"))
        return published.detection_iou_reward(answer, target) if isinstance(target, DetectionTarget) else None
    by_predictions = (denominator or ("max" if rules == "strict" else "predictions")) == "predictions"

    def score(scene: Scene) -> float:
        ious, _ = scene.match(matching, threshold_now)
        return ious.sum() / (scene.n_pred if by_predictions else max(scene.n_gt, scene.n_pred))

    return _score(answer, target, score, rules, true_negative)


def detection_confidence_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    matching: Matching = "greedy",
    threshold: Threshold = TAU,
    true_negative: float | None = None,
) -> float | None:
    """Whether matched boxes are confident and unmatched ones are not.

    - ``strict``: (sum of confidences of matched boxes - sum of those of unmatched ones) / max(number of true boxes,
      number of predictions), at least 0: a wrong box never earns anything. Hardened like :func:`detection_iou_reward`.
    - ``paper``: mean over the predictions of c where matched and 1 - c where not (Eq. 7-8); 0 without predictions. A
      wrong box with confidence 0 earns 1.
    - ``published_code``: see :func:`rft_lightning.rewards.published.detection_confidence_reward`; takes no options.

    Args:
        answer: the completion as read; its confidences are clamped to [0, 1] under ``strict`` and ``paper``.
        target: the true boxes of one category.
        rules: strict, paper or published_code.
        step: the optimiser step, for a threshold that changes.
        matching: ``greedy`` by falling confidence as published, or ``hungarian`` for the largest summed IoU.
        threshold: in [0, 1), or {first step: threshold}; a pair counts only if its IoU is strictly greater.
        true_negative: worth of a right "No Objects", in [0, 1]; None: as the rules say (strict 1, paper 0).

    Returns:
        A number in [0, 1] (NaN under ``published_code`` if the model wrote NaN); None where the target is no
        DetectionTarget.

    Raises:
        ValueError: unknown rules, an option out of range or under ``published_code``, or ``published_code`` without
            `target.solution_text`.
    """
    threshold_now = _checked_options(rules, step, matching, threshold, true_negative)
    if rules == "published_code":
        return published.detection_confidence_reward(answer, target) if isinstance(target, DetectionTarget) else None

    def strict(scene: Scene) -> float:
        _, matched = scene.match(matching, threshold_now)
        balance = np.where(matched, scene.confidences, -scene.confidences).sum()
        return balance / max(scene.n_gt, scene.n_pred)

    def paper(scene: Scene) -> float:
        _, matched = scene.match(matching, threshold_now)
        return np.where(matched, scene.confidences, 1 - scene.confidences).mean()

    return _score(answer, target, strict if rules == "strict" else paper, rules, true_negative)


def _checked_options(
    rules: str, step: int | None, matching: Matching, threshold: Threshold, true_negative: float | None
) -> float:
    """The threshold at this step, after a look at all options."""
    check_rules(rules)
    check_choice("matching", matching, MATCHINGS)
    if true_negative is not None:
        check_number("true_negative", true_negative, 0, 1)
    threshold_now = threshold_at(threshold, step)
    if rules == "published_code":
        refuse_changed(matching=(matching, "greedy"), threshold=(threshold, TAU), true_negative=(true_negative, None))
    return threshold_now


def _score(
    answer: Answer, target: Target | None, score: Callable[[Scene], float], rules: str, true_negative: float | None
) -> float | None:
    if not isinstance(target, DetectionTarget):
        return None
    strict = rules == "strict"
    if true_negative is None:
        true_negative = 1.0 if strict else 0.0
    return score_scene(answer, target, score, true_negative=true_negative, hardened=strict)
