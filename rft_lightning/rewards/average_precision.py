"""COCO's average precision of one question as a reward.

Extra boxes behind the last right one cost nothing in average precision, and each may match by luck: VLM-R1 (arXiv
2504.07615) saw models write ever more of them, hence its length factor (:func:`od_length_reward`). The paper and the
published code have none of these: all three rule sets compute the same.

Shape legend: K predictions, M true boxes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rft_lightning.boxes import match_greedy
from rft_lightning.rewards.matching import Scene, score_scene
from rft_lightning.rewards.options import check_number, check_rules
from rft_lightning.sample import Answer, DetectionTarget, Target

# numpy's values to the last bit, which pycocotools compares with.
_COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALL_POINTS = np.linspace(0, 1, 101)


def average_precision_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    true_negative: float = 1.0,
) -> float | None:
    """COCO AP of this question: mean over IoU 0.50:0.05:0.95 and 101 recall points, all areas.

    As pycocotools computes it (a pair counts from IoU >= threshold on), but for what would reward an accident of
    writing: among equal confidences false positives rank before true ones, whatever the order of the text; all boxes
    count, not the first 100; boxes without area are false positives; exact copies count once.

    Args:
        answer: the completion as read.
        target: the true boxes of one category.
        rules: strict, paper or published_code; not read further, see the module.
        step: not read.
        true_negative: worth of a right "No Objects", in [0, 1].

    Returns:
        A number in [0, 1]; None where the target is no DetectionTarget.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules, or an option out of range.
    """
    return _score(answer, target, lambda scene: _average_precision(scene, _COCO_THRESHOLDS), rules, true_negative)


def ap50_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    true_negative: float = 1.0,
) -> float | None:
    """As :func:`average_precision_reward`, at the one IoU threshold 0.50 (COCO's AP50).

    Args:
        answer: the completion as read.
        target: the true boxes of one category.
        rules: strict, paper or published_code; not read further, see the module.
        step: not read.
        true_negative: worth of a right "No Objects", in [0, 1].

    Returns:
        A number in [0, 1]; None where the target is no DetectionTarget.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules, or an option out of range.
    """
    return _score(answer, target, lambda scene: _average_precision(scene, _COCO_THRESHOLDS[:1]), rules, true_negative)


def od_length_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    true_negative: float = 1.0,
) -> float | None:
    """:func:`average_precision_reward` times min(1, number of true boxes / number of predictions).

    Source: odLength of VLM-R1 (arXiv 2504.07615): with it every surplus box costs.

    Args:
        answer: the completion as read.
        target: the true boxes of one category.
        rules: strict, paper or published_code; not read further, see the module.
        step: not read.
        true_negative: worth of a right "No Objects", in [0, 1].

    Returns:
        A number in [0, 1]; None where the target is no DetectionTarget.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules, or an option out of range.
    """

    def score(scene: Scene) -> float:
        return _average_precision(scene, _COCO_THRESHOLDS) * min(1.0, scene.n_gt / scene.n_pred)

    return _score(answer, target, score, rules, true_negative)


def _average_precision(scene: Scene, thresholds: np.ndarray) -> float:
    return float(np.mean([_precision_at_recall(scene, threshold).mean() for threshold in thresholds]))


def _precision_at_recall(scene: Scene, threshold: float) -> np.ndarray:
    """[101] interpolated precision at the recall points, 0 beyond the recall that is reached."""
    # Columns from the last: COCO gives a tie between objects to the later one. The largest number below the threshold
    # makes "greater" mean "at least".
    matches = match_greedy(scene.iou[:, ::-1], scene.confidences, np.nextafter(threshold, 0))
    right = np.array(matches) >= 0
    right = right[np.lexsort((right, -scene.confidences))]
    ranks = right.nonzero()[0] + 1
    found = np.arange(1, len(ranks) + 1)
    # Precision only falls between true positives, so they are all that the envelope from the right needs.
    envelope = np.maximum.accumulate((found / ranks)[::-1])[::-1]
    places = (found / scene.n_gt).searchsorted(_RECALL_POINTS, side="left")
    return np.append(envelope, 0.0)[places]


def _score(
    answer: Answer, target: Target | None, score: Callable[[Scene], float], rules: str, true_negative: float
) -> float | None:
    check_rules(rules)
    check_number("true_negative", true_negative, 0, 1)
    if not isinstance(target, DetectionTarget):
        return None
    return score_scene(answer, target, score, true_negative=true_negative)
