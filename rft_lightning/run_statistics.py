"""Numbers of a rollout batch for the log, under TRL's names where TRL has them."""

from __future__ import annotations

import math
import time

import torch

from rft_lightning.collectives import gather_objects
from rft_lightning.sample import Rollouts


class Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End the phase that is running; a phase that comes again adds up."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def statistics(self) -> dict[str, float]:
        """``step_time`` and ``time/<phase>``, means over all processes."""
        everyone = gather_objects(self.seconds)
        means = {phase: sum(seconds[phase] for seconds in everyone) / len(everyone) for phase in self.seconds}
        return {"step_time": sum(means.values()), **{f"time/{phase}": mean for phase, mean in means.items()}}


def length_statistics(rollouts: Rollouts) -> dict[str, float]:
    """Lengths of completions in tokens, and the share that the length limit cut off, over all processes.

    ``terminated`` lengths are those of completions that ended by themselves; NaN where none did.
    """
    own = rollouts.completion_mask.sum(-1).flatten().cpu(), rollouts.truncated.flatten().cpu()
    everyone = gather_objects(own)
    lengths = torch.cat([lengths for lengths, _ in everyone]).float()
    truncated = torch.cat([truncated for _, truncated in everyone])
    ended = lengths[~truncated] if not bool(truncated.all()) else torch.tensor([math.nan])
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/min_terminated_length": float(ended.min()),
        "completions/max_terminated_length": float(ended.max()),
        "completions/clipped_ratio": float(truncated.float().mean()),
    }


def is_count(name: str) -> bool:
    """Whether a statistic counts what occurs now and then, so that a batch without it has 0 of it."""
    return name.startswith("parse_problems/") or name.endswith("/failed")
