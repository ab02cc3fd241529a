"""Prefill: what a decoder keeps of its prompts, computed once for what questions about one picture have in common.

Such questions begin alike: the system's words, the picture, and the words before what is asked for. The beginning runs
once, and the rest of each question against it. Attention that looks only backwards makes the same of both.

Shape legend: B prompts, P prompt tokens, s beginnings, p tokens of the longest one, r tokens of the longest rest,
h key heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rft_lightning.policy.families import base_model, prompt_positions, vision_token_ids
from rft_lightning.policy.group_attention import same_dtype
from rft_lightning.policy.prompt_inputs import model_inputs, picture_owners
from rft_lightning.sample import TOKEN_TENSORS, PromptBatch

KeysAndValues = tuple[Tensor, Tensor]


def prefill(model: Any, prompts: PromptBatch, *, share: bool = True) -> tuple[Tensor, list[KeysAndValues]]:
    """Run B prompts.

    Args:
        model: the policy in eval mode, of full causal attention.
        prompts: B prompts, left-padded.
        share: run what questions about one picture have in common once; makes two passes of the decoder instead of one.

    Returns:
        logits [B, V] of the token after each prompt, and the keys and values [B, h, P, D] of each layer. On padding
        they hold anything finite.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=base_model(model).config)
    shared = common_beginnings(model, prompts) if share else None
    if shared is None:
        logits = _run(model, prompts, prompts.attention_mask, cache, **model_inputs(prompts))
        return logits, _stored(cache)
    prompts = replace(prompts, positions=prompt_positions(model, prompts)[0])
    beginnings = _cut(prompts.take(shared.first), [0] * len(shared.first), shared.lengths)
    _run(model, beginnings, beginnings.attention_mask, cache, **model_inputs(beginnings))

    owner = torch.tensor(shared.owner, device=prompts.input_ids.device)
    cache.batch_select_indices(owner)
    begun = [shared.lengths[number] for number in shared.owner]
    rests = _cut(prompts, begun, prompts.lengths)
    mask = torch.cat([beginnings.attention_mask[owner], rests.attention_mask], 1)
    logits = _run(model, rests, mask, cache)
    columns_BP = _joined(prompts, begun, beginnings.input_ids.shape[1], mask.shape[1]).to(owner.device)
    index = columns_BP[:, None, :, None]
    return logits, [(keys.take_along_dim(index, 2), values.take_along_dim(index, 2)) for keys, values in _stored(cache)]


@dataclass(frozen=True)
class Beginnings:
    """What questions about one picture have in common.

    Attributes:
        first: s numbers of prompts, one with each beginning.
        lengths: tokens of each of them.
        owner: of each of the B prompts, the number of its beginning.
    """

    first: list[int]
    lengths: list[int]
    owner: list[int]


def common_beginnings(model: Any, prompts: PromptBatch) -> Beginnings | None:
    """The longest common beginnings of prompts of one picture; None where no two prompts share one.

    A beginning holds the whole picture and leaves at least one token of each prompt.
    """
    owners = picture_owners(prompts)
    members: dict[int, list[int]] = {}
    for number, owner in enumerate(owners):
        members.setdefault(owner, []).append(number)
    if len(members) == len(prompts):
        return None
    width, rows = prompts.input_ids.shape[1], prompts.input_ids.cpu()
    ids = [row[width - length :] for row, length in zip(rows, prompts.lengths, strict=True)]
    vision = torch.tensor(vision_token_ids(base_model(model).config))
    groups: list[tuple[list[int], int]] = []
    for numbers in members.values():
        length = _common_length([ids[number] for number in numbers])
        if any(torch.isin(ids[number][length:], vision).any() for number in numbers):
            groups += [([number], len(ids[number]) - 1) for number in numbers]
        else:
            groups.append((numbers, length))
    if len(groups) == len(prompts):
        return None
    owner_of = {number: i for i, (numbers, _) in enumerate(groups) for number in numbers}
    return Beginnings(
        [numbers[0] for numbers, _ in groups],
        [length for _, length in groups],
        [owner_of[number] for number in range(len(prompts))],
    )


def _common_length(ids: list[Tensor]) -> int:
    """Tokens that all rows begin with, the last one of the shortest left out."""
    shortest = min(map(len, ids)) - 1
    same = torch.stack([row[:shortest] == ids[0][:shortest] for row in ids]).all(0)
    return int(same.long().cumprod(0).sum())


def _run(model: Any, prompts: PromptBatch, mask: Tensor, cache: Any, **inputs: Any) -> Tensor:
    """Logits [B, V] after the last column; the cache grows by what was run."""
    output = model(
        input_ids=prompts.input_ids,
        attention_mask=mask,
        position_ids=prompt_positions(model, prompts)[0],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **inputs,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _stored(cache: Any) -> list[KeysAndValues]:
    # Under autocast the cache keeps both in the dtype of the first keys it was given.
    pairs = (same_dtype(layer.keys, layer.values) for layer in cache.layers)
    return [(keys, values) for keys, values in pairs]


def _cut(prompts: PromptBatch, starts: list[int], stops: list[int]) -> PromptBatch:
    """Tokens `starts` to `stops` of each prompt, left-padded anew; with the pictures, which lie before or in them."""
    width, device = prompts.input_ids.shape[1], prompts.input_ids.device
    counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
    padding = width - torch.tensor(prompts.lengths)
    # From the right: the last token wanted stands in the last column.
    steps = torch.arange(-max(counts), 0)
    columns = (padding + torch.tensor(stops))[:, None] + steps
    wanted = (steps >= -torch.tensor(counts)[:, None]).to(device)
    columns = columns.clamp(min=0).to(device)

    def cut(tensor: Tensor) -> Tensor:
        return tensor.take_along_dim(columns.expand(*tensor.shape[:-1], -1), -1)

    assert prompts.positions is not None
    part = replace(
        prompts,
        # What stands before a beginning or rest must not be a placeholder of a picture; no prompt ends with one.
        input_ids=torch.where(wanted, cut(prompts.input_ids), prompts.input_ids[:, -1:]),
        attention_mask=wanted.to(prompts.attention_mask.dtype),
        positions=cut(prompts.positions),
        vision={
            name: cut(tensor) * wanted if name in TOKEN_TENSORS else tensor for name, tensor in prompts.vision.items()
        },
    )
    part.__dict__["lengths"] = counts
    return part


def _joined(prompts: PromptBatch, begun: list[int], beginnings: int, columns: int) -> Tensor:
    """[B, P] the columns, of `beginnings` for beginnings and all others for rests, in which the prompts' tokens stand.

    Both are padded on the left, so that there is padding between them.
    """
    lengths, begun_B1 = torch.tensor(prompts.lengths)[:, None], torch.tensor(begun)[:, None]
    width = prompts.input_ids.shape[1]
    token = torch.arange(width) - (width - lengths)
    column = torch.where(token < begun_B1, beginnings - begun_B1 + token, columns - lengths + token)
    return column.clamp(min=0)


__all__ = ["Beginnings", "common_beginnings", "prefill"]
