"""The next token of each row: temperature, truncation and Gumbel-max over the logits.

Shape legend: N rows, V vocabulary, K candidate tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.noise import gumbel

# Noise made at once on a CPU, 2 MB: more would fall out of its caches.
CPU_NOISE = 2**19


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the truncations are those of ``generate``, in its order.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; 0 for all.
        top_p: draw among the fewest tokens that hold this much probability; 1 for all.
        min_p: leave out tokens less likely than this share of the likeliest one; 0 for none.

    Raises:
        ConfigConflictError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        rules = {
            f"temperature >= 0, found {self.temperature}": self.temperature >= 0,
            f"top_k >= 0, found {self.top_k}": self.top_k >= 0,
            f"0 < top_p <= 1, found {self.top_p}": 0 < self.top_p <= 1,
            f"0 <= min_p <= 1, found {self.min_p}": 0 <= self.min_p <= 1,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ConfigConflictError(f"Expected {rule}.")

    @property
    def greedy(self) -> bool:
        """Whether there is nothing to draw."""
        return self.temperature == 0


def next_tokens(
    logits_NV: Tensor,
    sampling: Sampling,
    keys_N: Tensor,
    position: int | Tensor,
    forbidden: Tensor,
    held: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits_NV: what the model says; not changed.
        sampling: how to draw.
        keys_N: the rows' noise keys (policy/noise.py).
        position: index of the token in its completion; one for all rows, or [N].
        forbidden: ids of tokens that are never drawn.
        held: ids of tokens, and [N] True on rows that must not draw them.

    Returns:
        tokens [N] int64, and their log-probs [N] float32 under the model at this temperature (1 when greedy), before
        anything was forbidden or truncated: what a forward pass over the completion gives.
    """
    scaled_NV = logits_NV.float()
    if not sampling.greedy:
        scaled_NV = scaled_NV / sampling.temperature
    normalizer_N = scaled_NV.logsumexp(1)
    allowed_NV = scaled_NV.index_fill(1, forbidden, -torch.inf)
    if held is not None:
        ids, rows_N = held
        allowed_NV[:, ids] = allowed_NV[:, ids].masked_fill(rows_N[:, None], -torch.inf)
    tokens_N = allowed_NV.argmax(1) if sampling.greedy else _draw(allowed_NV, sampling, keys_N, position)
    return tokens_N, scaled_NV.gather(1, tokens_N[:, None])[:, 0] - normalizer_N


def _draw(logits_NV: Tensor, sampling: Sampling, keys_N: Tensor, position: int | Tensor) -> Tensor:
    """Gumbel-max over what the truncations leave; after top-k only K tokens need noise."""
    rows, vocabulary = logits_NV.shape
    if 0 < sampling.top_k < vocabulary:
        values_NK, tokens_NK = logits_NV.topk(sampling.top_k)
    elif sampling.top_p < 1:
        values_NK, tokens_NK = logits_NV.sort(descending=True)
    else:
        values_NK, tokens_NK = logits_NV, torch.arange(vocabulary, device=logits_NV.device)[None]
    values_NK = truncate(values_NK, sampling)
    # In descending order what is left out lies behind what is kept. Anywhere else asking how much would wait.
    if sampling.top_p < 1 and values_NK.device.type == "cpu":
        kept = int((values_NK > -torch.inf).sum(1).max())
        values_NK, tokens_NK = values_NK[:, :kept], tokens_NK[:, :kept]
    at_once = max(1, CPU_NOISE // values_NK.shape[1]) if logits_NV.device.type == "cpu" else rows
    picks = []
    for first in range(0, rows, at_once):
        part = slice(first, first + at_once)
        tokens = tokens_NK if len(tokens_NK) == 1 else tokens_NK[part]
        at = position if isinstance(position, int) else position[part]
        picks.append((values_NK[part] + gumbel(keys_N[part], at, tokens)).argmax(1))
    picked_N1 = torch.cat(picks)[:, None]
    return tokens_NK.expand(rows, -1).gather(1, picked_N1)[:, 0]


def truncate(values_NK: Tensor, sampling: Sampling) -> Tensor:
    """Logits with -inf where top-p or min-p leaves a token out; for top-p they must be in descending order."""
    if sampling.top_p < 1:
        probabilities_NK = values_NK.softmax(1)
        # In float64: at 150,000 tokens a float32 sum drifts by whole tokens.
        before_NK = probabilities_NK.double().cumsum(1) - probabilities_NK
        keep_NK = before_NK < sampling.top_p
        keep_NK[:, 0] = True
        values_NK = values_NK.masked_fill(~keep_NK, -torch.inf)
    if sampling.min_p > 0:
        floor_N1 = values_NK.amax(1, keepdim=True) + math.log(sampling.min_p)
        values_NK = values_NK.masked_fill(values_NK < floor_N1, -torch.inf)
    return values_NK
