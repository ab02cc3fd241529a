"""Attention of prompts and their completions with each prompt's keys stored and read once.

A completion sees two sets of keys: its prompt's, which it shares with its group, and its own. Attention to each is
computed by itself, all completions of a group together for the first, and the two results are merged by their
log-sum-exps, which is exact. There is no mask of the size of a row squared and no copy of the prompt per completion, so
the cost grows with P + G*C. The same holds for gradients: given the merged result, those of each part are the kernel's
own. (The identity is the one ring attention and cascade inference rest on.)

Models take part through their mask: a :class:`GroupMask` travels where a dense 4-D mask would and is handed by every
family, as it is, to the attention function, which lets it compute instead.

Shape legend: B prompts, G completions per prompt, N = B*G, H heads, h key heads, D width of a head, P prompt tokens,
C completion tokens, S queries, K keys, T tokens of a row.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from rft_lightning.policy.group_row import GroupRow

KERNEL = "sdpa"


class GroupAttention(Protocol):
    """What computes attention in place of the model's kernel."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer: query [rows, H, S, D], key and value [rows, h, S, D] -> [rows, S, H, D]."""


class GroupMask(Tensor):
    """A stand-in for a dense mask, of four dimensions as families expect of one, that carries a GroupAttention."""

    groups: GroupAttention


def as_mask(groups: GroupAttention, device: torch.device) -> GroupMask:
    """The mask to give to a model with the attention function :data:`KERNEL`."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).as_subclass(GroupMask)
    mask.groups = groups
    return mask


def install() -> None:
    """Let transformers' attention function :data:`KERNEL` honour a GroupMask; with any other mask it is what it was."""
    from transformers import AttentionInterface

    own = AttentionInterface()[KERNEL]
    if getattr(own, "honours_groups", False):
        return

    @wraps(own)
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        if not isinstance(attention_mask, GroupMask):
            return own(module, query, key, value, attention_mask, **kwargs)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return attention_mask.groups.attend(module.layer_idx, query, key, value, scale), None

    attention.honours_groups = True  # type: ignore[attr-defined]
    AttentionInterface.register(KERNEL, attention)


class PackedGroups:
    """Attention of a GroupRow in a forward with gradients, the same in every layer.

    Args:
        row: where the tokens are.
    """

    def __init__(self, row: GroupRow) -> None:
        self.row = row

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`GroupAttention`; one row."""
        query, key, value = same_dtype(query, key, value)
        out_TD: Tensor = _PackedAttention.apply(*(x[0].transpose(0, 1) for x in (query, key, value)), self.row, scale)
        return out_TD[None]


class _PackedAttention(torch.autograd.Function):
    """Attention over a GroupRow: q [T, H, D], k and v [T, h, D] -> [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: GroupRow, scale: float) -> Tensor:
        (q_prompt, q_own), (k_prompt, k_own), (v_prompt, v_own) = _all_blocks(q, k, v, row)
        prompt, lse_prompt = part(q_prompt, k_prompt, v_prompt, scale, causal=True)
        shared = part(_by_group(q_own, row), k_prompt, v_prompt, scale, bias=row.key_bias)
        own, lse_own = merged(shared, part(q_own, k_own, v_own, scale, causal=True))
        out = _unblock(prompt, own, row)
        ctx.save_for_backward(q, k, v, out, lse_prompt, lse_own)
        ctx.row, ctx.scale = row, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse_prompt, lse_own = ctx.saved_tensors
        row, scale = ctx.row, ctx.scale
        (q_prompt, q_own), (k_prompt, k_own), (v_prompt, v_own) = _all_blocks(q, k, v, row)
        (prompt, own), (grad_prompt, grad_own) = row.blocks(out), row.blocks(grad, zero_padding=True)
        dq_prompt, dk_prompt, dv_prompt = part_backward(
            grad_prompt, q_prompt, k_prompt, v_prompt, prompt, lse_prompt, scale, causal=True
        )
        by_group = [_by_group(x, row) for x in (grad_own, q_own, own, lse_own)]
        dq_shared, dk_shared, dv_shared = part_backward(
            by_group[0], by_group[1], k_prompt, v_prompt, by_group[2], by_group[3], scale, bias=row.key_bias
        )
        dq_own, dk_own, dv_own = part_backward(grad_own, q_own, k_own, v_own, own, lse_own, scale, causal=True)
        heads = k.shape[1]
        dq = _unblock(dq_prompt, dq_own + dq_shared.reshape(dq_own.shape), row)
        dk = _unblock(_folded(dk_prompt + dk_shared, heads), _folded(dk_own, heads), row)
        dv = _unblock(_folded(dv_prompt + dv_shared, heads), _folded(dv_own, heads), row)
        return dq, dk, dv, None, None


def _all_blocks(q: Tensor, k: Tensor, v: Tensor, row: GroupRow) -> list[tuple[Tensor, Tensor]]:
    """Prompt and completion blocks of all three, with keys and values repeated to the number of query heads."""
    repeats = q.shape[1] // k.shape[1]
    blocks = [row.blocks(x) for x in (q, k, v)]
    if repeats > 1:
        blocks[1:] = [(x.repeat_interleave(repeats, 2), y.repeat_interleave(repeats, 2)) for x, y in blocks[1:]]
    return blocks


def _by_group(own: Tensor, row: GroupRow) -> Tensor:
    """[N, c, ...] -> [B, G*c, ...]."""
    return own.reshape(row.groups, -1, *own.shape[2:])


def _folded(grad: Tensor, heads: int) -> Tensor:
    """The gradient [rows, K, H, D] of repeated keys, summed to [rows, K, h, D]."""
    return grad if grad.shape[2] == heads else grad.unflatten(2, (heads, -1)).sum(3)


def _unblock(prompt: Tensor, own: Tensor, row: GroupRow) -> Tensor:
    """[B, p, H, D] and [N, c, H, D] -> [T, H, D]."""
    both = torch.cat([prompt.flatten(0, 1), own.flatten(0, 1)])
    return both if row.whole else both.index_select(0, row.back)


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One attention over two sets of keys from (result, log-sum-exp) over each, in the shapes of the second."""
    out, lse = second
    other, other_lse = first[0].reshape(out.shape), first[1].reshape(lse.shape)
    share = (other_lse - lse).sigmoid()[..., None]
    return out.to(share.dtype).lerp(other.to(share.dtype), share).to(out.dtype), torch.logaddexp(other_lse, lse)


# The kernels. All take and give [rows, S, H, D] and, for log-sum-exps, [rows, S, H] in float32.


def part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q to one set of keys, and the log-sum-exp of its scores.

    Args:
        q: [rows, S, H, D].
        k: [rows, K, H, D].
        v: [rows, K, H, D].
        scale: what scores are multiplied by.
        causal: query i sees keys 0 to i.
        bias: [rows, 1, 1, K] added to the scores; not with `causal`.
    """
    if q.device.type == "cpu":
        mask = None if bias is None else bias.to(q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out.transpose(1, 2), lse.transpose(1, 2)
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        q, k, v, _expanded(bias, q), None, None, None, None, 0.0, int(causal), True, scale=scale
    )
    return out, lse[..., : q.shape[1]].transpose(1, 2)


def part_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through one set of keys, given the result and log-sum-exp over all sets."""
    if q.device.type == "cpu":
        mask = None if bias is None else bias.to(q.dtype)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (grad, q, k, v, out, lse)), 0.0, causal, attn_mask=mask, scale=scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv
    lse = torch.nn.functional.pad(lse.transpose(1, 2), (0, -lse.shape[1] % 32), value=torch.inf)
    none = torch.zeros((), dtype=torch.int64, device=q.device)  # of the dropout that there is not
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        grad, q, k, v, _expanded(bias, q), out, None, None, q.shape[1], k.shape[1], lse, 0.0, none, none, int(causal),
        False, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _expanded(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """[rows, 1, 1, K] -> [rows, H, S, K] without copies, rows beginning at multiples of 8 as the kernel wants them."""
    if bias is None:
        return None
    keys = bias.shape[-1]
    aligned = torch.nn.functional.pad(bias.to(q.dtype), (0, -keys % 8))[..., :keys]
    return aligned.expand(-1, q.shape[2], q.shape[1], -1)


def same_dtype(*tensors: Tensor) -> list[Tensor]:
    """All in the dtype of the last, or of autocast: there projections are in it, what rotary angles touched is not."""
    kind, dtype = tensors[-1].device.type, tensors[-1].dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return [tensor.to(dtype) for tensor in tensors]
