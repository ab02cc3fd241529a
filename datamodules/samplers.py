"""Samplers whose order depends on nothing but their arguments, for any number of processes.

Shape legend: B prompts per process and batch, W processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class RolloutBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of prompts for rollouts: an endless shuffled stream, cut into global batches, each cut by rank.

    The stream is one seeded permutation of the rows after another. A global batch is `batch_size * world_size`
    consecutive entries, of which each rank takes its own slice, so 1 and 8 processes with the same global batch see the
    same prompts in the same steps, and no row is dropped at the end of a pass. Each entry is (row, occurrence), where
    occurrence counts earlier entries of the same row in the same global batch (a few-shot set may be smaller than it).

    One epoch is `len(sampler)` batches: as many whole global batches as fit into one pass, at least one.

    Args:
        size: number of rows.
        batch_size: B, prompts per process and batch.
        rank: this process.
        world_size: W, number of processes.
        seed: seed of the permutations.
        shuffle: False keeps the rows in order.
    """

    def __init__(
        self, size: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self._next = 0  # first batch of the next epoch, counted from the start of training
        self._first = 0  # first batch of the epoch that is being iterated

    def __len__(self) -> int:
        return max(1, self.size // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self._first = self._next
        self._next += len(self)
        yield from (self.batch(number) for number in range(self._first, self._next))

    def batch(self, number: int) -> list[tuple[int, int]]:
        """This rank's part of global batch `number`."""
        width = self.batch_size * self.world_size
        rows = self._stream(number * width, (number + 1) * width)
        seen: Counter[int] = Counter()
        entries = []
        for row in rows:
            entries.append((row, seen[row]))
            seen[row] += 1
        return entries[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _stream(self, start: int, stop: int) -> list[int]:
        passes = {p: self._permutation(p) for p in range(start // self.size, (stop - 1) // self.size + 1)}
        return [passes[i // self.size][i % self.size] for i in range(start, stop)]

    def _permutation(self, number: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        return torch.randperm(self.size, generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The epoch that is being iterated; the loader counts the batches within it."""
        return {"first": self._first, "length": len(self), "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the epoch of `state`.

        Raises:
            ValueError: the training split has another number of rows than when the checkpoint was written.
        """
        if state["size"] != self.size:
            raise ValueError(
                f"The checkpoint was written with {state['size']} training rows, the data now has {self.size}; "
                "resume with the same data settings, or start a new run from the exported policy."
            )
        self._next = state["first"]


class EvaluationSampler(Sampler[tuple[int, int]]):
    """Every row once over all processes: rank r takes rows r, r + W, ... without padding, so nothing counts twice."""

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.rows = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter((row, 0) for row in self.rows)
