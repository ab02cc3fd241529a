"""What all detection rewards share: which predictions count, how they are matched, and the answer "No Objects".

Shape legend: K predictions, M true boxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from rft_lightning.boxes import match_greedy, match_hungarian, pairwise_iou
from rft_lightning.sample import Answer, DetectionTarget

Matching = Literal["greedy", "hungarian"]
MATCHINGS = ("greedy", "hungarian")

# More distinct boxes than this, and than twice the true ones, are no answer but a carpet. It also bounds the cubic time
# of the Hungarian method.
MAX_PREDICTIONS = 300

# What decides between assignments of the same total IoU. Far below any difference in IoU that pixels can express.
_CONFIDENCE_GAIN = 1e-12

_Box = tuple[float, ...]
_Row = tuple[_Box, float]


@dataclass(frozen=True, slots=True)
class Scene:
    """The predictions for one question and how they overlap with the true boxes; at least one prediction.

    Predictions stand by falling confidence, equal ones by falling largest IoU, then by coordinates: nothing that is
    computed from a scene depends on the order of writing.

    Attributes:
        confidences: [K] float64 in [0, 1].
        iou: [K, M] float64 in [0, 1].
    """

    confidences: np.ndarray
    iou: np.ndarray

    @property
    def n_pred(self) -> int:
        """Number of predictions K."""
        return self.iou.shape[0]

    @property
    def n_gt(self) -> int:
        """Number of true boxes M."""
        return self.iou.shape[1]

    def match(self, matching: Matching, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """One-to-one pairs with an IoU above `threshold`.

        Args:
            matching: ``greedy`` by falling confidence, or ``hungarian`` for the largest summed IoU (of several such
                assignments the one with the most confidence).
            threshold: in [0, 1).

        Returns:
            [K] IoU of each prediction with its match, 0 where unmatched, and [K] bool whether it is matched.
        """
        if matching == "greedy":
            columns = np.array(match_greedy(self.iou, self.confidences, threshold))
        else:
            gain = np.where(self.iou > threshold, self.iou + _CONFIDENCE_GAIN * self.confidences[:, None], 0)
            columns = np.array(match_hungarian(gain))
        matched = columns >= 0
        ious = np.zeros(self.n_pred)
        ious[matched] = self.iou[matched, columns[matched]]
        return ious, matched


def score_scene(
    answer: Answer,
    target: DetectionTarget,
    score: Callable[[Scene], float],
    *,
    true_negative: float = 1.0,
    hardened: bool = True,
) -> float:
    """The score of an answer, with the cases that all detection rewards treat alike.

    - No boxes: `true_negative` where nothing is there and the answer says so, else 0. Saying nothing is not saying
      that there is nothing.
    - Boxes and confidences that are not finite do not count.
    - `hardened`: boxes where nothing is there are worth 0; an exact copy of a box counts once, with the highest
      confidence of its copies; more than ``max(MAX_PREDICTIONS, 2 * number of true boxes)`` distinct boxes are worth 0.

    Args:
        answer: the completion as read; confidences are clamped to [0, 1].
        target: the true boxes.
        score: of the scene, at least one prediction in it and, where `hardened`, one true box.
        true_negative: see above.
        hardened: see above.

    Returns:
        `score` clamped to [0, 1], or the value of a case above.
    """
    if len(answer.boxes) == 0:
        return float(true_negative) if answer.no_objects and len(target.boxes) == 0 else 0.0
    if hardened and len(target.boxes) == 0:
        return 0.0
    rows = _predictions(answer, distinct=hardened)
    if not rows or (hardened and len(rows) > max(MAX_PREDICTIONS, 2 * len(target.boxes))):
        return 0.0
    return min(1.0, max(0.0, float(score(_scene(tuple(rows), tuple(map(tuple, target.boxes.tolist())))))))


def best_total(gain: np.ndarray) -> float:
    """The largest sum of gains [K, M] over one-to-one pairs.

    It never falls when a gain rises, whatever else is equal, and does not depend on which best assignment is found.
    """
    return sum(gain[row, column] for row, column in enumerate(match_hungarian(gain)) if column >= 0)


def _predictions(answer: Answer, *, distinct: bool) -> list[_Row]:
    """(box, confidence) of the finite predictions; `distinct`: each box once."""
    found = zip(map(tuple, answer.boxes.tolist()), answer.confidences.tolist(), strict=True)
    rows = [
        (box, min(1.0, max(0.0, confidence)))
        for box, confidence in found
        if math.isfinite(confidence) and all(map(math.isfinite, box))
    ]
    # Of equal keys a dict keeps the value that comes last.
    return list(dict(sorted(rows)).items()) if distinct else sorted(rows)


# The rewards of a task look at the same answer one after the other.
@lru_cache(maxsize=2)
def _scene(rows: tuple[_Row, ...], truths: tuple[_Box, ...]) -> Scene:
    boxes = np.array([box for box, _ in rows], dtype=np.float64)
    confidences = np.array([confidence for _, confidence in rows], dtype=np.float64)
    iou = pairwise_iou(boxes, np.array(truths, dtype=np.float64).reshape(-1, 4))
    # The rows are sorted by coordinates already, and lexsort keeps the order of what is equal.
    order = np.lexsort((-iou.max(1, initial=0.0), -confidences))
    scene = Scene(confidences[order], iou[order])
    scene.confidences.setflags(write=False)
    scene.iou.setflags(write=False)
    return scene
