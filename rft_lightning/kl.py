"""Estimates of KL(policy || reference) from the log-probs of sampled tokens.

With d = logp - ref_logp on a token that the policy sampled, after Schulman, "Approximating KL Divergence" (2020,
http://joschu.net/blog/kl-approx.html):

- ``k1 = d``: unbiased, large variance, may be negative.
- ``k2 = d^2 / 2``: non-negative, small variance, biased; the bias shrinks with the distance of the models.
- ``k3 = exp(-d) - 1 + d``: unbiased and non-negative.

That is about their VALUES. A penalty in the loss acts through its GRADIENT, which another rule governs: the gradient of
an unbiased estimate need not estimate the gradient of what is estimated (Tang and Munos, arXiv 2506.09477). On policy,
in expectation over the sampled token,

- k1 in the loss pulls nowhere: its gradient has mean zero, so it adds noise and no penalty.
- k2 in the loss has the gradient of KL(policy || reference), although its value is biased.
- k3 in the loss has the gradient of KL(reference || policy), the other direction; near the reference both agree.

Times the importance ratio pi / pi_old with its gradient (``use_bias_correction_kl``; DeepSeek-V3.2, arXiv 2512.02556)
k1 and k3 have the gradient of KL(policy || reference), off policy too; k2 loses it. In the reward nothing is
differentiated: k1, the unbiased one whose sum over tokens is the log-ratio of the sequences, is the usual choice there.
All this is per token, given its prefix: that a token also changes which prefixes follow is left out, as everywhere.

Shape legend: N completions, C completion tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rft_lightning.errors import ConfigConflictError

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) of each token, in nats; which one to take: see the module's text.

    Args:
        logp: log-probs under the policy, of any shape.
        ref_logp: under the reference model, of the same shape.
        estimator: ``k1``, ``k2`` or ``k3``.

    Returns:
        a tensor of that shape, differentiable; half precision is computed and returned in float32.

    Raises:
        ConfigConflictError: the estimator is unknown.
    """
    if estimator not in KL_ESTIMATORS:
        raise ConfigConflictError(
            f"Expected kl_estimator to be one of {', '.join(KL_ESTIMATORS)}, found {estimator!r}."
        )
    dtype = torch.promote_types(logp.dtype, torch.float32)
    difference = logp.to(dtype) - ref_logp.to(dtype)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    # expm1, since exp(-d) - 1 loses every digit where the models nearly agree.
    return torch.expm1(-difference) + difference


def sequence_kl(logp: Tensor, ref_logp: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) of each completion: the sum over its tokens.

    What a penalty in the reward subtracts, times beta (RLOO, arXiv 2402.14740, with k1).

    Args:
        logp: [N, C] log-probs under the policy that sampled.
        ref_logp: [N, C] under the reference model.
        mask: [N, C] true on completion tokens; elsewhere the log-probs may be anything, NaN included.
        estimator: ``k1``, ``k2`` or ``k3``.

    Returns:
        [N] in nats; 0 for a completion without tokens.

    Raises:
        ConfigConflictError: the estimator is unknown.
    """
    padding = ~mask.bool()
    return kl_estimate(logp.masked_fill(padding, 0), ref_logp.masked_fill(padding, 0), estimator).sum(1)
