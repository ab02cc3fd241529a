"""Token log-probs and entropies from logits.

Shape legend: R rows, C completion tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits_RCV: Tensor, ids_RC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log pi(id) of each token, in float32: [R, C].

    Row by row, so that only one row's float32 copy of the logits lives at a time outside autograd.
    """
    rows = []
    for logits_CV, ids_C in zip(logits_RCV, ids_RC, strict=True):
        scaled_CV = logits_CV.float() / temperature
        rows.append(scaled_CV.gather(1, ids_C[:, None])[:, 0] - scaled_CV.logsumexp(1))
    return torch.stack(rows)


@torch.no_grad()
def token_entropies(logits_RCV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the next-token distribution at each position, in float32 and without gradient: [R, C]."""
    rows = []
    for logits_CV in logits_RCV:
        logp_CV = (logits_CV.float() / temperature).log_softmax(1)
        rows.append(-(logp_CV.exp() * logp_CV).sum(1))
    return torch.stack(rows)
