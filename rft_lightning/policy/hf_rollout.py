"""The other engine: the model's own ``generate``. Slower; there to compare with, and for what the native one lacks.

Shape legend: B prompts, N = B*G rows, P prompt tokens, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rft_lightning.policy.families import base_model, vision_token_ids
from rft_lightning.policy.noise import row_keys
from rft_lightning.policy.sampling import Sampling
from rft_lightning.sample import PromptBatch


def hf_sample(
    model: Any,
    prompts: PromptBatch,
    group_size: int,
    sampling: Sampling,
    lengths: tuple[int, int],
    ends: list[int],
    pad: int,
    seeds: tuple[int, int],
) -> Tensor:
    """Token ids [N, C] by ``generate``, with settings of ours alone (unset ones would come from the checkpoint).

    Args:
        model: the policy in eval mode.
        prompts: B prompts, left-padded.
        group_size: G.
        sampling: how tokens are drawn.
        lengths: fewest and most tokens of a completion.
        ends: tokens that end a completion.
        pad: fills rows after their end.
        seeds: run seed and optimiser step; the noise also depends on which samples the batch holds.
    """
    settings: dict[str, Any] = {
        "do_sample": not sampling.greedy,
        "num_return_sequences": 1 if sampling.greedy else group_size,
        "min_new_tokens": max(0, lengths[0] - 1) or None,
        "max_new_tokens": lengths[1],
        "eos_token_id": ends,
        "pad_token_id": pad,
        "suppress_tokens": vision_token_ids(base_model(model).config),
        "use_cache": True,
    }
    if not sampling.greedy:
        settings |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        settings["min_p"] = sampling.min_p or None
    device = prompts.input_ids.device
    key = row_keys(prompts.samples, 1, seed=seeds[0], step=seeds[1], device=torch.device("cpu")).sum()
    with _generation_config(model, settings), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(key))
        sequences_NT = model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            synced_gpus=False,  # a sharded policy is gathered for the rollout, and processes decode on their own
            **prompts.vision,
        )
    ids_NC = sequences_NT[:, prompts.input_ids.shape[1] :]
    return ids_NC.repeat_interleave(group_size, 0) if sampling.greedy else ids_NC


@contextmanager
def _generation_config(model: Any, settings: dict[str, Any]) -> Iterator[None]:
    from transformers import GenerationConfig

    inner = base_model(model)
    before = inner.generation_config
    inner.generation_config = GenerationConfig(**settings)
    try:
        yield
    finally:
        inner.generation_config = before
