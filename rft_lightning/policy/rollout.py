"""Group sampling: G completions for each of B prompts, the prompt and its image computed once.

Shape legend: B prompts, G completions per prompt, N = B*G rows, n rows that still grow, P prompt tokens,
C completion tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.families import (
    base_model,
    end_token_ids,
    family_of,
    prompt_positions,
    repeat_prompts,
    text_positions,
    vision_token_ids,
)
from rft_lightning.policy.hf_rollout import hf_sample
from rft_lightning.policy.loading import evaluating
from rft_lightning.policy.noise import row_keys
from rft_lightning.policy.sampling import Sampling, next_tokens
from rft_lightning.sample import PromptBatch, Rollouts

ENGINES = ("native", "hf")


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

    Raises:
        ConfigConflictError: a setting is out of its range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    lengths = min_completion_length, max_completion_length
    _check(group_size, lengths, engine)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    with evaluating(model):
        if engine == "hf":
            ids_NC = hf_sample(model, prompts, group_size, sampling, lengths, ends, pad, (seed, step))
            logp_NC = None
        else:
            keys_N = row_keys(prompts.samples, group_size, seed=seed, step=step, device=prompts.input_ids.device)
            decoder = GroupDecoder(model, prompts, group_size)
            ids_NC, logp_NC = decoder.decode(sampling, keys_N, lengths, ends, pad)
    return _as_rollouts(prompts, ids_NC, logp_NC, ends, pad, tokenizer)


class GroupDecoder:
    """The growing rows of B groups: prefilled once per prompt, extended by one token at a time.

    A family without an exact shared-prefix layout (its cache cannot be repeated or cut by rows) is prefilled once per
    completion, and its finished rows run on.

    Args:
        model: the policy in eval mode.
        prompts: B prompts, left-padded.
        group_size: G.
    """

    def __init__(self, model: nn.Module, prompts: PromptBatch, group_size: int) -> None:
        from transformers import DynamicCache

        config = base_model(model).config
        family = family_of(config)
        self.model, self.device = model, prompts.input_ids.device
        self.shares = family is not None and len(family.layouts) > 0
        self.forbidden = torch.tensor(vision_token_ids(config), dtype=torch.long, device=self.device)
        self.cache = DynamicCache(config=config)
        repeats = group_size if self.shares else 1
        rows = prompts if self.shares else repeat_prompts(prompts, group_size)
        positions, self.next_position = prompt_positions(model, rows)
        output = model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **rows.vision,
        )
        self.logits = output.logits[:, -1].repeat_interleave(repeats, 0)
        self.mask = rows.attention_mask.repeat_interleave(repeats, 0)
        self.next_position = self.next_position.repeat_interleave(repeats, 0)
        if repeats > 1:
            self.cache.batch_repeat_interleave(repeats)

    def decode(
        self, sampling: Sampling, keys_N: Tensor, lengths: tuple[int, int], ends: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        """Token ids [N, C] filled up with `pad` after the end, and their log-probs [N, C], 0 there."""
        rows, (shortest, length) = len(keys_N), lengths
        ids_NC = torch.full((rows, length), pad, dtype=torch.long, device=self.device)
        logp_NC = torch.zeros(rows, length, device=self.device)
        stops = torch.tensor(ends, device=self.device)
        before_stops = torch.cat([self.forbidden, stops])
        growing_n = torch.arange(rows, device=self.device)
        finished_n = torch.zeros(rows, dtype=torch.bool, device=self.device)
        for position in range(length):
            forbidden = before_stops if position + 1 < shortest else self.forbidden
            tokens_n, logp_n = next_tokens(self.logits, sampling, keys_N[growing_n], position, forbidden)
            tokens_n = tokens_n.masked_fill(finished_n, pad)  # rows that only run on
            ids_NC[growing_n, position] = tokens_n
            logp_NC[growing_n, position] = logp_n.masked_fill(finished_n, 0.0)
            finished_n = finished_n | torch.isin(tokens_n, stops)
            if position == length - 1 or finished_n.all():
                break
            if self.shares and finished_n.any():
                keep = (~finished_n).nonzero()[:, 0]
                growing_n, tokens_n, finished_n = growing_n[keep], tokens_n[keep], finished_n[keep]
                self.keep(keep)
            self.extend(tokens_n)
        return ids_NC[:, : position + 1], logp_NC[:, : position + 1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.mask, self.next_position = self.mask[rows], self.next_position[rows]

    def extend(self, tokens_n: Tensor) -> None:
        """One decode step: the logits after these tokens."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.logits = self.model(
            input_ids=tokens_n[:, None],
            attention_mask=self.mask,
            position_ids=text_positions(self.model, self.next_position[:, None]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.next_position = self.next_position + 1


def completion_mask(ids_NC: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """[N, C] True up to and including the first end token, and [N] True where there is none (truncated)."""
    is_end = torch.isin(ids_NC, torch.tensor(ends, device=ids_NC.device))
    mask = (is_end.long().cumsum(1) - is_end.long()) == 0
    return mask, ~is_end.any(1)


def _as_rollouts(
    prompts: PromptBatch, ids_NC: Tensor, logp_NC: Tensor | None, ends: list[int], pad: int, tokenizer: Any
) -> Rollouts:
    mask_NC, truncated_N = completion_mask(ids_NC, ends)
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


def _check(group_size: int, lengths: tuple[int, int], engine: str) -> None:
    shortest, longest = lengths
    rules = {
        f"group_size >= 1, found {group_size}": group_size >= 1,
        f"max_completion_length >= 1, found {longest}": longest >= 1,
        f"0 <= min_completion_length <= max_completion_length ({longest}), found {shortest}": 0 <= shortest <= longest,
        f"engine to be one of {', '.join(ENGINES)}, found {engine!r}": engine in ENGINES,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ConfigConflictError(f"Expected {rule}.")
