"""Group sampling: G completions for each of B prompts.

Shape legend: B prompts, G completions per prompt, N = B*G rows, P prompt tokens, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.families import base_model, end_token_ids, vision_token_ids
from rft_lightning.sample import PromptBatch, Rollouts


@torch.no_grad()
def sample_groups(
    model: Any,
    prompts: PromptBatch,
    group_size: int,
    *,
    tokenizer: Any,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
) -> Rollouts:
    """Sample `group_size` completions for each prompt with the model's own ``generate``.

    The checkpoint's generation settings are not used (Qwen2-VL's are near-greedy with a repetition penalty, under
    which sampled tokens would not follow the policy); only its end-of-sequence tokens are. Image and video placeholder
    tokens are never sampled. The model is in eval mode with a cache during the call and left as it was found.

    Args:
        model: the policy: a Hugging Face model with ``generate``, or an adapter around one.
        prompts: B prompts, left-padded.
        group_size: G, completions per prompt.
        tokenizer: decodes the completions.
        max_completion_length: most tokens of a completion.
        temperature: divides the logits; 0 decodes greedily.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the fewest tokens that hold this much probability; 1 for all.
        min_p: leave out tokens less likely than this share of the likeliest one; 0 for none.
        seed: seeds this call's sampling noise without touching the global random state; None draws from it.

    Raises:
        ConfigConflictError: a sampling setting is out of its range.
    """
    _check(group_size, max_completion_length, temperature, top_k, top_p, min_p)
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    sampling = temperature > 0
    settings: dict[str, Any] = {
        "do_sample": sampling,
        "num_return_sequences": group_size,
        "max_new_tokens": max_completion_length,
        "eos_token_id": ends,
        "pad_token_id": pad,
        "suppress_tokens": vision_token_ids(base_model(model).config),
        "use_cache": True,
    }
    if sampling:
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p or None}
    with _generating(model, settings), _seeded(seed, prompts.input_ids.device):
        sequences_NT = model.generate(
            input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, **prompts.vision
        )
    ids_NC = sequences_NT[:, prompts.input_ids.shape[1] :]
    mask_NC, truncated_N = completion_mask(ids_NC, ends)
    ids_NC = ids_NC.masked_fill(~mask_NC, pad)
    texts = tokenizer.batch_decode(ids_NC, skip_special_tokens=True)
    shape = (len(prompts), group_size)
    return Rollouts(
        prompts=prompts,
        completion_ids=ids_NC.view(*shape, -1),
        completion_mask=mask_NC.view(*shape, -1),
        texts=[texts[i * group_size : (i + 1) * group_size] for i in range(len(prompts))],
        truncated=truncated_N.view(shape),
    )


def completion_mask(ids_NC: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """[N, C] True up to and including the first end token, and [N] True where there is none (truncated)."""
    is_end = torch.isin(ids_NC, torch.tensor(ends, device=ids_NC.device))
    mask = (is_end.long().cumsum(1) - is_end.long()) == 0
    return mask, ~is_end.any(1)


@contextmanager
def _generating(model: nn.Module, settings: dict[str, Any]) -> Iterator[None]:
    """Eval mode, and a generation config of our settings alone (unset fields would come from the checkpoint)."""
    from transformers import GenerationConfig

    inner = base_model(model)
    before, training = inner.generation_config, model.training
    inner.generation_config = GenerationConfig(**settings)
    model.eval()
    try:
        yield
    finally:
        inner.generation_config = before
        model.train(training)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _check(group_size: int, length: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    rules = {
        f"group_size >= 1, found {group_size}": group_size >= 1,
        f"max_completion_length >= 1, found {length}": length >= 1,
        f"temperature >= 0, found {temperature}": temperature >= 0,
        f"group_size == 1 with greedy decoding (temperature 0), found {group_size}": temperature > 0 or group_size == 1,
        f"top_k >= 0, found {top_k}": top_k >= 0,
        f"0 < top_p <= 1, found {top_p}": 0 < top_p <= 1,
        f"0 <= min_p <= 1, found {min_p}": 0 <= min_p <= 1,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ConfigConflictError(f"Expected {rule}.")
