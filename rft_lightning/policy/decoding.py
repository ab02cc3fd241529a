"""Decoders: the rows of a rollout, prefilled once per prompt and grown by one token at a time.

- :class:`SharedDecoder` stores and reads the keys of each prompt once for its whole group. Finished rows leave, and
  waiting prompts take their place. Weights are used where they are.
- :class:`CacheDecoder` keeps the model's own cache, for families and kernels that :func:`shares_keys` excludes.

Shape legend: B prompts, G completions per prompt, n rows that grow, s groups they belong to, g rows of the largest of
them, H heads, h key heads, r = H/h, D width of a head, P prompt tokens, c room for completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rft_lightning.policy.families import (
    base_model,
    family_of,
    prompt_positions,
    repeat_prompts,
    text_positions,
)
from rft_lightning.policy.group_attention import as_mask, install, merged, part, same_dtype
from rft_lightning.policy.group_cache import GroupCache, captured
from rft_lightning.policy.lean_step import lean_step
from rft_lightning.policy.prefill import prefill
from rft_lightning.policy.prompt_inputs import model_inputs
from rft_lightning.sample import PromptBatch

# Models whose lean step was compared with their own forward: the kind it is right for, or None where it is wrong.
_COMPARED: WeakKeyDictionary[nn.Module, tuple[type, ...] | None] = WeakKeyDictionary()
# Room for completion tokens at first; doubled when it is used up.
FIRST_ROOM = 64
# Moving the keys of the rows that stay costs about as much as some steps of those that need not; a graph has to be
# recorded anew.
DROP_SHARE, DROP_SHARE_OF_GRAPHS, NEVER_DROP = 0.125, 0.5, 2.0


class Decoder(Protocol):
    """What the sampling loop needs of a decoder.

    Attributes:
        logits: [n, V] of the next token of each row.
        waiting: prompts whose groups have not begun.
        drop_share: rows leave when so large a share of them is finished; above 1 they cannot leave.
    """

    logits: Tensor
    waiting: int
    drop_share: float

    def admit(self) -> Tensor:
        """Begin as many waiting prompts as there is room for: their rows [m], which go behind those that grow."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these of the rows alone."""

    def extend(self, tokens_n: Tensor) -> None:
        """One decode step: afterwards `logits` [n, V] are those of the token after these."""


class SharedDecoder:
    """Rows of several groups, each prompt's keys stored once.

    Args:
        model: the policy in eval mode, for which ``shares_keys`` holds.
        prompts: B prompts, left-padded.
        group_size: G.
        at_once: prompts whose groups grow at the same time; the others wait until rows are finished.
        capture: replay the decode step as a CUDA graph, recorded anew when its shapes change.
        share: compute what questions about one picture have in common once; see :func:`prefill`.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: PromptBatch,
        group_size: int,
        *,
        at_once: int,
        capture: bool = False,
        share: bool = True,
    ) -> None:
        install()
        self.share = share
        self.model, self.prompts, self.group_size = model, prompts, group_size
        self.device, self.waiting = prompts.input_ids.device, len(prompts)
        self.most_rows, self.capture = at_once * group_size, capture
        self.logits = torch.empty(0)
        # Per row: its group, and, as tensors, the rope position and the number of its next token.
        self.group_of: list[int] = []
        self.born: list[int] = []
        self.steps = 0
        self.position = torch.empty(0, dtype=torch.long, device=self.device)
        self.length = torch.empty(0, dtype=torch.long, device=self.device)
        self.key_bias: Tensor | None = None
        self.layers: list[GroupCache] = []
        self.lengths: list[int] = []
        self.room = FIRST_ROOM
        self._replay: Callable[[], Tensor] | None = None
        self._pool: Any = torch.cuda.graph_pool_handle() if capture and self.device.type == "cuda" else None
        base = base_model(model)
        self.lean = lean_step(model, self.most_rows) if _COMPARED.get(base, ()) is not None else None
        self.drop_share = DROP_SHARE_OF_GRAPHS if capture else DROP_SHARE

    # Rows come and go

    def admit(self) -> Tensor:
        """See :class:`Decoder`."""
        count = min(self.waiting, (self.most_rows - len(self.group_of)) // self.group_size)
        first = len(self.prompts) - self.waiting
        rows = torch.arange(first * self.group_size, (first + count) * self.group_size, device=self.device)
        if count <= 0:
            return rows[:0]
        self._prefill(self.prompts.select(first, first + count))
        self.waiting -= count
        self._arrange()
        return rows

    def _prefill(self, prompts: PromptBatch) -> None:
        count, new = len(prompts), len(prompts) * self.group_size
        logits, layers = prefill(self.model, prompts, share=self.share)
        next_position = prompt_positions(self.model, prompts)[1]
        groups = len(self.lengths)
        self.lengths += prompts.lengths
        self.group_of += [groups + i for i in range(count) for _ in range(self.group_size)]
        self.born += [self.steps] * new
        logits = logits.repeat_interleave(self.group_size, 0)
        self.logits = torch.cat([self.logits, logits]) if self.steps else logits
        self.position = torch.cat([self.position, next_position.repeat_interleave(self.group_size)])
        self.length = torch.cat([self.length, self.length.new_zeros(new)])
        width = self.prompts.input_ids.shape[1]
        self.layers = self.layers or [GroupCache() for _ in layers]
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            layer.add(keys, values, width, new, self.room)

    def keep(self, rows: list[int]) -> None:
        """See :class:`Decoder`."""
        groups = sorted({self.group_of[row] for row in rows})
        dropped = len(groups) < len(self.lengths)
        number = {group: i for i, group in enumerate(groups)}
        self.group_of = [number[self.group_of[row]] for row in rows]
        self.born = [self.born[row] for row in rows]
        self.lengths = [self.lengths[group] for group in groups]
        kept = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.position, self.length = self.position[kept], self.length[kept]
        self.logits = self.logits[:0]  # the next step gives others
        chosen = torch.tensor(groups, dtype=torch.long, device=self.device)
        for layer in self.layers:
            layer.keep(kept, chosen if dropped else None)
        self._arrange()

    def _arrange(self) -> None:
        """Where the rows stand in the block [s, g] of their groups, after rows came or went."""
        groups = len(self.lengths)
        counts = [0] * groups
        places = []
        for group in self.group_of:
            places.append((group, counts[group]))
            counts[group] += 1
        self.block = groups, max(counts, default=0)
        self.regular = len(places) == self.block[0] * self.block[1]
        self._tokens = torch.zeros(len(places), dtype=torch.long, device=self.device)
        # Rows of a group stand next to each other, so a full block needs no moving.
        self.places = torch.tensor(
            [group * self.block[1] + i for group, i in places], dtype=torch.long, device=self.device
        )
        width = max(self.lengths, default=0)
        self.width = width
        self.key_bias = None
        if min(self.lengths, default=0) < width:
            columns = torch.arange(width)
            padding = columns < width - torch.tensor(self.lengths)[:, None]
            self.key_bias = torch.zeros(groups, width).masked_fill_(padding, -torch.inf)[:, None, None].to(self.device)
        self._replay = None

    # Rows grow

    def extend(self, tokens_n: Tensor) -> None:
        """See :class:`Decoder`."""
        longest = self.steps - min(self.born)
        if longest >= self.room:
            self._make_room()
        even = min(self.born) == max(self.born)
        if self.lean is not None and _COMPARED.get(base_model(self.model)) != self.lean.kind:
            self._check_lean_step(tokens_n, longest + 1, longest if even else None)
        if self.capture:
            self._tokens.copy_(tokens_n)
            self.logits = self._captured()
        else:
            self.logits = self._forward(tokens_n, longest + 1, longest if even else None)
        self.position.add_(1)
        self.length.add_(1)
        self.steps += 1

    def _check_lean_step(self, tokens_n: Tensor, width: int, column: int | None) -> None:
        """Once per model: the lean step's logits beside those of the model's own forward."""
        lean, self.lean = self.lean, None
        assert lean is not None
        expected = self._forward(tokens_n, width, column).float().log_softmax(1)
        self.lean = lean
        found = self._forward(tokens_n, width, column).float().log_softmax(1)
        base = base_model(self.model)
        error = float((found - expected).abs().mean())
        exact = base.dtype == torch.float32 and not torch.is_autocast_enabled(self.device.type)
        if error <= (1e-3 if exact and torch.get_float32_matmul_precision() == "highest" else 0.1):
            _COMPARED[base] = lean.kind
            return
        rank_zero_warn(
            f"The lean decode step gives other log-probs than {type(base).__name__} itself (by {error:.2g} nats on "
            "average), so rollouts use the model's own forward, which is slower."
        )
        self.lean, _COMPARED[base] = None, None

    def _make_room(self) -> None:
        self.room *= 2
        for layer in self.layers:
            layer.grow(self.room)
        self._replay = None

    def _forward(self, tokens_n: Tensor, width: int, column: int | None) -> Tensor:
        """Logits [n, V]; attention sees `width` columns of own keys, all rows write to `column` if they agree."""
        self._own_width, self._column, self._own_bias = width, column, None
        if column is None:
            seen = torch.arange(width, device=self.device) <= self.length[:, None]
            bias = torch.zeros(seen.shape, device=self.device).masked_fill_(~seen, -torch.inf)
            self._own_bias = bias[:, None, None]
        if self.lean is not None:
            return self.lean(tokens_n, self.position, self._attend)
        output = self.model(
            input_ids=tokens_n[:, None],
            attention_mask=as_mask(self, self.device),
            position_ids=text_positions(self.model, self.position[:, None]),
            use_cache=False,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`rft_lightning.policy.group_attention.GroupAttention`; of one token per row."""
        return self._attend(layer, query[:, :, 0], key[:, :, 0], value[:, :, 0], scale)[:, None]

    def _attend(self, layer: int, q_nHD: Tensor, k_nhD: Tensor, v_nhD: Tensor, scale: float) -> Tensor:
        """[n, H, D]; stores the keys and values."""
        stored = self.layers[layer]
        q_nHD, k_nhD, v_nhD = same_dtype(q_nHD, k_nhD, v_nhD)
        stored.write(k_nhD, v_nhD, self._column, self.length)
        # [n, r, h, D]: the heads that share a key head become its queries.
        q_nrhD = q_nHD.unflatten(1, (k_nhD.shape[1], -1)).transpose(1, 2)
        own = part(q_nrhD, *stored.own(self._own_width), scale=scale, bias=self._own_bias)
        out_nrhD, _ = merged(self._to_prompts(stored, q_nrhD, scale), own)
        return out_nrhD.transpose(1, 2).reshape(q_nHD.shape)

    def _to_prompts(self, stored: GroupCache, q_nrhD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention to the prompts, the rows of a group together: [n, r, h, D] and log-sum-exps [n, r, h]."""
        groups, rows = self.block
        if self.regular:
            block = q_nrhD.reshape(groups, -1, *q_nrhD.shape[2:])
        else:
            block = q_nrhD.new_zeros(groups * rows, *q_nrhD.shape[1:]).index_copy_(0, self.places, q_nrhD)
            block = block.view(groups, -1, *q_nrhD.shape[2:])
        out, lse = part(block, *stored.prompts(self.width), scale=scale, bias=self.key_bias)
        out, lse = (x.reshape(groups * rows, -1, *x.shape[2:]) for x in (out, lse))  # [rows, r, h, ...]
        return (out, lse) if self.regular else (out[self.places], lse[self.places])

    # CUDA graphs

    def _captured(self) -> Tensor:
        if self._replay is None:
            run = partial(self._forward, self._tokens, self.room, None)
            try:
                self._replay = captured(run, self.device, self._pool)
            except RuntimeError as error:
                rank_zero_warn(
                    f"The decode step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}), so its "
                    "kernels are launched one by one, which is slower. Set cuda_graphs to false to leave it at that."
                )
                self.capture = False
                return run()
        return self._replay()


class CacheDecoder:
    """Rows of groups that grow together, with the model's own cache.

    A family without an exact shared-prefix layout (its cache cannot be repeated or cut by rows) is prefilled once per
    completion, and its finished rows run on.

    Args:
        model: the policy in eval mode.
        prompts: B prompts, left-padded.
        group_size: G.
    """

    def __init__(self, model: nn.Module, prompts: PromptBatch, group_size: int) -> None:
        family = family_of(base_model(model).config)
        self.model, self.prompts, self.group_size = model, prompts, group_size
        self.repeats = family is not None and len(family.layouts) > 0
        self.drop_share = DROP_SHARE if self.repeats else NEVER_DROP
        self.waiting = len(prompts)
        self.logits = torch.empty(0)

    def admit(self) -> Tensor:
        """See :class:`Decoder`: all of them, at once."""
        from transformers import DynamicCache

        repeats = self.group_size if self.repeats else 1
        prompts = self.prompts if self.repeats else repeat_prompts(self.prompts, self.group_size)
        device, rows = prompts.input_ids.device, self.waiting * self.group_size
        if not self.waiting:
            return torch.arange(0, device=device)
        self.waiting = 0
        self.cache = DynamicCache(config=base_model(self.model).config)
        positions, next_position = prompt_positions(self.model, prompts)
        output = self.model(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **model_inputs(prompts),
        )
        self.logits = output.logits[:, -1].repeat_interleave(repeats, 0)
        self.mask = prompts.attention_mask.repeat_interleave(repeats, 0)
        self.position = next_position.repeat_interleave(repeats, 0)
        if repeats > 1:
            self.cache.batch_repeat_interleave(repeats)
        return torch.arange(rows, device=device)

    def keep(self, rows: list[int]) -> None:
        """See :class:`Decoder`."""
        kept = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(kept)
        self.mask, self.position = self.mask[kept], self.position[kept]

    def extend(self, tokens_n: Tensor) -> None:
        """See :class:`Decoder`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.logits = self.model(
            input_ids=tokens_n[:, None],
            attention_mask=self.mask,
            position_ids=text_positions(self.model, self.position[:, None]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.position = self.position + 1
