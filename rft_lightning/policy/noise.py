"""Sampling noise that is a function of what is sampled, not of where: batch, rank and device leave no trace in it.

The noise of a token depends on (run seed, optimiser step, sample, its occurrence in the step, completion index,
position, token) alone. It comes from integer hashes, whose results are the same on every device, where generators
differ.

Shape legend: N rows, K candidate tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rft_lightning.sample import Sample

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15


def row_keys(samples: Sequence[Sample], group_size: int, *, seed: int, step: int, device: torch.device) -> Tensor:
    """One int64 key per completion [N], N = len(samples) * group_size, completions of a prompt next to each other."""
    keys: list[int] = []
    for sample in samples:
        digest = hashlib.blake2b(sample.id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        shared = _chain(seed, step, int.from_bytes(digest, "big"), sample.occurrence)
        keys.extend(_chain(shared, completion) for completion in range(group_size))
    return torch.tensor([key - _WORD if key >= _WORD // 2 else key for key in keys], dtype=torch.int64, device=device)


def gumbel(keys_N: Tensor, position: int | Tensor, tokens_NK: Tensor) -> Tensor:
    """Standard Gumbel noise [N, K] in float32 of the tokens that may follow at `position` (0 is the first) of each row.

    Args:
        keys_N: int64 keys of the rows.
        position: index of the token in its completion; one for all rows, or [N].
        tokens_NK: token ids, [N, K] or [1, K] where every row has the same candidates.
    """
    turn = _signed64((position + 1) * _GOLDEN) if isinstance(position, int) else (position + 1) * _signed64(_GOLDEN)
    keys_N = _mix64(keys_N + turn)
    low_N1 = keys_N.to(torch.int32)[:, None]
    high_N1 = (keys_N >> 32).to(torch.int32)[:, None]
    bits_NK = _mix32(_mix32(tokens_NK.to(torch.int32) ^ low_N1) + high_N1)
    # 31 bits; what decides the race is the smallest exponential, so the fine steps of floats are put near zero.
    uniform_NK = (bits_NK & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    exponential_NK = uniform_NK.neg_().log1p_().neg_()
    return exponential_NK.log_().neg_()


def _chain(*words: int) -> int:
    """Splitmix64 over a sequence of integers, order included."""
    state = 0
    for word in words:
        state = (state ^ (word % _WORD)) * 0xBF58476D1CE4E5B9 % _WORD
        state = (state + _GOLDEN) % _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % _WORD
        state ^= state >> 31
    return state


def _signed64(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _mix64(x: Tensor) -> Tensor:
    """Splitmix64's finaliser on int64, whose products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift, 64)) * _signed64(factor)
    return x ^ _shift_right(x, 31, 64)


def _mix32(x: Tensor) -> Tensor:
    """The hash lowbias32 (Wellons) on int32, whose products wrap around."""
    x = x ^ _shift_right(x, 16, 32)
    x = x * 0x7FEB352D
    x = x ^ _shift_right(x, 15, 32)
    x = x * (0x846CA68B - 2**32)
    return x ^ _shift_right(x, 16, 32)


def _shift_right(x: Tensor, bits: int, width: int) -> Tensor:
    """Logical shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (width - bits)) - 1)
