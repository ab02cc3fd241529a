"""Log-probs of groups with the prompt and its image computed once per group, in two exact layouts.

- ``packed``: one row [prompt | c1 | ... | cG] without padding between; each completion sees the prompt and itself, and
  its positions continue the prompt's. Where :func:`shares_keys` holds, all prompts of the batch stand in one row, and
  attention is computed part by part (policy/group_attention.py), at a cost that grows with P + G*C. Elsewhere there is
  a row per prompt and a dense mask, whose cost grows with the square of the row.
- ``prefix_cache``: the prompts run once with gradients on; their keys and values are repeated to G rows, and the
  completions run against them. No mask of ours, so any attention kernel serves. Gradient checkpointing forbids caches.

Both equal the plain route (policy/plain.py), forward and gradients. Families, attention kernels or settings for which
a layout would be silently wrong are kept away from it by :func:`choose_layout` and, once per run, by
:func:`rft_lightning.self_check.layout_error`.

Shape legend: B prompts, G completions per prompt, N = B*G rows, P prompt tokens, C completion tokens, T tokens of a
packed row, M predicting positions, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.families import (
    PACKED,
    PREFIX_CACHE,
    base_model,
    family_of,
    prompt_positions,
    text_positions,
)
from rft_lightning.policy.group_attention import KERNEL, PackedGroups, as_mask, install
from rft_lightning.policy.group_row import GroupRow
from rft_lightning.policy.loading import checkpointing_active
from rft_lightning.policy.logprobs import scoring_head
from rft_lightning.policy.packing import PackedRows, has_windows, packed_masks
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.prompt_inputs import model_inputs
from rft_lightning.sample import TOKEN_TENSORS, PromptBatch

PLAIN = "plain"
# Decoders whose attention is a softmax over all tokens before, and nothing else; InternVL and LLaVA take any decoder.
FULL_ATTENTION = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen2", "qwen3", "llama"}
_UNFIT = "_never_shares_keys"  # an attribute of the model, so that copies have it
FORWARDS = ("auto", PREFIX_CACHE, PACKED, PLAIN)
# Kernels that take a dense mask as it is given. Others would drop it without a word.
DENSE_MASK_KERNELS = ("sdpa", "eager")


def group_logprobs(
    model: nn.Module,
    prompt: PromptBatch,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    forward: str = "auto",
) -> Tensor:
    """Log-probs of G completions of each of B prompts under the model, with gradients where they are on.

    Args:
        model: the policy or the reference model: a Hugging Face vision-language model, or an adapter around one.
        prompt: B prompts, left-padded; their images may differ in size.
        completion_ids: [B, G, C] token ids, right-padded with anything.
        completion_mask: [B, G, C] True on tokens, False on the padding after them.
        temperature: divides the logits; the one the completions were sampled with.
        forward: ``auto``, ``prefix_cache``, ``packed`` or ``plain``; see :func:`choose_layout`.

    Returns:
        log-probs [B, G, C] float32, 0 on padding.

    Raises:
        ConfigConflictError: the layout asked for is not exact for this model as it is set up.
    """
    return group_logprobs_and_entropies(
        model, prompt, completion_ids, completion_mask, temperature=temperature, forward=forward, with_entropy=False
    )[0]


def group_logprobs_and_entropies(
    model: nn.Module,
    prompt: PromptBatch,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    forward: str = "auto",
    with_entropy: bool = True,
    entropy_gradient: bool = False,
    row: GroupRow | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`group_logprobs`, with the entropies [B, G, C] in nats (0 on padding) or None.

    Entropies have no gradient unless `entropy_gradient` asks for it (an entropy bonus needs it). `row` is what
    :func:`group_row` gives for these prompts and completions; several passes over them can share it.
    """
    layout = choose_layout(model, forward)
    mask = completion_mask.bool()
    # Padding may hold ids that no embedding has, or placeholders of images: the prompt's last token stands for it.
    completion_ids = torch.where(mask, completion_ids, prompt.input_ids[:, -1, None, None])
    entropies = {"with_entropy": with_entropy, "entropy_gradient": entropy_gradient}
    if layout == PLAIN:
        logp, entropy = plain_group_logprobs(model, prompt, completion_ids, mask, temperature=temperature, **entropies)
        return logp.masked_fill(~mask, 0), None if entropy is None else entropy.masked_fill(~mask, 0)
    settings = {"temperature": temperature, **entropies}
    if layout == PREFIX_CACHE:
        both = _prefix_cache(model, prompt, completion_ids, mask, settings)
    elif shares_keys(model):
        if row is None:
            row = group_row(prompt, mask.sum(-1).tolist(), mask.shape[-1])
        both = _packed_row(model, prompt, completion_ids, row, settings)
    else:
        both = _packed(model, prompt, completion_ids, mask, settings)
    if not with_entropy:
        return both[..., 0], None
    return both[..., 0], both[..., 1] if entropy_gradient else both[..., 1].detach()


def choose_layout(model: Any, forward: str = "auto") -> str:
    """The layout that `forward` means for this model as it is set up now.

    ``auto`` is the cheapest of those possible: packed where :func:`shares_keys` holds, else the prefix cache, else
    packed with a dense mask (gradient checkpointing forbids a cache); plain where the family has no exact one.

    Raises:
        ConfigConflictError: a layout was asked for that is not exact here.
    """
    if forward not in FORWARDS:
        raise ConfigConflictError(f"Expected forward to be one of {', '.join(FORWARDS)}, found {forward!r}.")
    if forward == "auto":
        return next(iter(possible_layouts(model)), PLAIN)
    if forward == PLAIN:
        return PLAIN
    config = base_model(model).config
    family = family_of(config)
    known = family.layouts if family is not None else ()
    if forward not in known:
        raise ConfigConflictError(
            f"forward is {forward!r}, which is not known to be exact for the family {config.model_type!r} (known: "
            f"{', '.join(known) or 'none; it takes the plain route'}). Use forward: auto or plain; "
            "docs/adding-a-model.md tells how a layout is admitted."
        )
    if (reason := obstacle(model, forward)) is not None:
        raise ConfigConflictError(f"forward is {forward!r}, but {reason}. Use forward: auto.")
    return forward


def possible_layouts(model: Any) -> list[str]:
    """The shared-prefix layouts that can be used with this model as it is set up now, the cheapest first."""
    family = family_of(base_model(model).config)
    by_cost = (PACKED, PREFIX_CACHE) if shares_keys(model) else (PREFIX_CACHE, PACKED)
    known = family.layouts if family is not None else ()
    return [layout for layout in by_cost if layout in known and obstacle(model, layout) is None]


def obstacle(model: Any, layout: str) -> str | None:
    """Why a layout that is exact for the family cannot be used with this model as it is set up; None if it can."""
    if layout == PREFIX_CACHE:
        if checkpointing_active(model):
            return "gradient checkpointing is on, under which Hugging Face models keep no cache (packed works)"
        return None
    text = base_model(model).config.get_text_config()
    if getattr(text, "sliding_window", None) and not getattr(text, "layer_types", None):
        return f"decoder layers of {text.model_type} see a window, and their config does not say which"
    kernel = text._attn_implementation
    if kernel not in DENSE_MASK_KERNELS:
        return f"the attention kernel {kernel!r} takes no dense mask (it needs {' or '.join(DENSE_MASK_KERNELS)})"
    return None


def shares_keys(model: Any) -> bool:
    """Whether attention of this model as it is set up can be computed part by part, each prompt's keys stored once.

    It must see all tokens before a token and none after it, without dropout, by the kernel that honours our masks.
    """
    base = base_model(model)
    family, text = family_of(base.config), base.config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (
        family is not None
        and PACKED in family.layouts
        and text.model_type in FULL_ATTENTION
        and not getattr(base, _UNFIT, False)
        and not family.images_both_ways
        and not has_windows(text)
        and text._attn_implementation == KERNEL
        and not (model.training and getattr(text, "attention_dropout", 0.0))
        # The kernels that tell the log-sum-exp; on CUDA it loads eight numbers at a time.
        and (base.device.type == "cpu" or (base.device.type == "cuda" and head_width % 8 == 0))
    )


def never_share_keys(model: Any) -> None:
    """From now on :func:`shares_keys` is False for this model and copies of it: it failed the comparison."""
    setattr(base_model(model), _UNFIT, True)


def group_row(prompt: PromptBatch, lengths: list[list[int]], width: int) -> GroupRow:
    """Where the tokens of B prompts and of their completions, [B][G] lengths in `width` columns, go in one row."""
    return GroupRow(prompt.lengths, lengths, prompt.input_ids.shape[1], width, prompt.input_ids.device)


def _packed_row(model: Any, prompt: PromptBatch, ids_BGC: Tensor, row: GroupRow, settings: dict) -> Tensor:
    """[B, G, C, 2] log-probs and entropies; all groups in one row, attention part by part."""
    install()
    positions, next_B = prompt_positions(model, prompt)
    steps_BGC = next_B[:, None, None] + torch.arange(ids_BGC.shape[2], device=ids_BGC.device).expand_as(ids_BGC)
    rope = torch.cat([positions, text_positions(model, steps_BGC.flatten(1))], -1)
    vision = model_inputs(prompt)
    for name in vision.keys() & TOKEN_TENSORS:
        vision[name] = row.pack(torch.cat([vision[name], torch.zeros_like(ids_BGC).flatten(1)], 1))
    asked_M1 = ids_BGC.flatten()[row.written][:, None]
    with scoring_head(model, lambda hidden_1TD: hidden_1TD[0].index_select(0, row.predicting), asked_M1, **settings):
        both_M2 = model(
            input_ids=row.pack(torch.cat([prompt.input_ids, ids_BGC.flatten(1)], 1)),
            attention_mask=as_mask(PackedGroups(row), ids_BGC.device),
            position_ids=row.pack(rope),
            use_cache=False,
            **vision,
        ).logits
    return both_M2.new_zeros(ids_BGC.numel(), 2).index_copy(0, row.written, both_M2).view(*ids_BGC.shape, 2)


def _prefix_cache(model: Any, prompt: PromptBatch, ids_BGC: Tensor, mask_BGC: Tensor, settings: dict) -> Tensor:
    """[B, G, C, 2] log-probs and entropies."""
    from transformers import DynamicCache

    groups, group_size, length = ids_BGC.shape
    positions, next_B = prompt_positions(model, prompt)
    cache = DynamicCache(config=base_model(model).config)
    with scoring_head(model, lambda hidden_BTD: hidden_BTD[:, -1], ids_BGC[:, :, 0], **settings):
        first = model(
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **model_inputs(prompt),
        ).logits
    first_BG2 = torch.stack([first[:, :-1], first[:, -1:].expand(-1, group_size)], -1)
    if group_size > 1:
        cache.batch_repeat_interleave(group_size)

    ids_NC, mask_NC = ids_BGC.flatten(0, 1), mask_BGC.flatten(0, 1)
    prompt_mask_NP = prompt.attention_mask.repeat_interleave(group_size, 0)
    steps_NC = next_B.repeat_interleave(group_size)[:, None] + torch.arange(length, device=ids_NC.device)
    later_NC = mask_NC[:, 1:]
    later_M1 = ids_NC[:, 1:][later_NC][:, None]
    with scoring_head(model, lambda hidden_NCD: hidden_NCD[:, :-1][later_NC], later_M1, **settings):
        rest_M2 = model(
            input_ids=ids_NC,
            attention_mask=torch.cat([prompt_mask_NP, torch.ones_like(ids_NC)], 1),
            position_ids=text_positions(model, steps_NC),
            past_key_values=cache,
            use_cache=True,
        ).logits
    first_N12 = first_BG2.flatten(0, 1)[:, None] * mask_NC[:, :1, None]
    rest_NC2 = rest_M2.new_zeros(*later_NC.shape, 2).masked_scatter(later_NC[..., None], rest_M2)
    return torch.cat([first_N12, rest_NC2], 1).view(groups, group_size, length, 2)


def _packed(model: Any, prompt: PromptBatch, ids_BGC: Tensor, mask_BGC: Tensor, settings: dict) -> Tensor:
    """[B, G, C, 2] log-probs and entropies."""
    positions, next_B = prompt_positions(model, prompt)
    row = PackedRows(prompt, ids_BGC, mask_BGC)
    steps_BGC = next_B[:, None, None] + torch.arange(ids_BGC.shape[2], device=ids_BGC.device).expand_as(ids_BGC)
    rope = torch.cat([positions, text_positions(model, steps_BGC.flatten(1))], -1)
    rope = row.pack(rope)
    vision, types = model_inputs(prompt), None
    for name in vision.keys() & TOKEN_TENSORS:
        types = row.pack(torch.cat([vision[name], torch.zeros_like(ids_BGC).flatten(1)], 1))
        vision[name] = types
    with scoring_head(model, lambda hidden_BTD: hidden_BTD[row.predicting], ids_BGC[mask_BGC][:, None], **settings):
        both_M2 = model(
            input_ids=row.ids,
            attention_mask=packed_masks(model, row, types),
            position_ids=rope,
            use_cache=False,
            **vision,
        ).logits
    return both_M2.new_zeros(*ids_BGC.shape, 2).masked_scatter(mask_BGC[..., None], both_M2)
