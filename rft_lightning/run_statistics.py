"""Numbers of a rollout batch for the log, under TRL's names where TRL has them, and what it asked of the hardware.

Shape legend: B prompts, G completions per prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rft_lightning.collectives import gather_objects
from rft_lightning.policy.shared_prefix import PACKED, PLAIN
from rft_lightning.sample import PromptBatch, Rollouts


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


@dataclass(frozen=True)
class GroupSizes:
    """How large B groups are, as tensors on the CPU.

    Attributes:
        prompts: [B] tokens of each prompt, its image included.
        completions: [B, G] tokens of each completion, its end of sequence included.
        truncated: [B, G] True where the length limit cut a completion off.
        image_rows: [B] rows of ``pixel_values`` of each prompt: patches in the Qwen families, tiles in others.
    """

    prompts: Tensor
    completions: Tensor
    truncated: Tensor
    image_rows: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, groups: Sequence[int]) -> GroupSizes:
        """The groups of these numbers, in this order."""
        chosen = torch.tensor(groups, dtype=torch.long)
        return GroupSizes(
            self.prompts[chosen], self.completions[chosen], self.truncated[chosen], self.image_rows[chosen]
        )

    def cut(self, *most: int | None) -> list[GroupSizes]:
        """Pieces of at most so many groups; those cut again, if another number follows. None does not cut."""
        if not most:
            return [self]
        size = most[0] or len(self)
        pieces = [self.take(range(i, min(i + size, len(self)))) for i in range(0, len(self), size)]
        return [smaller for piece in pieces for smaller in piece.cut(*most[1:])]


def rollout_sizes(rollouts: Rollouts) -> GroupSizes:
    """The sizes of rollouts, in one transfer from their device."""
    completions_BG, truncated_BG = rollouts.completion_mask.sum(-1), rollouts.truncated
    completions, truncated = torch.stack([completions_BG, truncated_BG.to(completions_BG)]).cpu()
    return group_sizes(rollouts.prompts, completions, truncated.bool())


def group_sizes(prompts: PromptBatch, completions: Tensor, truncated: Tensor | None = None) -> GroupSizes:
    """The sizes of groups whose completions have these numbers of tokens [B, G]; none truncated when None."""
    truncated = torch.zeros_like(completions, dtype=torch.bool) if truncated is None else truncated
    return GroupSizes(
        prompts=torch.tensor(prompts.lengths),
        completions=completions,
        truncated=truncated,
        image_rows=torch.tensor(prompts.patch_counts),
    )


@dataclass(frozen=True)
class Workload:
    """What one training batch asked of this process.

    Attributes:
        seconds: per phase, as a :class:`Clock` took them.
        rolled_out: groups that were sampled, in the pieces that are decoded together; none in supervised runs.
        trained: groups of each micro-batch of one pass over the batch.
        layout: how their log-probs were computed: ``prefix_cache``, ``packed`` or ``plain``.
        scoring_passes: forward passes over `trained` without gradient: by the reference model, and for old log-probs.
        training_passes: forward and backward passes over `trained`.
        one_tower_pass: the training forward took the features of the rollout, with their graph.
    """

    seconds: dict[str, float]
    rolled_out: list[GroupSizes]
    trained: list[GroupSizes]
    layout: str
    scoring_passes: int
    training_passes: float
    one_tower_pass: bool = False


def forward_slots(sizes: GroupSizes, layout: str, *, one_row: bool) -> tuple[int, int]:
    """Tokens that a forward over groups is given, and the positions that it computes, padding included.

    Args:
        sizes: the groups.
        layout: ``prefix_cache``, ``packed`` or ``plain``.
        one_row: packed groups stand behind one another in one row, not in a row each.
    """
    groups, group_size = sizes.completions.shape
    prompts, completions = sizes.prompts, sizes.completions
    widest, longest = int(prompts.max()), int(completions.max())
    tokens = int(prompts.sum() + completions.sum())
    if layout == PLAIN:
        repeated = (group_size - 1) * int(prompts.sum())
        return tokens + repeated, groups * group_size * (widest + longest)
    if layout == PACKED:
        return tokens, tokens if one_row else groups * int((prompts + completions.sum(1)).max())
    return tokens, groups * (widest + group_size * longest)


def length_statistics(sizes: GroupSizes) -> dict[str, float]:
    """Lengths of completions in tokens, and the share that the length limit cut off, over all processes.

    ``terminated`` lengths are those of completions that ended by themselves; NaN where none did.
    """
    everyone = gather_objects((sizes.completions.flatten(), sizes.truncated.flatten()))
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
