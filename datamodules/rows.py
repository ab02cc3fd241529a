"""Row: one question about one picture before its sample is made; what draws, manifests and summaries deal with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rft_lightning.sample import Sample


@dataclass(frozen=True, slots=True)
class Row:
    """One question about one picture.

    Attributes:
        id: id of its sample: unique in the data set, the same on every machine (no absolute path).
        image: the picture: its id or path in the data set.
        label: name of the class that shots are counted by; "" where there are no classes (grounding).
        instances: objects of the class in the picture; 0 for a question about what is not there.
    """

    id: str
    image: str | int
    label: str
    instances: int = 1


class SampleRows(Sequence):
    """The samples of rows, made when they are asked for.

    Holds the rows and `make` alone, so that a loader's workers hold no annotations but those that `make` needs.
    """

    def __init__(self, rows: Sequence[Row], make: Callable[[Row], Sample]) -> None:
        self.rows, self.make = rows, make

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return SampleRows(self.rows[position], self.make)
        return self.make(self.rows[position])


__all__ = ["Row", "SampleRows"]
