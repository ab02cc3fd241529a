"""One answer out of several to the same question: by majority, or by their rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rft_lightning.boxes import box_iou
from rft_lightning.errors import ConfigConflictError
from rft_lightning.metrics.matched_iou import matched_iou_sum
from rft_lightning.rewards.accuracy import normalise_label
from rft_lightning.sample import Answer, Sample
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask, PresenceTask

CHOICES = ("majority", "best")


@dataclass(frozen=True)
class Voting:
    """How a question is answered in evaluation.

    Attributes:
        answers: how many answers are drawn.
        choose: which of them counts. ``majority``: the one that agrees most with the others (self-consistency, Wang et
            al. 2022, arXiv 2203.11171): the most frequent label, the box with the largest mean IoU with the other
            boxes, the list of boxes with the largest mean of matched IoU. ``best``: the one with the highest rewards,
            for which the right answer is looked at: what a perfect judge would get (pass@n), and no result of the
            policy. Ties go to the answer that was drawn first.
        temperature: of the sampling; None: the module's own for one answer, 1 for several.

    Raises:
        ConfigConflictError: a setting is out of its range, or several answers would all be the same.
    """

    answers: int = 1
    choose: str = "majority"
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.answers < 1 or self.choose not in CHOICES:
            raise ConfigConflictError(
                f"Expected answers >= 1 and choose to be one of {', '.join(CHOICES)}, found {self.answers} and "
                f"{self.choose!r}."
            )
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigConflictError(f"Expected temperature >= 0, found {self.temperature}.")
        if self.answers > 1 and self.temperature == 0:
            raise ConfigConflictError(
                f"{self.answers} answers at temperature 0 are all the same; set --temperature above 0 or --answers 1."
            )

    def heat(self, default: float) -> float:
        """The temperature, where `default` is that of the module for one answer."""
        if self.temperature is not None:
            return self.temperature
        return default if self.answers == 1 else 1.0

    def choice(self, sample: Sample, answers: Sequence[Answer]) -> int:
        """Number of the answer that counts.

        Raises:
            ConfigConflictError: `best`, of a sample whose right answer is not known, or `majority`, of a task that is
                none of this package's four or made from one.
        """
        if len(answers) == 1:
            return 0
        if self.choose == "best":
            return _first_highest([_reward(sample, answer) for answer in answers])
        agrees = next((rule for kind, rule in _AGREEMENT.items() if isinstance(sample.task, kind)), None)
        if agrees is None:
            raise ConfigConflictError(
                f"Nothing says when two answers to a {type(sample.task).__name__} agree; known are those to "
                f"{', '.join(kind.__name__ for kind in _AGREEMENT)}. Take --choose best, or --answers 1."
            )
        return _first_highest(
            [
                # Those that could not be read agree with nothing, not even with each other.
                sum(agrees(one, other) for j, other in enumerate(answers) if j != i and one.parsed and other.parsed)
                + (0.5 if one.parsed else 0.0) / len(answers)
                for i, one in enumerate(answers)
            ]
        )


def _first_highest(values: Sequence[float]) -> int:
    # Sums of the same numbers in another order differ in their last bits, which must not decide.
    highest = max(values)
    return next(i for i, value in enumerate(values) if value >= highest - 1e-9)


def _reward(sample: Sample, answer: Answer) -> float:
    if sample.target is None:
        raise ConfigConflictError(
            f"choose best looks at the right answer, and sample {sample.id!r} has none. Take --choose majority."
        )
    rewards = sample.task.score(answer, sample.target, sample_id=sample.id).tolist()
    pairs = zip(rewards, sample.task.reward_weights.values(), strict=True)
    return sum(weight * reward for reward, weight in pairs if not math.isnan(reward))


def _same_label(one: Answer, other: Answer) -> float:
    return float(normalise_label(one.label or "") == normalise_label(other.label or ""))


def _same_box(one: Answer, other: Answer) -> float:
    if not len(one.boxes) or not len(other.boxes):
        return 0.0
    return float(box_iou(one.boxes[:1], other.boxes[:1]))


def _same_boxes(one: Answer, other: Answer) -> float:
    most = max(len(one.boxes), len(other.boxes))
    return 1.0 if most == 0 else float(matched_iou_sum(one.boxes, other.boxes)) / most


_AGREEMENT: dict[type, Callable[[Answer, Answer], float]] = {
    ClassificationTask: _same_label,
    PresenceTask: _same_label,
    GroundingTask: _same_box,
    DetectionTask: _same_boxes,
}

__all__ = ["CHOICES", "Voting"]
