"""Rollouts joined to a batch, and cut into the micro-batches of its optimiser steps.

Shape legend: B prompts, b prompts of a micro-batch, G completions per prompt, N = B*G, C completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from rft_lightning.policy.group_row import GroupRow
from rft_lightning.policy.shared_prefix import group_row
from rft_lightning.sample import PromptBatch, Rollouts


@dataclass
class MicroBatch:
    """A few groups of one optimiser step.

    Attributes:
        rollouts: of b prompts.
        mask: [b*G, C] True on the tokens that count.
        rows: which of the N completions of the rollout batch these are.
        old_logp: [b*G, C] log-probs under the policy that sampled; None where it is still the policy itself.
        ref_logp: [b*G, C] log-probs under the reference model.
        old_entropy: [b*G, C] entropies under the policy that sampled.
    """

    rollouts: Rollouts
    mask: Tensor
    rows: slice
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    old_entropy: Tensor | None = None

    @cached_property
    def row(self) -> GroupRow:
        """Where the tokens stand in one row: the same for every pass over them."""
        return group_row(self.rollouts.prompts, self.rollouts.lengths, self.rollouts.completion_ids.shape[-1])

    @property
    def sampler_logp(self) -> Tensor | None:
        """[b*G, C] log-probs as the rollout engine computed them; None if it does not tell."""
        return None if self.rollouts.logprobs is None else self.rollouts.logprobs.flatten(0, 1)

    def of(self, values_N: Tensor) -> Tensor:
        """The part of a tensor with one entry per completion of the rollout batch that belongs here: [b*G]."""
        return values_N[self.rows]


@dataclass
class BatchCounts:
    """What the loss of a rollout batch is divided by: counts of one process, averaged over all.

    Gradients are averaged over processes, so the division is by the mean count, not by the sum.

    Attributes:
        completions: N, alike on every process.
        tokens: tokens that count.
        acting_tokens: tokens that act, where only those of highest entropy do; all that count otherwise.
        entropy_threshold: the entropy from which they do.
    """

    completions: int
    tokens: float
    acting_tokens: float
    entropy_threshold: Tensor | None = None


def count_tokens(masks: list[Tensor]) -> Tensor:
    """Number of true entries in all masks, as a tensor on their device."""
    return torch.stack([mask.sum() for mask in masks]).sum()


def cut(
    rollouts: Rollouts, *, mini_batch_prompts: int | None, micro_batch_prompts: int | None, mask_truncated: bool = False
) -> list[list[MicroBatch]]:
    """The mini-batches of a rollout batch, one per optimiser step, as lists of micro-batches.

    Args:
        rollouts: of B prompts.
        mini_batch_prompts: prompts per mini-batch; all when None.
        micro_batch_prompts: prompts per micro-batch; a mini-batch when None.
        mask_truncated: let no token count of a completion that the length limit cut off.
    """
    group_size = rollouts.completion_ids.shape[1]

    def micro(prompts: range) -> MicroBatch:
        part = rollouts.select(prompts.start, prompts.stop)
        mask_BGC = part.completion_mask
        if mask_truncated:
            mask_BGC = mask_BGC & ~part.truncated[..., None]
        rows = slice(prompts.start * group_size, prompts.stop * group_size)
        return MicroBatch(part, mask_BGC.flatten(0, 1), rows)

    minis = _pieces(range(len(rollouts)), mini_batch_prompts)
    return [[micro(prompts) for prompts in _pieces(mini, micro_batch_prompts)] for mini in minis]


def _pieces(prompts: range, size: int | None) -> list[range]:
    size = size or len(prompts)
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def join_rollouts(batch: PromptBatch, parts: list[Rollouts], pad: int) -> Rollouts:
    """Rollouts of consecutive chunks of `batch` as one, padded to the longest completion."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.completion_ids.shape[-1] for part in parts)

    def joined(tensors: list[Tensor], value: int) -> Tensor:
        return torch.cat([nn.functional.pad(tensor, (0, width - tensor.shape[-1]), value=value) for tensor in tensors])

    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return Rollouts(
        prompts=_with_inputs_of(batch, [part.prompts for part in parts]),
        completion_ids=joined([part.completion_ids for part in parts], pad),
        completion_mask=joined([part.completion_mask for part in parts], False),
        texts=[texts for part in parts for texts in part.texts],
        truncated=torch.cat([part.truncated for part in parts]),
        logprobs=joined(logprobs, 0) if len(logprobs) == len(parts) else None,
    )


def _with_inputs_of(batch: PromptBatch, parts: list[PromptBatch]) -> PromptBatch:
    """The batch with the positions and features that were worked out for its parts."""
    positions = [part.positions for part in parts if part.positions is not None]
    features = [part.features for part in parts if part.features is not None]
    width = batch.input_ids.shape[1]
    if len(positions) == len(parts):
        wide = [nn.functional.pad(part, (width - part.shape[-1], 0)) for part in positions]
        batch = replace(batch, positions=torch.cat(wide, -2))
    if len(features) == len(parts):
        batch = replace(batch, features=[of_prompt for part in features for of_prompt in part])
    return batch
