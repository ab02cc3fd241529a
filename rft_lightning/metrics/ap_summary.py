"""Averages of precision and recall as the evaluators take them: -1 marks what no object falls into, and is left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rft_lightning.metrics.base import ABSENT

AREAS = ("all", "small", "medium", "large")


def mean_present(values: Tensor) -> Tensor:
    """The mean of the entries above -1, or -1 if there is none: a scalar."""
    return mean_by(values.flatten(), 0)


def mean_by(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The same over some dimensions."""
    present = values > ABSENT
    count = present.sum(dim)
    mean = torch.where(present, values, 0.0).sum(dim) / count.clamp(min=1)
    return torch.where(count > 0, mean, ABSENT)


def mean_of_classes(per_class: Tensor, classes: Tensor, selected: list[int]) -> Tensor:
    """The mean of the values [K] of some classes; those without an object, or unknown, are left out."""
    chosen = torch.isin(classes, torch.tensor(selected, dtype=classes.dtype, device=classes.device))
    return mean_present(per_class.masked_fill(~chosen, ABSENT))


def summarize_precision(precision: Tensor) -> dict[str, Tensor]:
    """``map map_50 map_75 map_small map_medium map_large`` of precision [T, R, K, A] (0.50:0.05:0.95)."""
    by_area = mean_by(precision, (0, 1, 2))
    loose, strict = mean_by(precision[0:6:5, ..., 0], (1, 2)).unbind()
    return {"map": by_area[0], "map_50": loose, "map_75": strict, **_by_area("map", by_area)}


def summarize_recall(recall: Tensor, caps: Sequence[int]) -> dict[str, Tensor]:
    """``mar_N`` for each cap N, and ``mar_small mar_medium mar_large``, of recall [T, K, A, caps]."""
    means = mean_by(recall, (0, 1))
    numbers = {f"mar_{cap}": value for cap, value in zip(caps, means[0].unbind(), strict=True)}
    return {**numbers, **_by_area("mar", means[:, -1])}


def _by_area(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_{area}": value for area, value in zip(AREAS[1:], values[1:].unbind(), strict=True)}
