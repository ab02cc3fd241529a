"""What all detection rewards share: which predictions count, how they are matched, and the answer "No Objects".

Shape legend: K predictions, M true boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rft_lightning.boxes import match_greedy, match_hungarian, pairwise_iou
from rft_lightning.sample import Answer, DetectionTarget

Matching = Literal["greedy", "hungarian"]
MATCHINGS = ("greedy", "hungarian")

# More distinct boxes than this, and than twice the true ones, are no answer but a carpet. It also bounds the cubic time
# of the Hungarian method.
MAX_PREDICTIONS = 300

# What decides between assignments of the same total IoU. Far below any difference in IoU that pixels can express.
_CONFIDENCE_GAIN = 1e-12


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
    _matches: dict[tuple[Matching, float], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

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
        if (matching, threshold) not in self._matches:
            self._matches[matching, threshold] = self._match(matching, threshold)
        return self._matches[matching, threshold]

    def _match(self, matching: Matching, threshold: float) -> tuple[np.ndarray, np.ndarray]:
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
    boxes, truths = _array(answer.boxes), _array(target.boxes)
    if len(boxes) == 0:
        return float(true_negative) if answer.no_objects and len(truths) == 0 else 0.0
    if hardened and len(truths) == 0:
        return 0.0
    scene = _scene(boxes.tobytes(), _array(answer.confidences).tobytes(), truths.tobytes(), hardened)
    if scene is None or (hardened and scene.n_pred > max(MAX_PREDICTIONS, 2 * scene.n_gt)):
        return 0.0
    return min(1.0, max(0.0, float(score(scene))))


def best_total(gain: np.ndarray) -> float:
    """The largest sum of gains [K, M] over one-to-one pairs.

    It never falls when a gain rises, whatever else is equal, and does not depend on which best assignment is found.
    """
    return sum(gain[row, column] for row, column in enumerate(match_hungarian(gain)) if column >= 0)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.to("cpu", torch.float64).numpy(force=True)


# The rewards of a task look at the same answer one after the other.
@lru_cache(maxsize=2)
def _scene(boxes_bytes: bytes, confidences_bytes: bytes, truths_bytes: bytes, distinct: bool) -> Scene | None:
    """The scene of float64 boxes [K, 4], confidences [K] and true boxes [M, 4]; None without a finite prediction.

    An answer is small, and its time goes into the number of calls; hence the few, in this order.
    """
    boxes, truths = (np.frombuffer(data).reshape(-1, 4) for data in (boxes_bytes, truths_bytes))
    boxes, confidences = boxes + 0.0, np.frombuffer(confidences_bytes)  # -0.0 and 0.0 are one corner
    if not (np.isfinite(boxes).all() and np.isfinite(confidences).all()):
        finite = np.isfinite(boxes).all(1) & np.isfinite(confidences)
        boxes, confidences = boxes[finite], confidences[finite]
    confidences = np.minimum(np.maximum(confidences, 0), 1)
    if not len(boxes):
        return None
    iou = pairwise_iou(boxes, truths)
    x1, y1, x2, y2 = boxes.T
    order = np.lexsort((y2, x2, y1, x1, -iou.max(1, initial=0.0), -confidences))
    if distinct:
        order = order[_first_of_each(boxes[order])]
    scene = Scene(confidences[order], iou[order])
    scene.confidences.setflags(write=False)
    scene.iou.setflags(write=False)
    return scene


def _first_of_each(boxes: np.ndarray) -> np.ndarray | slice:
    """Index of the rows that are no copy of an earlier one."""
    data = boxes.tobytes()
    first = {data[start : start + 32]: row for row, start in reversed(list(enumerate(range(0, len(data), 32))))}
    return slice(None) if len(first) == len(boxes) else np.array(sorted(first.values()))
