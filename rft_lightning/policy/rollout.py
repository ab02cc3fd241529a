"""Group sampling: G completions for each of B prompts, the prompt and its image computed once.

Shape legend: B prompts, G completions per prompt, N = B*G rows, n rows that still grow, C completion tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.decoding import CacheDecoder, Decoder, SharedDecoder
from rft_lightning.policy.families import base_model, end_token_ids, vision_token_ids
from rft_lightning.policy.hf_rollout import hf_sample
from rft_lightning.policy.loading import evaluating
from rft_lightning.policy.noise import row_keys
from rft_lightning.policy.prompt_inputs import prepared, shares_pictures, with_features
from rft_lightning.policy.sampling import Sampling, next_tokens
from rft_lightning.policy.shared_prefix import shares_keys
from rft_lightning.sample import PromptBatch, Rollouts

ENGINES = ("native", "hf")
# Steps between two looks at which rows are finished. Looking waits for a GPU; on the CPU it costs nothing.
CHECK_EVERY = {"cuda": 8}


@torch.no_grad()
def sample_groups(
    model: Any,
    prompts: PromptBatch,
    group_size: int,
    *,
    tokenizer: Any,
    max_completion_length: int = 256,
    min_completion_length: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    step: int = 0,
    engine: str = "native",
    rollout_prompts: int | None = None,
    cuda_graphs: bool = True,
    anyone: Callable[[bool], bool] | None = None,
) -> Rollouts:
    """Sample `group_size` completions for each prompt.

    The checkpoint's generation settings are not used (Qwen2-VL's are near-greedy with a repetition penalty, under
    which sampled tokens would not follow the policy); only its end-of-sequence tokens are. Image and video placeholder
    tokens are never sampled. The model is in eval mode during the call and left as it was found.

    The native engine's noise depends on (`seed`, `step`, sample id, its occurrence, completion, position) alone: in
    float32 the completions of a sample are the same in any batch and on any number of processes. In bfloat16 the noise
    is the same, but logits depend on the shape of the batch by rounding, which may flip near-ties.

    Args:
        model: the policy: a Hugging Face vision-language model, or an adapter around one.
        prompts: B prompts, left-padded.
        group_size: G, completions per prompt; with greedy decoding they are all the same.
        tokenizer: decodes the completions.
        max_completion_length: most tokens of a completion.
        min_completion_length: no completion ends before it has so many tokens.
        temperature: divides the logits; 0 decodes greedily.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the fewest tokens that hold this much probability; 1 for all.
        min_p: leave out tokens less likely than this share of the likeliest one; 0 for none.
        seed: the run's seed; None draws one from the global random state.
        step: optimiser step, so that the same sample is answered anew in each.
        engine: ``native``, or ``hf`` for the model's own ``generate``, which computes a prompt once per completion,
            returns no log-probs and draws other noise.
        rollout_prompts: prompts whose completions grow at the same time; all when None. The next one begins when as
            many rows as it needs are finished; with the ``hf`` engine, and where the prompts' keys are not shared
            (docs/adding-a-model.md), when all are.
        cuda_graphs: on CUDA, replay decode steps as graphs instead of launching their kernels one by one.
        anyone: for a policy whose weights are gathered from all processes in each forward, of which all must then make
            the same number: tells the others whether this process has rows to grow, and returns whether any has. The
            ``native`` engine alone can do so.

    Raises:
        ConfigConflictError: a setting is out of its range.
        CheckpointError: there is no token to end or fill completions with.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    lengths = min_completion_length, max_completion_length
    _check(group_size, lengths, engine, rollout_prompts)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    ends = end_token_ids(model, tokenizer)
    if tokenizer.pad_token_id is None and not ends:
        raise CheckpointError(
            "The tokenizer has no padding token, and neither it nor the model's generation settings name one that ends "
            "a completion. Set tokenizer.eos_token, or eos_token_id in the checkpoint's generation_config.json."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    at_once = rollout_prompts or len(prompts)
    parts: list[tuple[Tensor, Tensor | None]] = []
    with evaluating(model):
        # Processes that decode together make the same number of passes, whatever pictures they have.
        alone = anyone is None
        prompts = asked = prepared(model, prompts, at_once, share=alone)
        if alone and engine == "native" and shares_pictures(model, prompts):
            asked = with_features(model, prompts, at_once)  # not for what comes after: training may change them
        shared = engine == "native" and shares_keys(model)
        refills = shared and alone
        for chunk in [asked] if refills else asked.chunks(at_once):
            if engine == "hf":
                ids_NC = hf_sample(model, chunk, group_size, sampling, lengths, ends, pad, (seed, step))
                parts.append((ids_NC, None))
                continue
            device = chunk.input_ids.device
            keys_N = row_keys(chunk.samples, group_size, seed=seed, step=step, device=device)
            forbidden = torch.tensor(vision_token_ids(base_model(model).config), dtype=torch.long, device=device)
            decoder: Decoder = CacheDecoder(model, chunk, group_size)
            if shared:
                capture = cuda_graphs and device.type == "cuda"
                decoder = SharedDecoder(model, chunk, group_size, at_once=at_once, capture=capture, share=alone)
            parts.append(grow(decoder, keys_N, sampling, lengths, ends, pad, forbidden, anyone))
    ids_NC = torch.cat([_widened(ids, max_completion_length, pad) for ids, _ in parts])
    logprobs = [_widened(logp, max_completion_length, 0.0) for _, logp in parts if logp is not None]
    return _as_rollouts(prompts, ids_NC, torch.cat(logprobs) if logprobs else None, ends, pad, tokenizer)


def _widened(rows_NC: Tensor, width: int, value: float) -> Tensor:
    return nn.functional.pad(rows_NC, (0, width - rows_NC.shape[1]), value=value)


def grow(
    decoder: Decoder,
    keys_N: Tensor,
    sampling: Sampling,
    lengths: tuple[int, int],
    ends: list[int],
    pad: int,
    forbidden: Tensor,
    anyone: Callable[[bool], bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample until every row of the decoder is finished.

    Args:
        decoder: holds the prompts.
        keys_N: the rows' noise keys.
        sampling: how tokens are drawn.
        lengths: fewest and most tokens of a completion.
        ends: tokens that end one.
        pad: fills rows after their end.
        forbidden: ids of tokens that are never drawn.
        anyone: see :func:`sample_groups`.

    Returns:
        token ids [N, C] and their log-probs [N, C], 0 after the end.
    """
    shortest, longest = lengths
    device = keys_N.device
    # The last column is where rows write that are finished but still run.
    ids_NC = torch.full((len(keys_N), longest + 1), pad, dtype=torch.long, device=device)
    logp_NC = torch.zeros(ids_NC.shape, device=device)
    stops = torch.tensor(ends, device=device)
    rows = decoder.admit()
    position, finished = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    step, check_every, begun = 0, CHECK_EVERY.get(device.type, 1), 0
    while True:
        held = (stops, position + 1 < shortest) if shortest > 1 else None
        tokens, logp = next_tokens(decoder.logits, sampling, keys_N[rows], position, forbidden, held)
        tokens = tokens.masked_fill(finished, pad)
        column = position.masked_fill(finished, longest)
        ids_NC[rows, column], logp_NC[rows, column] = tokens, logp
        position = position + 1
        finished = finished | torch.isin(tokens, stops) | (position == longest)
        step += 1
        if step % check_every == 0 or (step - begun == longest and anyone is None):
            running = [i for i, done in enumerate(finished.tolist()) if not done]
            if not (bool(running) if anyone is None else anyone(bool(running))) and not decoder.waiting:
                break
            if anyone is None and len(rows) - len(running) >= max(1, int(decoder.drop_share * len(rows))):
                kept = torch.tensor(running, dtype=torch.long, device=device)
                rows, tokens, position, finished = rows[kept], tokens[kept], position[kept], finished[kept]
                decoder.keep(running)
        if len(rows):
            decoder.extend(tokens)
        if decoder.waiting:
            new = decoder.admit()
            begun = step if len(new) else begun
            rows, position = torch.cat([rows, new]), torch.cat([position, torch.zeros_like(new)])
            finished = torch.cat([finished, torch.zeros_like(new, dtype=torch.bool)])
    return ids_NC[:, :longest], logp_NC[:, :longest]


def completion_mask(ids_NC: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """[N, C] True up to and including the first end token, and [N] True where there is none (truncated)."""
    is_end = torch.isin(ids_NC, torch.tensor(ends, device=ids_NC.device))
    mask = (is_end.long().cumsum(1) - is_end.long()) == 0
    return mask, ~is_end.any(1)


def _as_rollouts(
    prompts: PromptBatch, ids_NC: Tensor, logp_NC: Tensor | None, ends: list[int], pad: int, tokenizer: Any
) -> Rollouts:
    mask_NC, truncated_N = completion_mask(ids_NC, ends)
    width = int(mask_NC.sum(1).max())
    ids_NC, mask_NC = ids_NC[:, :width], mask_NC[:, :width]
    logp_NC = None if logp_NC is None else logp_NC[:, :width]
    ids_NC = ids_NC.masked_fill(~mask_NC, pad)
    texts = tokenizer.batch_decode(ids_NC, skip_special_tokens=True)
    size = len(texts) // len(prompts)
    shape = (len(prompts), size)
    return Rollouts(
        prompts=prompts,
        completion_ids=ids_NC.view(*shape, -1),
        completion_mask=mask_NC.view(*shape, -1),
        texts=[texts[i * size : (i + 1) * size] for i in range(len(prompts))],
        truncated=truncated_N.view(shape),
        logprobs=None if logp_NC is None else logp_NC.view(*shape, -1),
    )


def _check(group_size: int, lengths: tuple[int, int], engine: str, rollout_prompts: int | None) -> None:
    shortest, longest = lengths
    rules = {
        f"group_size >= 1, found {group_size}": group_size >= 1,
        f"max_completion_length >= 1, found {longest}": longest >= 1,
        f"0 <= min_completion_length <= max_completion_length ({longest}), found {shortest}": 0 <= shortest <= longest,
        f"rollout_prompts >= 1 or None, found {rollout_prompts}": rollout_prompts is None or rollout_prompts >= 1,
        f"engine to be one of {', '.join(ENGINES)}, found {engine!r}": engine in ENGINES,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ConfigConflictError(f"Expected {rule}.")
