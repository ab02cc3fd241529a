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
        completion_lengths: [B][G] lengths of completions, 0 included; completions are padded on the right.
        prompt_width: P.
        completion_width: C.
        device: where the indices are needed.

    Attributes:
        size: T.
        tokens: [T] index of each token in the flattened [B, L] rectangle.
        written: [M] index of each completion token in the flattened [B, G, C].
        predicting: [M] place in the row of the token that predicts each completion token.
        prompts: the prompts, by similar length.
        answers: all completions of a group as one run, in the blocks of their prompts: what attends to a prompt.
        completions: each completion by itself, by similar length.
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
        written_BGC = np.arange(completion_width) < lengths_BG[..., None]
        prompt_BP = np.arange(prompt_width) >= prompt_width - prompts_B[:, None]
        valid_BL = np.concatenate([prompt_BP, written_BGC.reshape(len(prompts_B), -1)], 1)
        place_BL = (np.cumsum(valid_BL) - 1).reshape(valid_BL.shape)
        before_BGC = place_BL[:, prompt_width:].reshape(written_BGC.shape) - 1
        before_BGC[..., :1] = place_BL[:, None, prompt_width - 1 : prompt_width]
        self.size = int(valid_BL.sum())
        self.tokens = _on(device, np.flatnonzero(valid_BL))
        self.written = _on(device, np.flatnonzero(written_BGC))
        self.predicting = _on(device, before_BGC[written_BGC])

        totals_B = lengths_BG.sum(1)
        ends_B = np.cumsum(prompts_B + totals_B)
        answers_B = ends_B - totals_B
        starts_BG = answers_B[:, None] + np.cumsum(lengths_BG, 1) - lengths_BG
        kinds_B = _similar(prompts_B)
        self.prompts = Runs(answers_B - prompts_B, prompts_B, kinds_B, device)
        self.answers = Runs(answers_B, totals_B, kinds_B, device)
        any_N = lengths_BG.reshape(-1) > 0
        starts_n, lengths_n = starts_BG.reshape(-1)[any_N], lengths_BG.reshape(-1)[any_N]
        self.completions = Runs(starts_n, lengths_n, _similar(lengths_n), device)
        self._order: Tensor | None = None
        if len(prompts_B) > 1:  # of one group, prompt and completions stand behind one another as they are
            in_prompt_T = np.repeat(
                np.tile([True, False], len(prompts_B)), np.stack([prompts_B, totals_B], 1).reshape(-1)
            )
            order_T = np.where(in_prompt_T, np.cumsum(in_prompt_T), in_prompt_T.sum() + np.cumsum(~in_prompt_T)) - 1
            self._order = _on(device, order_T)

    def pack(self, rectangle: Tensor) -> Tensor:
        """[..., B, L] -> [..., 1, T]."""
        return rectangle.flatten(-2).index_select(-1, self.tokens)[..., None, :]

    def join(self, of_prompts: Tensor, of_completions: Tensor) -> Tensor:
        """What belongs to the tokens of all prompts, and of all completions, as the row: [T, ...]."""
        both = torch.cat([of_prompts, of_completions])
        return both if self._order is None else both.index_select(0, self._order)


class Runs:
    """Runs of neighbouring tokens of a row as blocks [runs, longest], each of runs of one kind.

    Args:
        starts: where each run begins.
        lengths: how long it is; may be 0.
        kinds: which block it goes to.
        device: where the indices are needed.

    Attributes:
        biases: of each block [runs, 1, 1, longest], 0 on tokens and -inf on padding; None where there is no padding.
    """

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, kinds: np.ndarray, device: torch.device | str) -> None:
        self._places: list[Tensor] = []
        self._real: list[Tensor | None] = []
        self.biases: list[Tensor | None] = []
        order = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        offsets = np.cumsum(lengths) - lengths  # of each run among the tokens of all of them
        back = np.empty(int(lengths.sum()), int)
        flat = 0
        for runs in order:
            columns = np.arange(max(1, lengths[runs].max(initial=0)))
            real = columns < lengths[runs][:, None]
            self._places.append(_on(device, np.where(real, starts[runs][:, None] + columns, 0)))
            whole = bool(real.all())
            self._real.append(None if whole else _on(device, real))
            bias = None if whole else _on(device, np.where(real, np.float32(0), np.float32(-np.inf)))
            self.biases.append(None if bias is None else bias[:, None, None])
            back[(offsets[runs][:, None] + columns)[real]] = flat + np.flatnonzero(real)
            flat += real.size
        # One block without padding whose tokens follow one another is a view of the row.
        self._view: slice | None = None
        if len(order) == 1 and self._real[0] is None and (np.diff(starts) == lengths[:-1]).all():
            self._view = slice(int(starts[0]), int(starts[0] + lengths.sum()))
        self._back = _on(device, back)

    def split(self, row: Tensor, *, padding: float | None = None) -> list[Tensor]:
        """[T, ...] -> blocks [runs, longest, ...], with `padding` (anything where it is None) behind shorter runs."""
        if self._view is not None:
            return [row[self._view].unflatten(0, self._places[0].shape)]
        blocks = []
        for places, real in zip(self._places, self._real, strict=True):
            block = row.index_select(0, places.flatten()).unflatten(0, places.shape)
            if padding is not None and real is not None:
                block = block.masked_fill_(~real[(..., *[None] * (row.ndim - 1))], padding)
            blocks.append(block)
        return blocks

    def join(self, blocks: Sequence[Tensor], like: Tensor) -> Tensor:
        """Blocks [runs, longest, ...] -> the tokens of all runs, in the order of the runs; `like` a row, if none is."""
        if not blocks:
            return like[:0]
        flat = torch.cat([block.flatten(0, 1) for block in blocks])
        return flat if self._view is not None else flat.index_select(0, self._back)


def _similar(lengths: np.ndarray) -> np.ndarray:
    """Numbers that are equal where lengths are within a factor of two: padding them to the longest costs little."""
    return np.ceil(np.log2(np.maximum(lengths, 16))).astype(int)


def _on(device: torch.device | str, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
