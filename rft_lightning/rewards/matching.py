"""What all detection rewards share: which predictions count, how they are matched, and the answer "No Objects".

Shape legend: K predictions, M true boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rft_lightning.boxes import match_hungarian, match_in_order, pairwise_iou
from rft_lightning.sample import Answer, DetectionTarget

Matching = Literal["greedy", "hungarian"]
MATCHINGS = ("greedy", "hungarian")

# More distinct boxes than this, and than twice the true ones, are no answer but a carpet. It also bounds the cubic time
# of the Hungarian method.
MAX_PREDICTIONS = 300
MAX_PAIRS_AT_ONCE = 10_000

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
    _best: list[int] | None = None
    _largest: list[float] | None = None
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
            columns = np.array(match_in_order(self.iou, threshold, best=self._best, largest=self._largest))
        else:
            gain = np.where(self.iou > threshold, self.iou + _CONFIDENCE_GAIN * self.confidences[:, None], 0)
            columns = np.array(match_hungarian(gain))
        matched = columns >= 0
        if self.n_gt == 0:
            return np.zeros(self.n_pred), matched
        return np.where(matched, self.iou[np.arange(self.n_pred), columns], 0), matched


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
    boxes, confidences, truths = _array(answer.boxes), _array(answer.confidences), _array(target.boxes)
    if len(boxes) == 0:
        return float(true_negative) if answer.no_objects and len(truths) == 0 else 0.0
    if hardened and len(truths) == 0:
        return 0.0
    scene = _scene(boxes, confidences, truths, hardened)
    if scene is None or (hardened and scene.n_pred > max(MAX_PREDICTIONS, 2 * scene.n_gt)):
        return 0.0
    return min(1.0, max(0.0, float(score(scene))))


def prepare_scenes(answers: Sequence[Answer], target: DetectionTarget, *, hardened: bool = True) -> None:
    """Look at all answers to a question at once, in a fraction of the time: `score_scene` remembers until the next.

    Long answers are left to it, one by one, since together they would leave the processor's cache.
    """
    truths = _array(target.boxes)
    parts = [(_array(answer.boxes), _array(answer.confidences)) for answer in answers]
    if len(truths) * sum(len(confidences) for _, confidences in parts) > MAX_PAIRS_AT_ONCE:
        return
    keys = [_key(boxes, confidences, truths, hardened) for boxes, confidences in parts]
    _scenes.clear()
    _scenes.update(zip(keys, _look(parts, truths, distinct=hardened), strict=True))


def best_total(gain: np.ndarray) -> float:
    """The largest sum of gains [K, M] over one-to-one pairs.

    It never falls when a gain rises, whatever else is equal, and does not depend on which best assignment is found.
    """
    return sum(gain[row, column] for row, column in enumerate(match_hungarian(gain)) if column >= 0)


_Key = tuple[bytes, bytes, bytes, bool]
# What was looked at last. The rewards of a task look at the same answer one after the other.
_scenes: dict[_Key, Scene | None] = {}


def _scene(boxes: np.ndarray, confidences: np.ndarray, truths: np.ndarray, hardened: bool) -> Scene | None:
    key = _key(boxes, confidences, truths, hardened)
    if key not in _scenes:
        if len(_scenes) >= 2:
            _scenes.clear()
        _scenes[key] = _look([(boxes, confidences)], truths, distinct=hardened)[0]
    return _scenes[key]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.numpy() if tensor.dtype == torch.float64 and tensor.is_cpu else tensor.double().numpy(force=True)


def _key(boxes: np.ndarray, confidences: np.ndarray, truths: np.ndarray, hardened: bool) -> _Key:
    return boxes.tobytes(), confidences.tobytes(), truths.tobytes(), hardened


def _look(
    answers: Sequence[tuple[np.ndarray, np.ndarray]], truths: np.ndarray, *, distinct: bool
) -> list[Scene | None]:
    """The scenes of boxes [K, 4] and confidences [K] of each answer; None without a finite prediction."""
    sizes = [len(confidences) for _, confidences in answers]
    owner = np.repeat(np.arange(len(answers)), sizes)
    boxes = np.concatenate([boxes for boxes, _ in answers]) + 0.0  # -0.0 and 0.0 are one corner
    confidences = np.concatenate([confidences for _, confidences in answers])
    if not (np.isfinite(boxes).all() and np.isfinite(confidences).all()):
        finite = np.isfinite(boxes).all(1) & np.isfinite(confidences)
        owner, boxes, confidences = owner[finite], boxes[finite], confidences[finite]
    confidences = np.minimum(np.maximum(confidences, 0), 1)
    iou = pairwise_iou(boxes, truths)
    x1, y1, x2, y2 = boxes.T
    largest = iou.max(1, initial=0.0)
    order = np.lexsort((y2, x2, y1, x1, -largest, -confidences, owner))
    boxes, confidences, iou = boxes[order], confidences[order], iou[order]
    best = iou.argmax(1).tolist() if len(truths) else [0] * len(iou)
    most = largest[order].tolist()
    ends = np.cumsum(np.bincount(owner, minlength=len(answers))).tolist()
    # Equal for copies, and seldom for others.
    marks = (boxes * _MIX).sum(1).tolist() if distinct else []
    confidences.setflags(write=False)
    iou.setflags(write=False)
    scenes: list[Scene | None] = []
    for start, end in zip([0, *ends], ends, strict=False):
        rows = slice(start, end)
        if start == end:
            scenes.append(None)
        elif len(set(marks[rows])) == len(marks[rows]):
            scenes.append(Scene(confidences[rows], iou[rows], best[rows], most[rows]))
        else:
            kept = [start + row for row in _first_of_each(boxes[rows])]
            scenes.append(Scene(confidences[kept], iou[kept], [best[row] for row in kept], [most[row] for row in kept]))
    return scenes


_MIX = np.array([1.0, 3.1, 9.7, 29.3])


def _first_of_each(boxes: np.ndarray) -> list[int]:
    """The rows that are no copy of an earlier one."""
    first = {tuple(box): row for row, box in reversed(list(enumerate(boxes.tolist())))}
    return sorted(first.values())
