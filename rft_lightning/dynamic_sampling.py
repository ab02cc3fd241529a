"""Dynamic sampling (DAPO, arXiv 2503.14476): train on groups whose answers differ in reward; the others teach nothing.

The loader fetches `data.oversample` waves of prompts per batch, so nothing is fetched within a training step. The
second and later waves are rolled out only while a process is short of groups, by all processes together, since a
sharded policy cannot be gathered by some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from rft_lightning.collectives import everywhere
from rft_lightning.rollout_batches import join_rollouts
from rft_lightning.sample import PromptBatch, Rollouts
from rft_lightning.scoring import Scores, join_scores


def roll_out_waves(
    batch: PromptBatch,
    sample: Callable[[PromptBatch], tuple[Rollouts, Scores]],
    informative: Callable[[Scores], Tensor],
    pad: int,
) -> tuple[Rollouts, Scores, list[int], int]:
    """Roll out wave after wave until every process has enough groups to learn from, or no wave is left.

    Args:
        batch: the prompts of all waves; all processes have as many.
        sample: rolls out and scores the prompts of one wave.
        informative: [B] whether the answers of each group differ in reward.
        pad: padding token.

    Returns:
        everything that was rolled out, its scores, the numbers of the groups to train on (see :func:`choose_groups`),
        and the number of waves.
    """
    waves = batch.chunks(len(batch) // batch.waves)
    parts: list[tuple[Rollouts, Scores]] = []
    useful: list[bool] = []
    for wave in waves:
        parts.append(sample(wave))
        useful += informative(parts[-1][1]).tolist()
        if len(waves) == 1 or everywhere(sum(useful) >= len(wave)):
            break
    rolled_out = batch if len(parts) == len(waves) else batch.select(0, len(useful))
    rollouts = join_rollouts(rolled_out, [rollouts for rollouts, _ in parts], pad)
    return rollouts, join_scores([scores for _, scores in parts]), choose_groups(useful, len(waves[0])), len(parts)


def choose_groups(informative: Sequence[bool], size: int) -> list[int]:
    """The first `size` informative groups, in order; where there are fewer, the first others beside them.

    So every process makes optimiser steps of the same size. The advantages of the others are zero, as each baseline
    that dynamic sampling is allowed with is a group's own.
    """
    ranked = sorted(range(len(informative)), key=lambda group: not informative[group])
    return sorted(ranked[:size])
