"""The tokens that an objective works on, their masked means, and the statistics it reports.

Statistics have TRL's names where TRL has the number. They are means over tokens unless said otherwise:

- ``kl``: the estimate, times the ratio under `use_bias_correction_kl`; ``kl_sequence``: mean over completions of its
  token mean. Whenever there are log-probs of a reference model, whatever beta and `kl_placement`.
- ``entropy``; under `top_entropy_quantile` also ``entropy_acting``, the mean over the tokens that act, and
  ``acting_ratio``, their share.
- ``clip_ratio/low_mean``, ``high_mean``, ``region_mean`` (grpo, bnpo, dr_grpo, dapo, luspo): shares of ratios below the
  lower bound with a negative advantage, above the upper one with a positive, and of both. ``low_min``, ``high_max``:
  the extremes over completions of each completion's share. As in TRL they see the ratio after the cap `delta`. That
  changes nothing while delta > 1 + epsilon_high; otherwise no ratio is left above the upper bound and the high ratios
  are 0, although delta itself stops gradients.
- ``cispo_clip_ratio``: share of ratios above the cap where the advantage is positive.
- ``vespo/phi_seq_mean``: mean over completions of phi.
- ``policy_loss``: the loss without the entropy bonus, where that is on.
- ``sampling/sampling_logp_difference/mean, max`` and ``sampling/importance_sampling_ratio/min, mean, max``, with a
  `sampler_correction`: distance of the sampler from the old policy, and the weights applied (of completions where a
  completion has one).

With one ratio per completion the clip ratios and ``cispo_clip_ratio`` are means over completions.

Shape legend: N completions, C completion tokens; X is C, or 1 for one value per completion.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rft_lightning.errors import ConfigConflictError

CLIP_MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@dataclass(frozen=True)
class Tokens:
    """What an objective is given, in one dtype and with zeros where there is no token.

    Attributes:
        logp, old_logp, ref_logp, entropy, sampler_logp: [N, C]; float32, or float64 where logp is.
        advantages: [N, X].
        mask: [N, C] bool.
    """

    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor | None
    advantages: Tensor
    mask: Tensor
    entropy: Tensor | None
    sampler_logp: Tensor | None

    @classmethod
    def clean(
        cls,
        logp: Tensor,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        entropy: Tensor | None,
        sampler_logp: Tensor | None,
    ) -> Tokens:
        """Checked, converted and filled; advantages may be [N] or [N, C].

        Raises:
            ConfigConflictError: a tensor has another shape than logp.
        """
        dtype = torch.promote_types(logp.dtype, torch.float32)

        def like_logp(name: str, tensor: Tensor) -> Tensor:
            if tensor.shape != logp.shape:
                raise ConfigConflictError(
                    f"Expected {name} shaped like logp, {list(logp.shape)}, found {list(tensor.shape)}."
                )
            return tensor

        mask_NC = like_logp("mask", mask).bool()

        def clean(name: str, tensor: Tensor) -> Tensor:
            return like_logp(name, tensor).to(dtype).masked_fill(~mask_NC, 0)

        if advantages.ndim == 1 and len(advantages) == len(logp):
            advantages_NX = advantages.to(dtype)[:, None].masked_fill(~mask_NC.any(1, keepdim=True), 0)
        else:
            advantages_NX = clean("advantages", advantages)
        logp = clean("logp", logp)
        return cls(
            logp=logp,
            old_logp=logp.detach() if old_logp is None else clean("old_logp", old_logp),
            ref_logp=None if ref_logp is None else clean("ref_logp", ref_logp),
            advantages=advantages_NX,
            mask=mask_NC,
            entropy=None if entropy is None else clean("entropy", entropy),
            sampler_logp=None if sampler_logp is None else clean("sampler_logp", sampler_logp),
        )


def token_mean(values_NX: Tensor, mask_NC: Tensor) -> Tensor:
    """Mean over all completion tokens; 0 where there is none. Padding may hold anything, even NaN."""
    return torch.where(mask_NC, values_NX, 0).sum() / mask_NC.sum().clamp(min=1)


def sequence_mean(values_NX: Tensor, mask_NC: Tensor) -> Tensor:
    """Mean over the tokens of each completion: [N]; 0 for an empty one. Padding may hold anything, even NaN."""
    return torch.where(mask_NC, values_NX, 0).sum(1) / mask_NC.sum(1).clamp(min=1)


def mean(values_NX: Tensor, mask_NC: Tensor, *, per_completion: bool) -> Tensor:
    """Mean over tokens, or over the one value that each completion has."""
    return _per_completion(values_NX, mask_NC).mean() if per_completion else token_mean(values_NX, mask_NC)


def nanmin(values: Tensor) -> Tensor:
    """Smallest entry that is not NaN; NaN where every one is."""
    missing = values.isnan()
    return values.masked_fill(missing, torch.inf).amin().masked_fill(missing.all(), torch.nan)


def nanmax(values: Tensor) -> Tensor:
    """Largest entry that is not NaN; NaN where every one is."""
    return -nanmin(-values)


def clip_statistics(low_NX: Tensor, high_NX: Tensor, tokens: Tokens, *, per_completion: bool) -> dict[str, Tensor]:
    """``clip_ratio/*`` from which ratios are beyond the lower and the upper bound."""
    mask_NC, dtype = tokens.mask, tokens.logp.dtype

    def average(beyond_NX: Tensor) -> Tensor:
        return mean(beyond_NX.to(dtype), mask_NC, per_completion=per_completion)

    def shares(beyond_NX: Tensor) -> Tensor:
        share_N = _per_completion(beyond_NX.to(dtype), mask_NC)
        # As in TRL: where tokens are counted, a completion without any has no share.
        return share_N if per_completion else share_N.masked_fill(~mask_NC.any(1), torch.nan)

    means = map(average, (low_NX, high_NX, low_NX | high_NX))
    return {
        **dict(zip(CLIP_MEANS, means, strict=True)),
        "clip_ratio/low_min": nanmin(shares(low_NX)),
        "clip_ratio/high_max": nanmax(shares(high_NX)),
    }


def sampler_statistics(tokens: Tokens, ratio_NX: Tensor, *, per_completion: bool) -> dict[str, Tensor]:
    """``sampling/*``. Tokens for which the sampler has no log-prob (NaN) are left out of the difference."""
    assert tokens.sampler_logp is not None
    difference_NC = (tokens.old_logp - tokens.sampler_logp).abs()
    known_NC = tokens.mask & ~difference_NC.isnan()
    applied_NX = ratio_NX if per_completion else ratio_NX.masked_fill(~tokens.mask, torch.nan)
    return {
        "sampling/sampling_logp_difference/mean": token_mean(difference_NC, known_NC),
        "sampling/sampling_logp_difference/max": torch.where(known_NC, difference_NC, 0).amax(),
        "sampling/importance_sampling_ratio/min": nanmin(applied_NX),
        "sampling/importance_sampling_ratio/mean": mean(ratio_NX, tokens.mask, per_completion=per_completion),
        "sampling/importance_sampling_ratio/max": nanmax(applied_NX),
    }


def token_statistics(tokens: Tokens, kl_NC: Tensor | None, acting_NC: Tensor | None) -> dict[str, Tensor]:
    """KL and entropy; `acting_NC`: the tokens that act, where not all do."""
    stats, mask_NC = {}, tokens.mask
    if kl_NC is not None:
        stats["kl"] = token_mean(kl_NC.detach(), mask_NC)
        stats["kl_sequence"] = sequence_mean(kl_NC.detach(), mask_NC).mean()
    if tokens.entropy is not None:
        entropy_NC = tokens.entropy.detach()
        stats["entropy"] = token_mean(entropy_NC, mask_NC)
        if acting_NC is not None:
            stats["entropy_acting"] = token_mean(entropy_NC, acting_NC)
            stats["acting_ratio"] = token_mean(acting_NC.to(entropy_NC), mask_NC)
    return stats


def combine_statistics(
    parts: Sequence[tuple[Mapping[str, Tensor], float, float]], completion_means: Collection[str]
) -> dict[str, Tensor]:
    """The statistics of a whole from (statistics, completions, tokens) of its parts.

    Args:
        parts: of each part what an objective reported, and how many completions and tokens that was of.
        completion_means: names of the statistics that are means over completions.
    """
    combined = {}
    for name in dict.fromkeys(name for stats, _, _ in parts for name in stats):
        holders = [part for part in parts if name in part[0]]
        values = torch.stack([stats[name] for stats, _, _ in holders])
        if name.endswith("min"):
            combined[name] = nanmin(values)
        elif name.endswith("max"):
            combined[name] = nanmax(values)
        else:
            weights = torch.stack(
                [
                    torch.as_tensor(completions if name in completion_means else tokens).to(values)
                    * (stats["acting_ratio"] if name == "entropy_acting" else 1)
                    for stats, completions, tokens in holders
                ]
            )
            combined[name] = (values * weights).sum() / weights.sum().clamp(min=1)
    return combined


def _per_completion(values_NX: Tensor, mask_NC: Tensor) -> Tensor:
    """The value of each completion, or its token mean: [N]."""
    return values_NX[:, 0] if values_NX.shape[1] == 1 else sequence_mean(values_NX, mask_NC)
