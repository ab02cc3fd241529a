"""Token log-probs and entropies, without a full [tokens, vocabulary] tensor.

Shape legend: R rows, C completion tokens, M positions, K tokens asked of each position, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rft_lightning.policy.families import base_model

# Logits that exist at once: 128 MB in float32.
CHUNK_LOGITS = 2**25


def token_logprobs(logits_RCV: Tensor, ids_RC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log pi(id) of each token, in float32: [R, C].

    Row by row, so that only one row's float32 copy of the logits lives at a time outside autograd.
    """
    rows = []
    for logits_CV, ids_C in zip(logits_RCV, ids_RC, strict=True):
        scaled_CV = logits_CV.float() / temperature
        rows.append(scaled_CV.gather(1, ids_C[:, None])[:, 0] - scaled_CV.logsumexp(1))
    return torch.stack(rows)


def token_entropies(logits_RCV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the next-token distribution at each position, in float32: [R, C]."""
    rows = []
    for logits_CV in logits_RCV:
        logp_CV = (logits_CV.float() / temperature).log_softmax(1)
        rows.append(-(logp_CV.exp() * logp_CV).sum(1))
    return torch.stack(rows)


@contextmanager
def scoring_head(
    model: Any,
    positions: Callable[[Tensor], Tensor],
    ids_MK: Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool = False,
) -> Iterator[None]:
    """Inside, a forward of `model` returns log-probs where it would return logits: ``.logits`` is [M, K + 1].

    The first K columns are the log-probs of `ids_MK`, the last one the entropies (0 unless asked for). The output head
    is replaced rather than called by hand on hidden states, so that a forward still enters through the whole model:
    FSDP2 gathers the weights of the head with those of the root, and adapters on the head apply.

    Args:
        model: a model of a family in the table, whose forward ends with its output head.
        positions: picks the M positions out of the hidden states [B, T, D] that reach the head: [M, D].
        ids_MK: K token ids asked of each position.
        temperature: divides the logits.
        with_entropy: also compute the entropies.
        entropy_gradient: with their gradient, as an entropy bonus needs it; costs memory and time in backward.
    """
    head = base_model(model).get_output_embeddings()
    own, project = vars(head).get("forward"), head.forward

    def score(hidden_BTD: Tensor) -> Tensor:
        hidden_MD = positions(hidden_BTD)
        size = max(1, CHUNK_LOGITS // head.weight.shape[0])
        if type(head) is nn.Linear and own is None and not entropy_gradient:
            return _FusedHead.apply(hidden_MD, head.weight, head.bias, ids_MK, temperature, with_entropy, size)
        pieces = [
            checkpoint(
                score_chunk, project, hidden_MD[i : i + size], ids_MK[i : i + size], temperature, with_entropy,
                entropy_gradient, use_reentrant=False, preserve_rng_state=False,
            )
            for i in range(0, max(1, len(hidden_MD)), size)
        ]  # fmt: skip
        return torch.cat(pieces)

    head.forward = score
    try:
        yield
    finally:
        del head.forward
        if own is not None:  # a hook of another library
            head.forward = own


class _FusedHead(torch.autograd.Function):
    """Output head, log-softmax and gather as one: a chunk of logits lives at a time, in forward and in backward.

    Both gradients are made from the same logits, and the weight's is added up in place, which autograd over chunks
    would do neither of. [M, K + 1] log-probs and, last, entropies (without a gradient).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids_MK: Tensor,
        temperature: float,
        with_entropy: bool,
        size: int,
    ) -> Tensor:
        dtype = _compute_dtype(hidden_MD)
        hidden_MD = hidden_MD.to(dtype)
        scores_MK1 = torch.zeros(len(hidden_MD), ids_MK.shape[1] + 1, device=hidden_MD.device)
        normalizers_M1 = torch.empty(len(hidden_MD), 1, device=hidden_MD.device)
        cast, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, len(hidden_MD), size):
            part = slice(start, start + size)
            logits_MV = _logits(hidden_MD[part], cast, cast_bias, temperature)
            normalizer_M1 = logits_MV.logsumexp(1, keepdim=True)
            normalizers_M1[part] = normalizer_M1
            scores_MK1[part, :-1] = logits_MV.gather(1, ids_MK[part]) - normalizer_M1
            if with_entropy:
                logp_MV = logits_MV.sub_(normalizer_M1)
                scores_MK1[part, -1] = -logp_MV.exp().mul_(logp_MV).sum(1)
        ctx.save_for_backward(hidden_MD, weight, bias, ids_MK, normalizers_M1)
        ctx.temperature, ctx.size = temperature, size
        return scores_MK1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MK1: Tensor) -> Any:
        hidden_MD, weight, bias, ids_MK, normalizers_M1 = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = hidden_MD.dtype
        cast, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad_hidden = torch.empty_like(hidden_MD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros(len(weight), device=weight.device) if needs_bias else None
        for start in range(0, len(hidden_MD), ctx.size):
            part = slice(start, start + ctx.size)
            grad_MK = grad_MK1[part, :-1] / ctx.temperature
            logits_MV = _logits(hidden_MD[part], cast, cast_bias, ctx.temperature)
            # Of log-probs with respect to logits: 1 at the token, less the probabilities.
            grad_MV = logits_MV.sub_(normalizers_M1[part]).exp_().mul_(-grad_MK.sum(1, keepdim=True))
            grad_MV = grad_MV.scatter_add_(1, ids_MK[part], grad_MK).to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_MV @ cast
            if grad_weight is not None:
                if grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad_MV.T, hidden_MD[part])
                else:
                    grad_weight += grad_MV.T @ hidden_MD[part]
            if grad_bias is not None:
                grad_bias += grad_MV.sum(0, dtype=torch.float32)
        return (
            grad_hidden,
            grad_weight,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 4,
        )


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """That of a linear layer with this input."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _logits(hidden_MD: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits_MV = nn.functional.linear(hidden_MD, weight, bias).float()
    return logits_MV.div_(temperature) if temperature != 1.0 else logits_MV


def score_chunk(
    project: Callable[[Tensor], Tensor],
    hidden_MD: Tensor,
    ids_MK: Tensor,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool = False,
) -> Tensor:
    """[M, K + 1] log-probs and, last, entropies of a few positions; their logits are made anew in backward."""
    logits_MV = project(hidden_MD).float()
    if temperature != 1.0:
        logits_MV = logits_MV / temperature
    normalizer_M1 = logits_MV.logsumexp(1, keepdim=True)
    logp_MK = logits_MV.gather(1, ids_MK) - normalizer_M1
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_M1 = torch.zeros_like(normalizer_M1)
        if with_entropy:
            logp_MV = logits_MV - normalizer_M1
            probabilities_MV = logp_MV.exp()
            # In place where nothing is kept for backward: one tensor of the vocabulary less.
            weighted_MV = probabilities_MV * logp_MV if entropy_gradient else probabilities_MV.mul_(logp_MV)
            entropy_M1 = -weighted_MV.sum(1, keepdim=True)
    return torch.cat([logp_MK, entropy_M1], 1)
