"""Training rows about what pictures do not show, so that "No Objects" is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import islice

from rft_lightning.datamodules.rows import Row


def positives_within(limit: int | None, share: float) -> int | None:
    """How many of at most `limit` rows are about what is there, when `share` of them are not."""
    return None if limit is None else max(1, limit - round(limit * share))


def with_negatives(
    rows: list[Row],
    absent: Iterable[Row],
    *,
    share: float,
    limit: int | None,
    usable: Callable[[Row], bool] | None = None,
    split: str,
) -> list[Row]:
    """The rows with so many of `absent`, the first ones, that they are `share` of all.

    Args:
        rows: rows about what is there.
        absent: rows about what is not, in the order they are taken.
        share: share of negatives in the result, in [0, 1).
        limit: most rows in all; None for no limit.
        usable: whether the picture of a row can be read; None: all can.
        split: name of the split, for the warning when there are too few.
    """
    wanted = round(len(rows) * share / (1 - share))
    if limit is not None:
        wanted = min(wanted, limit - len(rows))
    if wanted <= 0:
        return rows
    negatives = list(islice((row for row in absent if usable is None or usable(row)), wanted))
    if len(negatives) < wanted:
        warnings.warn(
            f"negative_fraction={share} asks for {wanted} rows about absent classes, but {split} has "
            f"{len(negatives)}; all of them are used.",
            stacklevel=2,
        )
    return rows + negatives


__all__ = ["positives_within", "with_negatives"]
