"""The GRPO objective: token log-probs and advantages -> loss and its statistics. Pure; no state.

Shape legend: N completions, C completion tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rft_lightning.errors import ConfigConflictError


class GRPOObjective(nn.Module):
    """Clipped policy gradient with a KL penalty towards the reference model (paper Eq. 4, DeepSeekMath Eq. 3).

    Per token, with the ratio rho = exp(logp - old_logp):
    ``-min(rho * A, clip(rho, 1 - epsilon, 1 + epsilon_high) * A) + beta * k3``,
    where ``k3 = exp(ref_logp - logp) - (ref_logp - logp) - 1`` (Schulman's third estimator).

    Args:
        loss_type: ``grpo``: mean over the tokens of each completion, then over completions.
        beta: weight of the KL penalty; 0 needs no reference model. The paper's runs used 0.04.
        epsilon: lower clip range.
        epsilon_high: upper clip range; `epsilon` when None.

    Raises:
        ConfigConflictError: an option is unknown or out of its range.
    """

    def __init__(
        self, *, loss_type: str = "grpo", beta: float = 0.04, epsilon: float = 0.2, epsilon_high: float | None = None
    ) -> None:
        super().__init__()
        if loss_type != "grpo":
            raise ConfigConflictError(f"Expected loss_type grpo, found {loss_type!r}.")
        if beta < 0 or not 0 <= epsilon < 1 or (epsilon_high is not None and epsilon_high < 0):
            raise ConfigConflictError(
                "Expected beta >= 0, 0 <= epsilon < 1 and epsilon_high >= 0 or null, found "
                f"{beta}, {epsilon} and {epsilon_high}."
            )
        self.loss_type, self.beta, self.epsilon = loss_type, beta, epsilon
        self.epsilon_high = epsilon if epsilon_high is None else epsilon_high

    def forward(
        self,
        logp: Tensor,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        *,
        entropy: Tensor | None = None,
        sampler_logp: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of N completions.

        Args:
            logp: [N, C] log-probs under the policy, with gradient.
            old_logp: [N, C] under the policy that sampled; None means the policy itself (first step after a rollout).
            ref_logp: [N, C] under the reference model; None only with beta 0.
            advantages: [N].
            mask: [N, C] true on completion tokens.
            entropy: [N, C] entropies in nats, for the statistics.
            sampler_logp: [N, C] log-probs as the sampler saw them; not used by ``grpo``.
            normalizer: divides the sum over completions; N when None. Micro-batches of one optimiser step give the
                step's N, so that their losses add up to the whole step's.

        Returns:
            the scalar loss, and detached statistics: ``kl`` (mean over tokens), ``kl_sequence`` (mean over completions
            of the token mean), ``entropy``, ``clip_ratio/low_mean``, ``clip_ratio/high_mean``,
            ``clip_ratio/region_mean`` (shares of tokens).

        Raises:
            ConfigConflictError: beta > 0 without ref_logp.
        """
        mask = mask.to(logp.dtype)
        old_logp = logp.detach() if old_logp is None else old_logp
        ratio = (logp - old_logp).exp()
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        advantages_N1 = advantages.to(logp.dtype)[:, None]
        per_token = -torch.minimum(ratio * advantages_N1, clipped * advantages_N1)
        stats = self._clip_statistics(ratio.detach(), advantages_N1, mask)
        if self.beta > 0:
            if ref_logp is None:
                raise ConfigConflictError(f"beta={self.beta} needs log-probs of the reference model, found None.")
            kl = k3(logp, ref_logp)
            per_token = per_token + self.beta * kl
            stats["kl"] = token_mean(kl.detach(), mask)
            stats["kl_sequence"] = sequence_mean(kl.detach(), mask).mean()
        if entropy is not None:
            stats["entropy"] = token_mean(entropy, mask)
        return sequence_mean(per_token, mask).sum() / (len(logp) if normalizer is None else normalizer), stats

    def _clip_statistics(self, ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
        low = (ratio < 1 - self.epsilon) & (advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        return {
            "clip_ratio/low_mean": token_mean(low.to(mask), mask),
            "clip_ratio/high_mean": token_mean(high.to(mask), mask),
            "clip_ratio/region_mean": token_mean((low | high).to(mask), mask),
        }


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token; non-negative, unbiased under the policy."""
    difference = ref_logp - logp
    return difference.exp() - difference - 1


def token_mean(values_NC: Tensor, mask_NC: Tensor) -> Tensor:
    """Mean over all completion tokens; 0 where there is none. Padding may hold anything, even NaN."""
    return values_NC.masked_fill(mask_NC == 0, 0).sum() / mask_NC.sum().clamp(min=1)


def sequence_mean(values_NC: Tensor, mask_NC: Tensor) -> Tensor:
    """Mean over the tokens of each completion: [N]; 0 for an empty one."""
    return values_NC.masked_fill(mask_NC == 0, 0).sum(1) / mask_NC.sum(1).clamp(min=1)
