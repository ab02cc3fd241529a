"""Groups as one row of tokens without any padding: [prompt 1 | c11 | ... | c1G | prompt 2 | c21 | ...].

Where every token goes is worked out from lengths alone, on the host, so that a device never has to be waited for.

Shape legend: B prompts, G completions per prompt, N = B*G, P prompt tokens, C completion tokens, L = P + G*C columns
before packing, T tokens of the row, M completion tokens in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class GroupRow:
    """Indices from B groups, padded to a rectangle, into one row, and from there into the blocks that attention takes.

    Args:
        prompt_lengths: B lengths of prompts, each at least 1; prompts are padded on the left.
        completion_lengths: [B, G] lengths of completions, 0 included; completions are padded on the right.
        prompt_width: P.
        completion_width: C.
        device: where the indices are needed.

    Attributes:
        tokens: [T] index of each token in the flattened [B, L] rectangle.
        predicting: [M] place in the row of the token that predicts each completion token, in the order of the row.
        prompts: [B, p] places in the row of the prompts' tokens, padded on the right (with place 0) to the longest.
        completions: [N, c] places of the completions' tokens, padded likewise.
        written: [M] index of each completion token in the flattened [B, G, C].
        back: [T] where each token of the row stands in the flattened prompts followed by the flattened completions.
        key_bias: [B, 1, 1, p] 0 on tokens of a prompt and -inf on padding; None where all prompts are equally long.
        whole: whether the row is one prompt with completions of one length, so that its blocks are views of it.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        completion_lengths: Sequence[Sequence[int]],
        prompt_width: int,
        completion_width: int,
        device: torch.device | str = "cpu",
    ) -> None:
        prompts_B = np.asarray(prompt_lengths)
        lengths_BG = np.asarray(completion_lengths).reshape(len(prompts_B), -1)
        self.groups, self.group_size = lengths_BG.shape
        prompt_BP = np.arange(prompt_width) >= prompt_width - prompts_B[:, None]
        written_BGC = np.arange(completion_width) < lengths_BG[..., None]
        valid_BL = np.concatenate([prompt_BP, written_BGC.reshape(self.groups, -1)], 1)
        self.size = int(valid_BL.sum())
        self.whole = self.groups == 1 and len(np.unique(lengths_BG)) == 1 and lengths_BG.min() > 0
        place_BL = (np.cumsum(valid_BL) - 1).reshape(valid_BL.shape)
        place_BGC = place_BL[:, prompt_width:].reshape(written_BGC.shape)
        before_BGC = place_BGC - 1
        before_BGC[..., :1] = place_BL[:, None, prompt_width - 1 : prompt_width]

        starts_B = place_BL[np.arange(self.groups), prompt_width - prompts_B]
        prompts_Bp, real_Bp = _block(starts_B, prompts_B)
        firsts_N = place_BGC[..., 0].reshape(-1) if completion_width else np.zeros(lengths_BG.size, int)
        completions_Nc, real_Nc = _block(firsts_N, lengths_BG.reshape(-1))
        back_T = np.empty(self.size, int)
        back_T[prompts_Bp[real_Bp]] = np.flatnonzero(real_Bp)
        back_T[completions_Nc[real_Nc]] = prompts_Bp.size + np.flatnonzero(real_Nc)

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        self.tokens = on_device(np.flatnonzero(valid_BL))
        self.predicting = on_device(before_BGC[written_BGC])
        self.prompts, self.completions = on_device(prompts_Bp), on_device(completions_Nc)
        self._real = on_device(real_Bp), on_device(real_Nc)
        self.back = on_device(back_T)
        self.written = on_device(np.flatnonzero(written_BGC))
        self.key_bias: Tensor | None = None
        if not real_Bp.all():
            self.key_bias = on_device(np.where(real_Bp, np.float32(0), np.float32(-np.inf)))[:, None, None]

    def blocks(self, row: Tensor, *, zero_padding: bool = False) -> tuple[Tensor, Tensor]:
        """[T, ...] -> the prompts' [B, p, ...] and the completions' [N, c, ...]; anything, or 0, on the padding."""
        if self.whole:
            length = self.prompts.shape[1]
            return row[None, :length], row[length:].unflatten(0, (self.group_size, -1))
        blocks = []
        for places, real in zip((self.prompts, self.completions), self._real, strict=True):
            block = row.index_select(0, places.flatten()).unflatten(0, places.shape)
            blocks.append(block.mul_(real[(..., *[None] * (row.ndim - 1))]) if zero_padding else block)
        return blocks[0], blocks[1]

    def pack(self, rectangle: Tensor) -> Tensor:
        """[..., B, L] -> [..., 1, T]."""
        return rectangle.flatten(-2).index_select(-1, self.tokens)[..., None, :]


def _block(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [rows, longest] of runs in a row, 0 on the padding, and True on what is no padding."""
    columns = np.arange(max(1, lengths.max()))
    real = columns < lengths[:, None]
    return np.where(real, starts[:, None] + columns, 0), real
