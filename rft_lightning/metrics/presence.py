"""How rightly an answer says whether a picture shows a category.

Shape legend: M samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rft_lightning.metrics.base import ABSENT, SampleId, SampleMetric, mean_or_absent, stable_id
from rft_lightning.metrics.grounding import named_pairs
from rft_lightning.rewards.presence import YES
from rft_lightning.sample import Answer, PresenceTarget


class PresenceScores(SampleMetric):
    """Accuracy, precision and recall of "is it there?", over all pairs of a picture and a category.

    What is scored is the presence map that the answers make: one that decides nothing counts as "no" there, so look at
    the parse rate, too. Precision is the share of right ones among the pairs that were called present: what the second
    stage of the detection protocol asks in vain lowers it. Recall is the share of the present pairs that were called
    so: no object of the others can be found any more, so it bounds what the second stage can reach.

    Args:
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(2, **kwargs)  # called present, is present
        self._add_rows_state("labels", dtype=torch.int64)
        self._add_name_states()

    def update(
        self,
        answers: Sequence[Answer],
        targets: Sequence[PresenceTarget],
        ids: Sequence[SampleId | None] | None = None,
    ) -> None:
        """Add samples.

        Args:
            answers: the answers as :class:`rft_lightning.tasks.PresenceTask` read them.
            targets: what is right.
            ids: the samples' ids; a sample counts once. None: all are different.

        Raises:
            ValueError: a target is no PresenceTarget; the message names the sample.
        """
        rows = []
        for name, answer, target in named_pairs(answers, targets, ids):
            if not isinstance(target, PresenceTarget):
                raise ValueError(f"{name}: expected a PresenceTarget, found {type(target).__name__}.")
            rows.append([float(answer.label == YES), float(target.present)])
        self._add_samples(ids, rows)
        labels = [target.category for target in targets]
        self._add_rows("labels", [stable_id(label) for label in labels])
        self._add_names((stable_id(label), label) for label in dict.fromkeys(labels))

    def compute(self) -> dict[str, Any]:
        """The scores.

        Returns:
            ``presence_accuracy``, ``presence_precision``, ``presence_recall`` and ``presence_f1``, the harmonic mean of
            the two: float64 scalars in [0, 1], -1 where there is nothing to divide by; ``f1_per_class`` [K]
            (0-dimensional for a single class: torchmetrics squeezes it) in the order of ``classes``, the ascending list
            of names of the categories that were asked for.
        """
        kept = self._kept()
        called, present = self._rows("values")[kept].unbind(1)
        labels, names = self._rows("labels")[kept], self._names()
        answers = torch.stack([called * present, called, present], dim=1)
        # Where the class of each sample stands among the names.
        ordered, places = torch.tensor(list(names), dtype=torch.int64, device=labels.device).sort()
        classes = places[torch.searchsorted(ordered, labels)]
        per_class = answers.new_zeros(len(names), 3).index_add(0, classes, answers)
        hits, called_all, present_all = answers.sum(0)
        return {
            "presence_accuracy": mean_or_absent(called == present),
            "presence_precision": _ratio(hits, called_all),
            "presence_recall": _ratio(hits, present_all),
            "presence_f1": _f1(hits, called_all, present_all),
            "f1_per_class": _f1(*per_class.unbind(1)),
            "classes": list(names.values()),
        }


def _f1(hits: Tensor, called: Tensor, present: Tensor) -> Tensor:
    return _ratio(2 * hits, called + present)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), ABSENT)


__all__ = ["PresenceScores"]
