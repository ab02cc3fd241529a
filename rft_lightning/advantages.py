"""Rewards -> group-relative advantages.

Shape legend: G completions per prompt, N = prompts * G completions, K rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rft_lightning.errors import ConfigConflictError

SCALES = ("group", "batch", "none")


def total_rewards(rewards_NK: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Weighted sum over rewards, skipping NaN (not applicable); NaN where no reward applies: [N]."""
    weights_K = torch.ones(rewards_NK.shape[1]) if weights is None else torch.as_tensor(weights)
    weighted_NK = rewards_NK * weights_K.to(rewards_NK)
    total_N = weighted_NK.nansum(1)
    return total_N.masked_fill(rewards_NK.isnan().all(1), torch.nan)


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    scale: str = "group",
    baseline: str = "group",
    aggregation: str = "sum_then_normalize",
    eps: float = 1e-4,
    weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """A_i = (r_i - mean of the group) / (std of the group + eps), the group-relative advantage (paper Eq. 3).

    Groups are consecutive runs of `group_size` completions. The standard deviation is unbiased. A completion to which
    no reward applies gets advantage 0 and stays out of mean and standard deviation.

    Args:
        rewards: [N], or [N, K] for several rewards; NaN = not applicable.
        group_size: G; N must be a multiple of it.
        scale: divide by the standard deviation of the ``group``, of the whole ``batch``, or not at all (``none``).
        baseline: ``group``: subtract the group's mean.
        aggregation: ``sum_then_normalize``: weight and sum the rewards, then normalise.
        eps: added to the standard deviation.
        weights: [K] weights of the rewards; 1 each when None.

    Returns:
        advantages [N], finite, in the dtype of `rewards`.

    Raises:
        ConfigConflictError: G < 2, N no multiple of G, or an unknown option.
    """
    rewards_NK = rewards[:, None] if rewards.ndim == 1 else rewards
    if group_size < 2:
        raise ConfigConflictError(
            f"Expected group_size >= 2, found {group_size}: an advantage compares answers within a group."
        )
    if len(rewards_NK) % group_size:
        raise ConfigConflictError(f"Expected a multiple of group_size={group_size} rewards, found {len(rewards_NK)}.")
    for name, value, known in (
        ("scale", scale, SCALES),
        ("baseline", baseline, ("group",)),
        ("aggregation", aggregation, ("sum_then_normalize",)),
    ):
        if value not in known:
            raise ConfigConflictError(f"Expected {name} to be one of {', '.join(known)}, found {value!r}.")
    total_BG = total_rewards(rewards_NK, weights).view(-1, group_size)
    centred_BG = total_BG - total_BG.nanmean(1, keepdim=True)
    if scale == "group":
        centred_BG = centred_BG / (_nanstd(total_BG, 1) + eps)
    elif scale == "batch":
        centred_BG = centred_BG / (_nanstd(total_BG.view(1, -1), 1) + eps)
    return centred_BG.nan_to_num(0.0).flatten()


def _nanstd(values: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation over `dim` without NaN entries, kept as size 1; 0 where fewer than two remain."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()
