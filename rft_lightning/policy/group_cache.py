"""What a rollout keeps on the device: keys and values with each prompt's stored once, and recorded decode steps.

Shape legend: n rows that grow, s groups they belong to, h key heads, D width of a head, P prompt tokens, c room for
completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class GroupCache:
    """Keys and values of one decoder layer: the prompts' [s, h, P, D] and the rows' own [n, h, c, D]."""

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor

    def add(self, keys: Tensor, values: Tensor, width: int, rows: int, room: int) -> None:
        """Further prompts, moved to the right end of `width` columns, and rows with room for own keys."""
        padding = (0, 0, width - keys.shape[2], 0)
        prompt = [nn.functional.pad(x, padding) for x in (keys, values)]
        own = [x.new_zeros(rows, x.shape[1], room, x.shape[3]) for x in (keys, values)]
        if hasattr(self, "own_keys"):
            prompt = [torch.cat(pair) for pair in zip((self.prompt_keys, self.prompt_values), prompt, strict=True)]
            own = [torch.cat(pair) for pair in zip((self.own_keys, self.own_values), own, strict=True)]
        self.prompt_keys, self.prompt_values = prompt
        self.own_keys, self.own_values = own

    def keep(self, rows: Tensor, groups: Tensor | None) -> None:
        """Drop all other rows and, unless None, groups."""
        self.own_keys, self.own_values = self.own_keys[rows], self.own_values[rows]
        if groups is not None:
            self.prompt_keys, self.prompt_values = self.prompt_keys[groups], self.prompt_values[groups]

    def grow(self, room: int) -> None:
        """Room for further own keys."""
        padding = (0, 0, 0, room - self.own_keys.shape[2])
        self.own_keys = nn.functional.pad(self.own_keys, padding)
        self.own_values = nn.functional.pad(self.own_values, padding)

    def write(self, keys: Tensor, values: Tensor, column: int | None, columns_n: Tensor) -> None:
        """One further key and value [n, h, D] per row, at one column for all or one of each."""
        for stored, new in ((self.own_keys, keys), (self.own_values, values)):
            if column is not None:
                stored[:, :, column] = new
            else:
                rows = torch.arange(len(new), device=new.device)
                # A row that is finished but not yet dropped may have run past the end.
                stored[rows, :, columns_n.clamp(max=stored.shape[2] - 1)] = new

    def own(self, width: int) -> tuple[Tensor, Tensor]:
        """[n, width, h, D] of both."""
        return self.own_keys[:, :, :width].transpose(1, 2), self.own_values[:, :, :width].transpose(1, 2)

    def prompts(self, width: int) -> tuple[Tensor, Tensor]:
        """[s, width, h, D] of both, the last columns."""
        return self.prompt_keys[:, :, -width:].transpose(1, 2), self.prompt_values[:, :, -width:].transpose(1, 2)


def captured(run: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """A CUDA graph of `run`, which must read and write the same memory in every call; returns what replays it.

    Args:
        run: what to record.
        device: the GPU it runs on.
        pool: handle of the memory that recordings share.
    """
    with torch.cuda.device(device):
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):  # what is set up on first use must not be recorded
            run()
        current.wait_stream(other)
        graph = torch.cuda.CUDAGraph()
        # Threads that load data may go on allocating.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay
