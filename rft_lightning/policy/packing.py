"""Groups as packed rows: [prompt | c1 | ... | cG] without padding between, and the masks that keep them apart.

Shape legend: B prompts, G completions per prompt, P prompt tokens, C completion tokens, L = P + G*C columns before
packing, T tokens of the longest packed row, M completion tokens of all groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rft_lightning.policy.families import base_model, family_of
from rft_lightning.sample import PromptBatch

PADDING = -1


class PackedRows:
    """Where every token of B groups goes in B packed rows, right-padded to the longest.

    Args:
        prompt: B prompts, left-padded.
        ids_BGC: completions, right-padded.
        mask_BGC: True on their tokens.

    Attributes:
        ids: [B, T] token ids.
        segments: [B, T] 0 on the prompt, g on its g-th completion (from 1), PADDING after the row's end.
        steps: [B, T] place of each token in its own conversation, prompt and completion, from 0.
        predicting: two index tensors [M]: row and column of the token that predicts each completion token, in the order
            of ``ids_BGC[mask_BGC]``.
    """

    def __init__(self, prompt: PromptBatch, ids_BGC: Tensor, mask_BGC: Tensor) -> None:
        groups, group_size, length = ids_BGC.shape
        width = prompt.input_ids.shape[1]
        valid_BL = torch.cat([prompt.attention_mask.bool(), mask_BGC.flatten(1)], 1)
        # Stable: tokens keep their order, padding goes to the end.
        self._order_BL = valid_BL.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        self._size = int(valid_BL.sum(1).max())
        self.ids = self.pack(torch.cat([prompt.input_ids, ids_BGC.flatten(1)], 1))
        segments_L = torch.arange(1, group_size + 1, device=valid_BL.device).repeat_interleave(length)
        segments_L = torch.cat([segments_L.new_zeros(width), segments_L])
        self.segments = self.pack(segments_L.expand_as(valid_BL).masked_fill(~valid_BL, PADDING))
        first_B1 = prompt.attention_mask.sum(1, keepdim=True)
        steps_B1C = (first_B1 + torch.arange(length, device=valid_BL.device))[:, None]
        steps_BL = torch.cat([prompt.attention_mask.cumsum(1) - 1, steps_B1C.expand_as(ids_BGC).flatten(1)], 1)
        self.steps = self.pack(steps_BL)
        # Before packing, a first token is predicted in the prompt's last column, any other one column to its left.
        columns_L = torch.arange(valid_BL.shape[1], device=valid_BL.device)
        sources_GC = (columns_L[width:] - 1).view(group_size, length)
        sources_GC[:, 0] = width - 1
        packed_BL = torch.empty_like(self._order_BL).scatter_(1, self._order_BL, columns_L.expand_as(self._order_BL))
        predicting_BGC = packed_BL[:, sources_GC.flatten()].view_as(ids_BGC)
        rows_BGC = torch.arange(groups, device=valid_BL.device)[:, None, None].expand_as(ids_BGC)
        self.predicting = rows_BGC[mask_BGC], predicting_BGC[mask_BGC]

    def pack(self, tensor: Tensor) -> Tensor:
        """[..., B, L] -> [..., B, T]."""
        order = self._order_BL[:, : self._size]
        return tensor.gather(-1, order.expand(*tensor.shape[:-1], -1))


def packed_masks(model: Any, row: PackedRows, types_BT: Tensor | None) -> Any:
    """The attention mask of packed rows in the form the model takes.

    Args:
        model: decides about kernel and kinds of layers.
        row: the rows.
        types_BT: 1 on image tokens, 0 elsewhere; needed by families whose image tokens see each other both ways.

    Returns:
        a mask [B, 1, T, T], or one per kind of layer where the model has layers that see a window only.
    """
    base = base_model(model)
    config, family = base.config.get_text_config(), family_of(base.config)
    key_B1T, query_BT1 = row.segments[:, None, :], row.segments[:, :, None]
    size = row.ids.shape[1]
    causal_TT = torch.ones(size, size, dtype=torch.bool, device=row.ids.device).tril()
    # Padding shares a segment and sees itself, so that no row of the softmax is empty; nothing else sees it.
    seen_BTT = causal_TT & ((key_B1T == 0) | (key_B1T == query_BT1))
    if family is not None and family.images_both_ways:
        assert types_BT is not None
        blocks_BT = _image_blocks(types_BT)
        seen_BTT = seen_BTT | ((blocks_BT[:, None, :] == blocks_BT[:, :, None]) & (blocks_BT >= 0)[:, :, None])
    if not has_windows(config):
        return _for_kernel(model, seen_BTT)
    near_BTT = row.steps[:, None, :] > row.steps[:, :, None] - config.sliding_window
    return {
        "full_attention": _for_kernel(model, seen_BTT),
        "sliding_attention": _for_kernel(model, seen_BTT & near_BTT),
    }


def has_windows(text_config: Any) -> bool:
    """Whether some layers of the decoder see a window of the last tokens only."""
    return "sliding_attention" in (getattr(text_config, "layer_types", None) or ())


def _image_blocks(types_BT: Tensor) -> Tensor:
    """[B, T] the number of the image a token belongs to, -1 for text."""
    image_BT = types_BT == 1
    starts_BT = image_BT & ~torch.nn.functional.pad(image_BT, (1, 0))[:, :-1]
    return (starts_BT.long().cumsum(1) - 1).masked_fill(~image_BT, -1)


def _for_kernel(model: Any, seen_BTT: Tensor) -> Tensor:
    """[B, 1, T, T]: bool for sdpa; additive for eager attention, which would add a bool mask as 0 and 1."""
    base = base_model(model)
    if base.config.get_text_config()._attn_implementation == "sdpa":
        return seen_BTT[:, None]
    mask = torch.zeros(seen_BTT.shape, dtype=base.dtype, device=seen_BTT.device)
    return mask.masked_fill_(~seen_BTT, torch.finfo(base.dtype).min)[:, None]
