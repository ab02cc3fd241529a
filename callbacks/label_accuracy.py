"""Accuracy of classification samples."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric

from rft_lightning.callbacks.base import MetricCallback
from rft_lightning.metrics import ClassificationAccuracy
from rft_lightning.metrics.base import SampleId
from rft_lightning.sample import ClassTarget, Prediction


class LabelAccuracy(MetricCallback):
    """Share of pictures whose class was named.

    Logs ``accuracy`` (strict rules), ``accuracy_lenient`` (the published evaluation: one name contains the other),
    ``parse_failures`` (the number of answers that cannot be read, which are wrong) and ``parse_rate``. `per_class`
    holds the strict accuracy of each class.
    """

    target_type = ClassTarget
    kind = "classification"
    table_title = "accuracy"

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = ClassificationAccuracy()

    def metrics(self) -> list[Metric]:
        return [self.accuracy]

    def update(self, predictions: list[Prediction], targets: list[Any], ids: list[SampleId], loader: int) -> None:
        self.accuracy.update([prediction.answer for prediction in predictions], targets, ids)

    def compute(self) -> tuple[dict[str, float], dict[str, float]]:
        result = self.accuracy.compute()
        per_class = result["accuracy_per_class"].reshape(-1).tolist()
        numbers = {name: float(result[name]) for name in ("accuracy", "accuracy_lenient", "parse_failures")}
        return numbers, dict(zip(result["classes"], per_class, strict=True))


__all__ = ["LabelAccuracy"]
