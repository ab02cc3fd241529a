"""Samplers whose order depends on nothing but their arguments, for any number of processes.

Shape legend: B prompts per process and wave, W processes, O waves per batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from rft_lightning.errors import ConfigConflictError
from rft_lightning.sample import NOT_COUNTED


class RolloutBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of prompts for rollouts: an endless shuffled stream, cut into global batches, each cut by rank.

    The stream is one seeded permutation of the rows after another. A global batch is `batch_size * world_size`
    consecutive entries, of which each rank takes its own slice, so 1 and 8 processes with the same global batch see the
    same prompts in the same steps, and no row is dropped at the end of a pass. Each entry is (row, occurrence), where
    occurrence counts earlier entries of the same row in the same global batch (a few-shot set may be smaller than it).

    For dynamic sampling, `oversample` such batches (waves) make one: a rank's batch is its slice of each, one behind
    the other.

    One epoch is `len(sampler)` batches: as many whole global batches as fit into one pass, at least one.

    Args:
        size: number of rows.
        batch_size: B, prompts per process and batch.
        rank: this process.
        world_size: W, number of processes.
        seed: seed of the permutations.
        oversample: O, waves per batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        oversample: int = 1,
    ) -> None:
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size
        self.seed, self.oversample = seed, oversample
        self._next = 0  # first batch of the next epoch, counted from the start of training
        self._first = 0  # first batch of the epoch that is being iterated
        self._done = 0  # how many batches of that epoch were handed out
        self._skip = 0  # how many batches the next epoch leaves out, since they were handed out before a checkpoint
        self._passes: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return max(1, self.size // self._width)

    @property
    def _width(self) -> int:
        """Entries of a global batch."""
        return self.batch_size * self.world_size * self.oversample

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self._first, self._next = self._next, self._next + len(self)
        self._done, self._skip = self._skip, 0
        for number in range(self._first + self._done, self._next):
            self._done += 1
            yield self.batch(number)

    def batch(self, number: int) -> list[tuple[int, int]]:
        """This rank's part of global batch `number`."""
        rows = self._stream(number * self._width, (number + 1) * self._width)
        seen: Counter[int] = Counter()
        entries = []
        for row in rows:
            entries.append((row, seen[row]))
            seen[row] += 1
        wave, first = self.batch_size * self.world_size, self.rank * self.batch_size
        starts = range(first, self._width, wave)
        return [entry for start in starts for entry in entries[start : start + self.batch_size]]

    def _stream(self, start: int, stop: int) -> list[int]:
        return [self._pass(i // self.size)[i % self.size] for i in range(start, stop)]

    def _pass(self, number: int) -> list[int]:
        """The rows of one pass; the last two are kept, since a batch may lie across them."""
        if number not in self._passes:
            self._passes = {n: rows for n, rows in self._passes.items() if n == number - 1}
            self._passes[number] = self._permutation(number)
        return self._passes[number]

    def _permutation(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        return torch.randperm(self.size, generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch that is being iterated; StatefulDataLoader leaves it to a sampler that has a state."""
        return {"first": self._first, "done": self._done, "length": len(self), "size": self.size, "width": self._width}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was handed out; with the next epoch, if that was the last of its own.

        Raises:
            ConfigConflictError: the training split has another number of rows, or the global batch another size, than
                when the checkpoint was written.
        """
        if state["size"] != self.size:
            raise ConfigConflictError(
                f"The checkpoint was written with {state['size']} training rows, the data now has {self.size}; "
                "resume with the same data settings, or start a new run from the exported policy."
            )
        if state["width"] != self._width:
            times = "" if self.oversample == 1 else f" times data.oversample {self.oversample}"
            raise ConfigConflictError(
                f"The checkpoint was written with {state['width']} prompts per global batch, now there are "
                f"{self.batch_size} on each of {self.world_size} processes{times}; set data.batch_size so that their "
                "product is the same, or start a new run from the exported policy."
            )
        self._first, self._done = state["first"], state["done"]
        at_end = self._done >= state["length"]
        self._next = self._first + (state["length"] if at_end else 0)
        self._skip = 0 if at_end else self._done


class EvaluationSampler(Sampler[tuple[int, int]]):
    """Every row once over all processes, without padding, so nothing counts twice.

    The rows are cut into batches, of which rank r takes every W-th from r on: what a row is computed with, which may
    change its last bits, is the same on any number of processes. With more processes than batches, those without one
    get the first row with the occurrence NOT_COUNTED: Lightning would leave their loops out, and with them what all
    processes do together.

    Args:
        size: number of rows.
        rank: this process.
        world_size: W, number of processes.
        batch_size: rows of a batch.
        done: rows that need not come again. A batch is left out if all of its rows are among them; the others are cut
            as if nothing were left out.
    """

    def __init__(
        self, size: int, *, rank: int = 0, world_size: int = 1, batch_size: int = 1, done: Collection[int] = ()
    ) -> None:
        batches = [range(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]
        left = [row for batch in batches[rank::world_size] if not all(row in done for row in batch) for row in batch]
        self.entries = [(row, 0) for row in left] or [(0, NOT_COUNTED)]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.entries)
