"""Accuracy of presence samples."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric

from rft_lightning.callbacks.base import MetricCallback
from rft_lightning.metrics import PresenceScores
from rft_lightning.metrics.base import SampleId
from rft_lightning.sample import Prediction, PresenceTarget

_LOGGED = ("presence_accuracy", "presence_precision", "presence_recall", "presence_f1")


class PresenceAccuracy(MetricCallback):
    """How rightly a policy says which categories a picture shows.

    Logs ``presence_accuracy presence_precision presence_recall presence_f1`` over all pairs of a picture and a category
    (see :class:`rft_lightning.metrics.PresenceScores`) and ``parse_rate``. `per_class` holds the F1 of each category;
    -1 for one that is in no picture and was called present in none.
    """

    target_type = PresenceTarget
    kind = "presence"
    table_title = "F1 of presence"

    def __init__(self) -> None:
        super().__init__()
        self.scores = PresenceScores()

    def metrics(self) -> list[Metric]:
        return [self.scores]

    def update(self, predictions: list[Prediction], targets: list[Any], ids: list[SampleId], loader: int) -> None:
        self.scores.update([prediction.answer for prediction in predictions], targets, ids)

    def compute(self) -> tuple[dict[str, float], dict[str, float]]:
        result = self.scores.compute()
        per_class = result["f1_per_class"].reshape(-1).tolist()
        return {name: float(result[name]) for name in _LOGGED}, dict(zip(result["classes"], per_class, strict=True))


__all__ = ["PresenceAccuracy"]
