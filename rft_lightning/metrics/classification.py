"""Accuracy of class names.

Shape legend: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rft_lightning.metrics.base import SampleId, SampleMetric, mean_or_absent, stable_id
from rft_lightning.rewards import accuracy_reward
from rft_lightning.sample import Answer, ClassTarget


class ClassificationAccuracy(SampleMetric):
    """Share of samples whose class was named, over all samples: an answer that cannot be read is wrong.

    ``accuracy`` follows the strict reward rules. ``accuracy_lenient`` is what the Visual-RFT evaluation prints: blanks
    and underscores removed, lower case, right if either string contains the other. It is for comparison with published
    tables only: "rose" is right for "primrose". One difference: they count an empty answer as right, here it is wrong.

    Args:
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(2, **kwargs)  # strict, lenient
        self._add_rows_state("labels", dtype=torch.int64)
        self._add_name_states()

    def update(
        self,
        answers: Sequence[Answer],
        targets: Sequence[ClassTarget],
        ids: Sequence[SampleId | None] | None = None,
    ) -> None:
        """Add samples.

        Args:
            answers: the answers as read.
            targets: the right classes.
            ids: the samples' ids; a sample counts once. None: all are different.
        """
        pairs = list(zip(answers, targets, strict=True))
        self._add_samples(ids, [[_strict(answer, target), _lenient(answer, target)] for answer, target in pairs])
        labels = [target.label for target in targets]
        self._add_rows("labels", [stable_id(label) for label in labels])
        self._add_names((stable_id(label), label) for label in dict.fromkeys(labels))

    def compute(self) -> dict[str, Any]:
        """The accuracies.

        Returns:
            ``accuracy`` and ``accuracy_lenient``: float64 scalars in [0, 1], -1 without samples;
            ``accuracy_per_class`` [K] (strict; 0-dimensional for a single class: torchmetrics squeezes it) in the order
            of ``classes``, the ascending list of class names that occurred as targets.
        """
        kept = self._kept()
        strict, lenient = self._rows("values")[kept].unbind(1)
        labels, names = self._rows("labels")[kept], self._names()
        per_class = [mean_or_absent(strict[labels == key]) for key in names]
        return {
            "accuracy": mean_or_absent(strict),
            "accuracy_lenient": mean_or_absent(lenient),
            "accuracy_per_class": torch.stack(per_class) if per_class else strict.new_zeros(0),
            "classes": list(names.values()),
        }


def _strict(answer: Answer, target: ClassTarget) -> float:
    if not _readable(answer):
        return 0.0
    return float(accuracy_reward(answer, target, rules="strict", step=None) == 1)


def _lenient(answer: Answer, target: ClassTarget) -> float:
    if not _readable(answer):
        return 0.0
    said, right = _plain(answer.label or ""), _plain(target.label)
    return float(said in right or right in said)


def _readable(answer: Answer) -> bool:
    """Text without answer tags is read as a label too (rewards judge it), but it is no answer in an evaluation."""
    return answer.answer_blocks > 0 and bool(answer.label)


def _plain(text: str) -> str:
    return text.replace(" ", "").replace("_", "").lower()


__all__ = ["ClassificationAccuracy"]
