"""Token log-probs and entropies, without a full [tokens, vocabulary] tensor.

Shape legend: R rows, C completion tokens, M positions, K tokens asked of each position, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
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
