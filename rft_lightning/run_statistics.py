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
        """``step_time`` and ``time/<phase>``."""
        return {"step_time": sum(self.seconds.values()), **{f"time/{name}": s for name, s in self.seconds.items()}}


def length_statistics(rollouts: Rollouts) -> dict[str, float]:
    """Lengths of completions in tokens, and the share that the length limit cut off.

    ``terminated`` lengths are those of completions that ended by themselves; NaN where none did.
    """
    lengths = rollouts.completion_mask.sum(-1).flatten().float().cpu()
    truncated = rollouts.truncated.flatten().cpu()
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


def over_processes(values: dict[str, float]) -> dict[str, float]:
    """Statistics of all processes as one, from those that have a number: ranks of a mixture may hold other rewards.

    Means over processes, but extremes of what is named ``min`` or ``max``, and sums of what is named ``failed``.
    """
    gathered = gather_objects(values)
    names = dict.fromkeys(name for local in gathered for name in local)
    combined = {}
    for name in names:
        absent = 0.0 if is_count(name) else math.nan
        numbers = [number for number in (local.get(name, absent) for local in gathered) if not math.isnan(number)]
        combined[name] = _combine(name, numbers) if numbers else math.nan
    return combined


def _combine(name: str, numbers: list[float]) -> float:
    words = name.rsplit("/", 1)[-1].split("_")
    if "min" in words:
        return min(numbers)
    if "max" in words:
        return max(numbers)
    return sum(numbers) if words == ["failed"] else sum(numbers) / len(numbers)
