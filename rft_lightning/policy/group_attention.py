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
from torch.autograd.function import once_differentiable

from rft_lightning.policy.group_row import GroupRow, Runs

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
    # Without entries: a kernel that does not know what it is cannot take it for a mask.
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device).as_subclass(GroupMask)
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
        keys, values = _repeated(k, q), _repeated(v, q)
        prompts, shared, own = [], [], []
        for q_prompt, q_answers, k_prompt, v_prompt, bias in zip(
            row.prompts.split(q), row.answers.split(q), row.prompts.split(keys), row.prompts.split(values),
            row.prompts.biases, strict=True,
        ):  # fmt: skip
            prompts.append(part(q_prompt, k_prompt, v_prompt, scale=scale, causal=True))
            shared.append(part(q_answers, k_prompt, v_prompt, scale=scale, bias=bias))
        for blocks in zip(*(row.completions.split(x) for x in (q, keys, values)), strict=True):
            own.append(part(*blocks, scale=scale, causal=True))
        to_prompts, to_itself = _joined(shared, row.answers, q), _joined(own, row.completions, q)
        of_prompts, of_completions = _joined(prompts, row.prompts, q), merged(to_prompts, to_itself)
        out, lse = (row.join(*pair) for pair in zip(of_prompts, of_completions, strict=True))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.row, ctx.scale = row, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        row, scale = ctx.row, ctx.scale
        keys, values = _repeated(k, q), _repeated(v, q)

        def blocks(runs: Runs) -> Any:
            # Without a gradient, and with no weight on any key, padding has no part in anything.
            given = runs.split(grad, padding=0), runs.split(q), runs.split(out), runs.split(lse, padding=torch.inf)
            return zip(*given, strict=True)

        prompts, answers, own = [], [], []
        for prompt, answer, k_prompt, v_prompt, bias in zip(
            blocks(row.prompts), blocks(row.answers), row.prompts.split(keys), row.prompts.split(values),
            row.prompts.biases, strict=True,
        ):  # fmt: skip
            dq, dk, dv = part_backward(prompt, k_prompt, v_prompt, scale=scale, causal=True)
            dq_answer, dk_shared, dv_shared = part_backward(answer, k_prompt, v_prompt, scale=scale, bias=bias)
            prompts.append((dq, dk + dk_shared, dv + dv_shared))
            answers.append(dq_answer)
        for completion, k_own, v_own in zip(
            blocks(row.completions), row.completions.split(keys), row.completions.split(values), strict=True
        ):
            own.append(part_backward(completion, k_own, v_own, scale=scale, causal=True))
        of_prompts = [row.prompts.join(x, q) for x in zip(*prompts, strict=True)]
        of_completions = [row.completions.join([block[i] for block in own], q) for i in range(3)]
        of_completions[0] = of_completions[0] + row.answers.join(answers, q)
        dq, dk, dv = (row.join(*pair) for pair in zip(of_prompts, of_completions, strict=True))
        return dq, _folded(dk, k), _folded(dv, v), None, None


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [T, h, D] for each of the query's heads: [T, H, D]."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _folded(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of what was repeated, summed to the shape of `x`."""
    return grad if grad.shape == x.shape else grad.unflatten(1, (x.shape[1], -1)).sum(2)


def _joined(parts: list[tuple[Tensor, Tensor]], runs: Runs, q: Tensor) -> tuple[Tensor, Tensor]:
    """Results and log-sum-exps of blocks as those of the tokens of the runs."""
    return runs.join([out for out, _ in parts], q), runs.join([lse for _, lse in parts], q[..., 0].float())


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One attention over two sets of keys from (result [..., D], log-sum-exp [...]) over each."""
    (other, other_lse), (out, lse) = first, second
    share = (other_lse - lse).sigmoid()[..., None]
    return out.to(share.dtype).lerp(other.to(share.dtype), share).to(out.dtype), torch.logaddexp(other_lse, lse)


# The kernels. All take and give [rows, S, H, D] and, for log-sum-exps, [rows, S, H] in float32.


def part(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, bias: Tensor | None = None
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
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through one set of keys.

    Args:
        given: the gradient of the result, q, and the result and log-sum-exp over all sets of keys.
        k: [rows, K, H, D].
        v: [rows, K, H, D].
        scale: as in :func:`part`.
        causal: as in :func:`part`.
        bias: as in :func:`part`.
    """
    grad, q, out, lse = given
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
