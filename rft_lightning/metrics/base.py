"""Flat metric states: rows of a few long tensors instead of one tensor per picture.

torchmetrics gathers every tensor of a list state on its own, so per-picture lists cost thousands of collectives and
hang when ranks hold different numbers of pictures. Here each state is one tensor of rows (two gathers each, any number
of rows per rank). Rows of different states line up by their order, which survives the gather because every state is
concatenated in the order of the ranks.

Shape legend: M samples, K classes.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rft_lightning.sample import as_boxes

SampleId = int | str
ABSENT = -1.0  # value of a metric that has nothing to measure, as in COCO's AP


def _unnamed_keys() -> int:
    """Where the keys of samples without an id begin: elsewhere in every metric, so that metrics may be merged."""
    return -(2**63) + 1 + (secrets.randbits(30) << 32)


def stable_id(value: SampleId) -> int:
    """An id as int64, the same in every process and on every machine: integers as they are, strings hashed."""
    if not isinstance(value, str):
        return int(value)
    return int.from_bytes(hashlib.blake2b(_bytes(value), digest_size=8).digest(), "big") >> 1


def _bytes(text: str) -> bytes:
    # Names of files that are not in UTF-8 come with surrogates, which UTF-8 refuses.
    return text.encode("utf-8", "surrogatepass")


def first_of_each(keys: Tensor) -> Tensor:
    """Row numbers of the first row of each distinct key, in ascending order of the keys.

    Args:
        keys: [M, k] int64.

    Returns:
        [M'] int64, M' the number of distinct rows.
    """
    if len(keys) == 0:
        return torch.zeros(0, dtype=torch.long, device=keys.device)
    distinct, inverse = keys.unique(dim=0, return_inverse=True)
    rows = torch.arange(len(keys), device=keys.device)
    return torch.full((len(distinct),), len(keys), device=keys.device).scatter_reduce(0, inverse, rows, "amin")


def mean_or_absent(values: Tensor) -> Tensor:
    """The mean as float64 scalar, or -1 where there is nothing to average."""
    return values.double().mean() if values.numel() else values.new_full((), ABSENT, dtype=torch.float64)


def boxes_of(item: Any) -> Tensor:
    """[K, 4] float64 boxes of an Answer, a target, a dict with ``boxes`` or a box tensor."""
    if isinstance(item, Mapping):
        return as_boxes(item["boxes"])
    return as_boxes(getattr(item, "boxes", item))


class FlatMetric(Metric):
    """A metric whose states are tensors of rows; a rank without any row takes part in the sync.

    Args:
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._seeds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._next_unnamed = _unnamed_keys()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy gives keys of its own to what comes without an id."""
        super().__setstate__(state)
        self._next_unnamed = _unnamed_keys()

    def set_dtype(self, dst_type: str | torch.dtype) -> FlatMetric:
        """Rows keep their dtypes: ids and counts are whole numbers, and the rest has to be float64."""
        return self

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        for name in self._seeds:
            self._seed(name)

    def _add_rows_state(self, name: str, columns: int | None = None, dtype: torch.dtype = torch.float64) -> None:
        """Add a state of rows: [., columns], or [.] when `columns` is None."""
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self._seeds[name] = ((0,) if columns is None else (0, columns), dtype)
        self._seed(name)

    def _seed(self, name: str) -> None:
        # Without it torchmetrics gathers a 1-D float32 tensor from a rank that has no rows, and the others abort.
        shape, dtype = self._seeds[name]
        getattr(self, name).append(torch.zeros(shape, dtype=dtype, device=self.device))

    def _add_rows(self, name: str, rows: Tensor | Sequence[Any]) -> None:
        shape, dtype = self._seeds[name]
        rows = torch.as_tensor(rows, dtype=dtype, device=self.device).reshape(-1, *shape[1:])
        getattr(self, name).append(rows)

    def _rows(self, name: str) -> Tensor:
        state = getattr(self, name)
        filled = [rows for rows in state if len(rows)] if isinstance(state, list) else []
        return filled[0] if len(filled) == 1 else dim_zero_cat(state)  # one chunk needs no copy

    def _key(self, value: SampleId | None) -> int:
        """The id as int64; None makes a new one that no other call and no other rank makes."""
        if value is not None:
            return stable_id(value)
        self._next_unnamed += 1  # never reset: forward() resets and then puts the old rows back
        return self._next_unnamed

    def _keys(self, ids: Sequence[SampleId | None] | None, count: int) -> list[int]:
        ids = [None] * count if ids is None else ids
        if len(ids) != count:
            raise ValueError(f"Expected one id per sample, found {len(ids)} for {count} samples.")
        return [self._key(value) for value in ids]

    def _add_name_states(self) -> None:
        """Two states that hold (class id, name) pairs: strings travel through the sync as bytes."""
        self._add_rows_state("named", 2, torch.int64)
        self._add_rows_state("letters", dtype=torch.uint8)

    def _add_names(self, pairs: Iterable[tuple[int, str]]) -> None:
        encoded = [(key, _bytes(name)) for key, name in pairs]
        self._add_rows("named", [[key, len(name)] for key, name in encoded])
        self._add_rows("letters", list(b"".join(name for _, name in encoded)))

    def _names(self) -> dict[int, str]:
        """Class id -> name, of all ranks, in ascending order of the names."""
        names: dict[int, str] = {}
        start, letters = 0, bytes(self._rows("letters").tolist())
        for key, length in self._rows("named").tolist():
            names.setdefault(key, letters[start : start + length].decode("utf-8", "surrogatepass"))
            start += length
        return dict(sorted(names.items(), key=lambda pair: pair[1]))


class SampleMetric(FlatMetric):
    """A metric that keeps one row of numbers per sample; a sample that occurs again (padding) counts once.

    Args:
        columns: numbers per sample.
        **kwargs: see :class:`torchmetrics.Metric`.
    """

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_rows_state("ids", dtype=torch.int64)
        self._add_rows_state("values", columns)

    def _add_samples(self, ids: Sequence[SampleId | None] | None, rows: Sequence[Any]) -> None:
        """Add a row [columns], a tensor or numbers, per sample."""
        self._add_rows("ids", self._keys(ids, len(rows)))
        self._add_rows("values", torch.stack(list(rows)) if rows and isinstance(rows[0], Tensor) else rows)

    def _kept(self) -> Tensor:
        """Row numbers of the distinct samples in the order of their ids: sums do not depend on ranks or batches."""
        return first_of_each(self._rows("ids")[:, None])

    def _samples(self) -> Tensor:
        """[M, columns] float64 rows of the distinct samples."""
        return self._rows("values")[self._kept()]


class ParseRate(SampleMetric):
    """Share of answers that could be read (``Answer.parsed``).

    ``compute`` returns ``parse_rate`` in [0, 1] (-1 without samples), ``n_samples`` and ``n_unasked``.
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(2, **kwargs)  # parsed, unasked

    def update(
        self,
        answers: Sequence[Any],
        ids: Sequence[SampleId | None] | None = None,
        *,
        unasked: Sequence[bool] | None = None,
    ) -> None:
        """Add answers.

        Args:
            answers: Answers, or anything else with ``parsed``.
            ids: the samples they belong to; a sample counts once. None: all are different samples.
            unasked: of each, whether its question was not asked: then it is counted, but no answer. None: of none.
        """
        unasked = [False] * len(answers) if unasked is None else unasked
        rows = [[float(answer.parsed), float(left)] for answer, left in zip(answers, unasked, strict=True)]
        self._add_samples(ids, rows)

    def compute(self) -> dict[str, Tensor]:
        """The share, the number of samples and the number of those that were not asked; float64 scalars."""
        parsed, unasked = self._samples().unbind(1)
        asked = parsed[unasked == 0]
        counts = {"n_samples": float(len(asked)), "n_unasked": float(len(parsed) - len(asked))}
        return {"parse_rate": mean_or_absent(asked), **{key: parsed.new_tensor(n) for key, n in counts.items()}}


class ClassNames(FlatMetric):
    """Names of class ids, collected from all ranks (a rank may never see a sample of some class)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_name_states()
        self._known: set[int] = set()

    def update(self, names: Mapping[int, str]) -> None:
        """Add class id -> name; a class that is known already is skipped."""
        self._add_names((key, name) for key, name in names.items() if key not in self._known)
        self._known.update(names)

    def compute(self) -> dict[int, str]:
        """Class id -> name, in ascending order of the names."""
        return self._names()

    def reset(self) -> None:
        """Forget all names."""
        super().reset()
        self._known = set()


__all__ = ["ABSENT", "ClassNames", "FlatMetric", "ParseRate", "SampleId", "SampleMetric", "stable_id"]
