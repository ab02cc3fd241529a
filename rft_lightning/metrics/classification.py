"""Accuracy of class names.

Shape legend: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rft_lightning.answers import parse_answer
from rft_lightning.metrics.base import SampleId, SampleMetric, mean_or_absent, stable_id
from rft_lightning.metrics.grounding import named_pairs
from rft_lightning.rewards import accuracy_reward, published
from rft_lightning.sample import Answer, ClassTarget


class ClassificationAccuracy(SampleMetric):
    """Share of samples whose class was named, over all samples: an answer that cannot be read is wrong.

    ``accuracy`` follows the strict reward rules. ``accuracy_lenient`` is what the Visual-RFT evaluation prints, for
    comparison with published tables only: the first answer block that begins and ends in one line, blanks and
    underscores removed, lower case, right if either string contains the other. "rose" is right for "primrose", an empty
    block is right for every class, and no such block is wrong. ``parse_failures`` counts the answers that are not in
    one closed answer block or are empty; each is wrong in ``accuracy``.

    Args:
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(3, **kwargs)  # strict, lenient, parse failure
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
            answers: the answers as read; one whose label is not what its `text` says (made from a label, by another
                system) is taken for a block with its label, and its text not read.
            targets: the right classes.
            ids: the samples' ids; a sample counts once. None: all are different.

        Raises:
            ValueError: a target is no ClassTarget; the message names the sample.
        """
        rows = []
        for name, answer, target in named_pairs(answers, targets, ids):
            if not isinstance(target, ClassTarget):
                raise ValueError(f"{name}: expected a ClassTarget, found {type(target).__name__}.")
            rows.append([_strict(answer, target), _lenient(answer, target), float(not _readable(answer))])
        self._add_samples(ids, rows)
        labels = [target.label for target in targets]
        self._add_rows("labels", [stable_id(label) for label in labels])
        self._add_names((stable_id(label), label) for label in dict.fromkeys(labels))

    def compute(self) -> dict[str, Any]:
        """The accuracies.

        Returns:
            ``accuracy`` and ``accuracy_lenient``: float64 scalars in [0, 1], -1 without samples;
            ``parse_failures``: float64 scalar, a number of samples;
            ``accuracy_per_class`` [K] (strict; 0-dimensional for a single class: torchmetrics squeezes it) in the order
            of ``classes``, the ascending list of class names that occurred as targets.
        """
        kept = self._kept()
        strict, lenient, failed = self._rows("values")[kept].unbind(1)
        labels, names = self._rows("labels")[kept], self._names()
        per_class = [mean_or_absent(strict[labels == key]) for key in names]
        return {
            "accuracy": mean_or_absent(strict),
            "accuracy_lenient": mean_or_absent(lenient),
            "parse_failures": failed.sum(),
            "accuracy_per_class": torch.stack(per_class) if per_class else strict.new_zeros(0),
            "classes": list(names.values()),
        }


def _readable(answer: Answer) -> bool:
    """Text without answer tags is read as a label too (rewards judge it), but it is no answer in an evaluation."""
    return bool(answer.parsed and answer.answer_blocks and answer.label)


def _strict(answer: Answer, target: ClassTarget) -> float:
    return float(_readable(answer) and accuracy_reward(answer, target, rules="strict", step=None) == 1)


def _lenient(answer: Answer, target: ClassTarget) -> float:
    said, right = _published_label(answer), _plain(target.label)
    return float(said is not None and (_plain(said) in right or right in _plain(said)))


def _published_label(answer: Answer) -> str | None:
    """The content of the first answer block within one line; None without one, where the published code fails."""
    if _read_from_text(answer):
        return published.one_line_answer(answer.text)
    return answer.label if answer.answer_blocks else None


def _read_from_text(answer: Answer) -> bool:
    """Whether `text` is the completion that was read, and no mere record of what another system wrote."""
    read = parse_answer(answer.text)
    return (read.label, read.answer_blocks) == (answer.label, answer.answer_blocks)


def _plain(text: str) -> str:
    return text.replace(" ", "").replace("_", "").lower()


__all__ = ["ClassificationAccuracy"]
