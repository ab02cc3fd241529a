"""Rewards -> group-relative advantages.

Shape legend: B prompts, G completions per prompt, N = B * G completions, K rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rft_lightning.errors import ConfigConflictError, NonFiniteError

SCALES = ("group", "batch", "none")
BASELINES = ("group", "leave_one_out", "batch")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")

# Rewards of a group closer than this (standard deviation) are alike.
SPREAD = 1e-6


def total_rewards(rewards_NK: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Weighted sum over rewards, skipping NaN (not applicable); NaN where no reward applies: [N].

    Weights are [K], or [N, K] where the completions' tasks weight differently; 1 each when None.
    """
    total_N = (rewards_NK * _weights(rewards_NK, weights)).nansum(1)
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
    """A_i = (r_i - baseline) / (standard deviation + eps), by default the group-relative advantage (paper Eq. 3).

    Groups are consecutive runs of `group_size` completions; the batch is all the rewards given. Standard deviations
    are unbiased. A completion to which no reward applies gets advantage 0 and stays out of every mean and standard
    deviation. Beside a baseline of its group, the only completion that can be scored gets 0 as well.

    Args:
        rewards: [N], or [N, K] for several rewards; NaN = not applicable.
        group_size: G; N must be a multiple of it.
        scale: divide by the standard deviation of the rewards of the ``group``, of the whole ``batch``, or not at all
            (``none``; Dr. GRPO, arXiv 2503.20783).
        baseline: what is subtracted: the mean of the ``group``; ``leave_one_out``, the mean of the group's other
            completions (RLOO, arXiv 2402.14740); the mean of the whole ``batch`` (REINFORCE++, arXiv 2501.03262).
            Take ``batch`` with scale ``batch`` or ``none``: a group whose answers are rewarded alike has standard
            deviation 0, and scale ``group`` would multiply its distance from the batch by 1 / eps.
        aggregation: ``sum_then_normalize``: weight and sum the rewards, then normalise. ``normalize_then_sum`` (GDPO,
            arXiv 2601.05242): z-score each reward within its group, weight and sum, then z-score over the batch; there
            `scale` is not read.
        eps: added to the standard deviation.
        weights: [K] weights of the rewards, or [N, K] where completions differ in them; 1 each when None.

    Returns:
        advantages [N], finite, in the dtype of `rewards`, float32 at least.

    Raises:
        ConfigConflictError: G < 2, N no multiple of G, an unknown option, a wrong number of weights, or
            ``normalize_then_sum`` with another baseline than ``group``.
        NonFiniteError: a reward is infinite.
    """
    _check_choice("scale (the model's scale_rewards)", scale, SCALES)
    _check_choice("baseline", baseline, BASELINES)
    _check_choice("aggregation", aggregation, AGGREGATIONS)
    rewards_BGK = _grouped(rewards, group_size)
    if aggregation == "normalize_then_sum":
        if baseline != "group":
            raise ConfigConflictError(
                f"aggregation normalize_then_sum has its own baseline, found baseline {baseline!r}; take baseline "
                "group, or aggregation sum_then_normalize."
            )
        scores_BGK = _centred(rewards_BGK, 1) / (_nanstd(rewards_BGK, 1) + eps)
        total_N = total_rewards(scores_BGK.flatten(0, 1), weights)
        return (_centred(total_N, 0) / (_nanstd(total_N, 0) + eps)).nan_to_num(0.0)
    total_BG = total_rewards(rewards_BGK.flatten(0, 1), weights).view(-1, group_size)
    above_BG = _above_baseline(total_BG, baseline)
    if scale == "group":
        above_BG = above_BG / (_nanstd(total_BG, 1) + eps)
    elif scale == "batch":
        above_BG = above_BG / (_nanstd(total_BG.flatten(), 0) + eps)
    return above_BG.nan_to_num(0.0).flatten()


def informative_groups(
    rewards: Tensor,
    group_size: int,
    *,
    weights: Sequence[float] | Tensor | None = None,
    aggregation: str = "sum_then_normalize",
) -> Tensor:
    """Whether the completions of a group differ in reward, so that their group teaches something: [B] bool.

    They differ where the standard deviation of the total reward exceeds 1e-6; under ``normalize_then_sum`` where that
    of any single reward of non-zero weight does, since there rewards of opposite order do not cancel. A group with
    fewer than two completions that can be scored is not informative. Dynamic sampling (DAPO, arXiv 2503.14476) keeps
    the groups that are.

    Args:
        rewards: [N], or [N, K] for several rewards; NaN = not applicable.
        group_size: G; N must be a multiple of it.
        weights: [K] or [N, K] weights of the rewards; 1 each when None.
        aggregation: as in :func:`group_advantages`.

    Raises:
        ConfigConflictError: as :func:`group_advantages`.
        NonFiniteError: a reward is infinite.
    """
    _check_choice("aggregation", aggregation, AGGREGATIONS)
    rewards_BGK = _grouped(rewards, group_size)
    if aggregation == "normalize_then_sum":
        rewards_NK = rewards_BGK.flatten(0, 1)
        counted_NK = rewards_NK.masked_fill(_weights(rewards_NK, weights) == 0, torch.nan)
        return (_nanstd(counted_NK.view_as(rewards_BGK), 1)[:, 0] > SPREAD).any(1)
    total_BG = total_rewards(rewards_BGK.flatten(0, 1), weights).view(-1, group_size)
    return _nanstd(total_BG, 1)[:, 0] > SPREAD


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards as [B, G, K] in float32 at least, checked."""
    if group_size < 2:
        raise ConfigConflictError(
            f"Expected group_size >= 2, found {group_size}: an advantage compares answers within a group."
        )
    if len(rewards) % group_size:
        raise ConfigConflictError(f"Expected a multiple of group_size={group_size} rewards, found {len(rewards)}.")
    if rewards.isinf().any():
        raise NonFiniteError(
            "Expected finite rewards, or NaN where one does not apply, found an infinite one; bound the reward."
        )
    rewards_NK = rewards[:, None] if rewards.ndim == 1 else rewards
    return rewards_NK.to(torch.promote_types(rewards.dtype, torch.float32)).unflatten(0, (-1, group_size))


def _weights(rewards_NK: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """Weights as [K] or [N, K], like the rewards."""
    if weights is None:
        return rewards_NK.new_ones(rewards_NK.shape[1])
    given = torch.as_tensor(weights).to(rewards_NK)
    if given.shape not in (rewards_NK.shape, rewards_NK.shape[1:]):
        raise ConfigConflictError(
            f"Expected one weight per reward, {rewards_NK.shape[1]} in all or for each of {len(rewards_NK)} "
            f"completions, found weights of shape {list(given.shape)}."
        )
    return given


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigConflictError(f"Expected {name} to be one of {', '.join(known)}, found {value!r}.")


def _above_baseline(total_BG: Tensor, baseline: str) -> Tensor:
    """Distance of each total from its baseline; NaN where there is none."""
    if baseline == "batch":
        return _centred(total_BG.flatten(), 0).view_as(total_BG)
    centred_BG = _centred(total_BG, 1)
    if baseline == "group":
        return centred_BG
    # r_i - mean of the others = n / (n - 1) * (r_i - mean of all n).
    count_B1 = (~total_BG.isnan()).sum(1, keepdim=True)
    return centred_BG * count_B1 / (count_B1 - 1)


def _centred(values: Tensor, dim: int) -> Tensor:
    """Distance from the mean over `dim`, which skips NaN; exactly 0 where all are alike.

    A mean of equal numbers may round, and division by a standard deviation near 0 would turn that into an advantage;
    distances from the largest are exact.
    """
    below = values - values.masked_fill(values.isnan(), -torch.inf).amax(dim, keepdim=True)
    return below - below.nanmean(dim, keepdim=True)


def _nanstd(values: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation over `dim` without NaN entries, kept as size 1; 0 where fewer than two remain."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    return (_centred(values, dim).square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
