"""The GRPO family of objectives: token log-probs and advantages -> loss and its statistics. Pure; no state.

Shape legend: N completions, C completion tokens; X is C, or 1 for one value per completion.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rft_lightning.errors import ConfigConflictError
from rft_lightning.kl import kl_estimate
from rft_lightning.objective_options import LOSS_TYPES, check_options
from rft_lightning.objective_statistics import (
    CLIP_MEANS,
    Tokens,
    clip_statistics,
    combine_statistics,
    mean,
    sampler_statistics,
    sequence_mean,
    token_statistics,
)

# exp beyond these bounds of a log-ratio would overflow, or vanish, in vespo's product of ratios; TRL's bounds.
LOG_RATIO_MIN, LOG_RATIO_MAX = math.log(1e-8), 20.0
# Most numbers that torch.quantile takes.
QUANTILE_LIMIT = 2**24


class GRPOObjective(nn.Module):
    """Clipped policy gradient with a KL penalty towards the reference model (paper Eq. 4), and its successors.

    With the ratio rho = exp(logp - old_logp), the advantage A of the completion and sg() without gradient:

    ============  ==================================================  ============================================
    `loss_type`   policy term of a token                              summed and divided by
    ============  ==================================================  ============================================
    ``grpo``      -min(rho A, clip(rho, 1 - eps, 1 + eps_high) A)     token mean of each completion / completions
    ``bnpo``      as grpo                                             tokens (arXiv 2506.02864)
    ``dr_grpo``   as grpo                                             completions x length limit (2503.20783)
    ``dapo``      as grpo                                             tokens (2503.14476)
    ``luspo``     as grpo, with the ratio of the sequence             token sum of each completion / completions
                                                                      (2602.05261)
    ``cispo``     -sg(min(rho, eps_high)) A logp                      tokens (2506.13585)
    ``sapo``      -4 / tau sigmoid(tau (rho - 1)) A                   as grpo (2511.20347)
    ``vespo``     -sg(phi(W)) A logp, W the product of the ratios,    tokens (2602.10693)
                  phi(W) = exp(lambda) W^k exp(-lambda W)
    ============  ==================================================  ============================================

    The semantics are those of TRL 1.16, option by option. ``bnpo`` and ``dapo`` differ there in whose tokens are
    counted, the micro-batch's or everybody's; here that is the caller's choice, by `normalizer`, and GRPOModule counts
    everybody's for both.

    Args:
        loss_type: see above.
        beta: weight of the KL penalty; 0 needs no reference model. The paper's runs used 0.04.
        epsilon: lower clip range; not read by cispo, sapo and vespo.
        epsilon_high: upper clip range, `epsilon` when None; DAPO advises 0.28. For cispo the cap of the ratio itself.
        delta: cap of the ratio where the advantage is negative and the minimum has no bound (INTELLECT-2, arXiv
            2505.07291); greater than 1, meant to be greater than 1 + epsilon_high. None for no cap. Not read by cispo,
            sapo and vespo.
        importance_sampling_level: ``token``: a ratio per token. ``sequence``: exp of the mean log-ratio of the
            completion's tokens (GSPO, arXiv 2507.18071; meant for grpo and luspo: where tokens are summed, long
            completions weigh more). vespo always takes the product.
        max_completion_length: the length limit of dr_grpo. None means the width C of the tensors; GRPOModule sets it to
            its own limit.
        kl_estimator: ``k1``, ``k2`` or ``k3``; see :mod:`rft_lightning.kl` for what each does in a loss.
        kl_placement: ``loss``: beta times the estimate is added to the loss of each token. ``reward``: the loss has no
            KL term, since the caller subtracts it from the reward.
        use_bias_correction_kl: multiply the estimate by the ratio, with its gradient and before `delta`.
        entropy_coef: weight of the entropy bonus, the mean entropy of the tokens that act; 0 for none.
        top_entropy_quantile: let only this share of the tokens, those of highest entropy, act in the policy term
            (arXiv 2506.01939 advises 0.2); the KL penalty keeps all. 1 for all.
        off_policy_mask_threshold: drop the policy term of completions with a negative advantage whose log-prob has
            fallen by more than this, in nats, mean over tokens, since they were sampled (DeepSeek-V3.2). None for none.
        sampler_correction: weigh the policy term by policy / sampler, exp(old_logp - sampler_logp) of a token or of
            the whole completion: ``token_truncate`` and ``sequence_truncate`` hold the weight within the bounds below,
            ``token_mask`` and ``sequence_mask`` set it to 0 outside of them. None for no correction. vespo takes it
            into W, so only per token.
        sampler_correction_max: upper bound; None for none.
        sampler_correction_min: lower bound; None for none.
        sapo_temperature_pos: tau where the advantage is positive.
        sapo_temperature_neg: tau elsewhere.
        vespo_k_pos: k where the advantage is not negative.
        vespo_lambda_pos: lambda there.
        vespo_k_neg: k where it is negative.
        vespo_lambda_neg: lambda there.

    Raises:
        ConfigConflictError: an option is unknown or out of its range, or two of them contradict each other.
    """

    def __init__(
        self,
        *,
        loss_type: str = "grpo",
        beta: float = 0.04,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        importance_sampling_level: str = "token",
        max_completion_length: int | None = None,
        kl_estimator: str = "k3",
        kl_placement: str = "loss",
        use_bias_correction_kl: bool = False,
        entropy_coef: float = 0.0,
        top_entropy_quantile: float = 1.0,
        off_policy_mask_threshold: float | None = None,
        sampler_correction: str | None = None,
        sampler_correction_max: float | None = 3.0,
        sampler_correction_min: float | None = None,
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.loss_type, self.beta, self.epsilon = loss_type, beta, epsilon
        self.epsilon_high = epsilon if epsilon_high is None else epsilon_high
        self.delta, self.importance_sampling_level = delta, importance_sampling_level
        self.max_completion_length = max_completion_length
        self.kl_estimator, self.kl_placement = kl_estimator, kl_placement
        self.use_bias_correction_kl = use_bias_correction_kl
        self.entropy_coef, self.top_entropy_quantile = entropy_coef, top_entropy_quantile
        self.off_policy_mask_threshold = off_policy_mask_threshold
        self.sampler_correction = sampler_correction
        self.sampler_correction_max, self.sampler_correction_min = sampler_correction_max, sampler_correction_min
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        check_options(self)
        if loss_type == "cispo" and epsilon_high is None:
            warnings.warn(
                f"cispo caps the ratio itself at epsilon_high, which is null and so epsilon={epsilon}: no token gets "
                "more than that weight. Set epsilon_high; 5.0 is what ScaleRL (arXiv 2510.13786) advises.",
                stacklevel=2,
            )

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of a reference model are needed."""
        return self.beta > 0

    @property
    def entropy_needs_gradient(self) -> bool:
        """Whether the entropy handed to `forward` must carry a gradient, as the entropy bonus acts through it."""
        return self.entropy_coef > 0

    @property
    def _corrects_sequences(self) -> bool:
        return self.sampler_correction is not None and self.sampler_correction.startswith("sequence")

    def divisor(
        self, completions: Tensor | float, tokens: Tensor | float, *, width: int | None = None
    ) -> Tensor | float:
        """What the summed loss of so many completions with so many tokens is divided by; 1 where there are none.

        Given as `normalizer` to every micro-batch of an optimiser step (counts over all ranks, divided by the number
        of ranks where gradients are averaged over them), their losses add up to the whole step's.

        Args:
            completions: how many completions.
            tokens: how many tokens they have.
            width: for dr_grpo the length limit, where `max_completion_length` is None.

        Raises:
            ConfigConflictError: dr_grpo without a length limit.
        """
        count = tokens if LOSS_TYPES[self.loss_type] == "tokens" else completions
        if self.loss_type == "dr_grpo":
            limit = self.max_completion_length or width
            if limit is None:
                raise ConfigConflictError("dr_grpo divides by max_completion_length, found null; set it.")
            count = count * limit
        return _or_one(count)

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
        token_count: Tensor | float | None = None,
        entropy_threshold: Tensor | float | None = None,
        beta: float | None = None,
        entropy_coef: float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of N completions.

        Where the mask is false the tensors may hold anything, NaN included. Half precision is computed in float32.

        Args:
            logp: [N, C] log-probs under the policy, with gradient.
            old_logp: [N, C] under the policy that sampled; None means the policy itself (first step after a rollout).
            ref_logp: [N, C] under the reference model; None only without a KL term.
            advantages: [N], or [N, C] for advantages of tokens.
            mask: [N, C] true on completion tokens; completions without any are allowed.
            entropy: [N, C] entropies in nats; with gradient for the entropy bonus.
            sampler_logp: [N, C] log-probs as the sampler saw them, NaN where it has none; for `sampler_correction`, and
                preferred to old_logp by `off_policy_mask_threshold`.
            normalizer: divides the summed loss; see :meth:`divisor`. The counts of these completions when None.
            token_count: divides the summed entropy of the entropy bonus: tokens that act. Counted here when None.
            entropy_threshold: entropy from which a token acts under `top_entropy_quantile`, from
                :func:`entropy_threshold` over more completions than these. Computed from these when None.
            beta: replaces the objective's.
            entropy_coef: replaces the objective's.

        Returns:
            the scalar loss, and the detached statistics of these completions, whatever the normalizer; see
            :mod:`rft_lightning.objective_statistics`.

        Raises:
            ConfigConflictError: a tensor is missing that an option needs, or has another shape than logp.
        """
        beta = self.beta if beta is None else beta
        coefficient = self.entropy_coef if entropy_coef is None else entropy_coef
        self._check_given(beta, coefficient, ref_logp, entropy, sampler_logp)
        tokens = Tokens.clean(logp, old_logp, ref_logp, advantages, mask, entropy, sampler_logp)
        ratio_NX = self._ratio(tokens)
        correction_NX = self._sampler_ratio(tokens)
        loss_NX, stats = self._policy_term(tokens, ratio_NX, correction_NX)
        acting_NC = self._acting(tokens, entropy_threshold)
        if self.off_policy_mask_threshold is not None:
            loss_NX = loss_NX * self._near_policy(tokens, self.off_policy_mask_threshold)
        if self.top_entropy_quantile < 1:
            loss_NX = loss_NX * acting_NC
        if correction_NX is not None and self.loss_type != "vespo":
            loss_NX = loss_NX * correction_NX
        kl_NC = self._kl(tokens, ratio_NX)
        if kl_NC is not None and beta > 0 and self.kl_placement == "loss":
            loss_NX = loss_NX + beta * kl_NC

        summed = self._sum(loss_NX, tokens.mask)
        local = self.divisor(len(tokens.mask), tokens.mask.sum(), width=tokens.mask.shape[1])
        loss = summed / (local if normalizer is None else normalizer)
        if coefficient > 0 and tokens.entropy is not None:
            count = acting_NC.sum() if token_count is None else token_count
            loss = loss - coefficient * (tokens.entropy * acting_NC).sum() / _or_one(count)
        if self.entropy_coef > 0 or entropy_coef is not None:
            stats["policy_loss"] = summed.detach() / local
        stats |= token_statistics(tokens, kl_NC, acting_NC if self.top_entropy_quantile < 1 else None)
        if correction_NX is not None:
            stats |= sampler_statistics(tokens, correction_NX, per_completion=self._corrects_sequences)
        return loss, stats

    def combine_statistics(self, parts: Sequence[tuple[Mapping[str, Tensor], float, float]]) -> dict[str, Tensor]:
        """The statistics of a whole from those of its parts: the micro-batches of a step, or its ranks.

        Means over tokens are weighted by tokens, means over completions by completions; extremes stay extremes. Equal
        to the statistics of one call with everything, but for log-prob differences where the sampler has gaps.

        Args:
            parts: (statistics of :meth:`forward`, completions, tokens) of each.
        """
        return combine_statistics(parts, self._completion_means)

    @property
    def _completion_means(self) -> set[str]:
        """The statistics that are means over completions."""
        names = {"kl_sequence", "vespo/phi_seq_mean"}
        if self.importance_sampling_level == "sequence":
            names |= {*CLIP_MEANS, "cispo_clip_ratio"}
        if self._corrects_sequences:
            names.add("sampling/importance_sampling_ratio/mean")
        if LOSS_TYPES[self.loss_type] == "completions":
            names.add("policy_loss")
        return names

    def _check_given(
        self, beta: float, coefficient: float, ref_logp: Tensor | None, entropy: Tensor | None, sampler: Tensor | None
    ) -> None:
        """Raise where a tensor is missing that an option needs."""
        for option, needs, tensor, what in (
            ("beta", beta > 0 and self.kl_placement == "loss", ref_logp, "log-probs of the reference model"),
            ("entropy_coef", coefficient > 0, entropy, "entropies, with their gradient"),
            ("top_entropy_quantile", self.top_entropy_quantile < 1, entropy, "entropies"),
            ("sampler_correction", self.sampler_correction is not None, sampler, "the sampler's log-probs"),
        ):
            if needs and tensor is None:
                raise ConfigConflictError(f"{option} needs {what}, found None; hand them in or switch it off.")

    def _ratio(self, tokens: Tokens) -> Tensor:
        """Policy / old policy of each token, [N, C], or their geometric mean over the completion, [N, 1]."""
        log_ratio_NC = tokens.logp - tokens.old_logp
        if self.importance_sampling_level == "token":
            return log_ratio_NC.exp()
        return sequence_mean(log_ratio_NC, tokens.mask)[:, None].exp()

    def _policy_term(
        self, tokens: Tokens, ratio_NX: Tensor, correction_NX: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token, [N, C] or [N, 1] where all of a completion are alike, and what it says of clipping."""
        advantages_NX, mask_NC = tokens.advantages, tokens.mask
        per_completion = self.importance_sampling_level == "sequence"
        if self.loss_type == "cispo":
            weight_NX = ratio_NX.detach().clamp(max=self.epsilon_high)
            capped_NX = (ratio_NX > self.epsilon_high) & (advantages_NX > 0)
            share = mean(capped_NX.to(ratio_NX), mask_NC, per_completion=per_completion)
            return -weight_NX * advantages_NX * tokens.logp, {"cispo_clip_ratio": share}
        if self.loss_type == "sapo":
            temperature_NX = _where(advantages_NX > 0, self.sapo_temperature_pos, self.sapo_temperature_neg, ratio_NX)
            gate_NX = (temperature_NX * (ratio_NX - 1)).sigmoid() * 4 / temperature_NX
            return -gate_NX * advantages_NX, {}
        if self.loss_type == "vespo":
            phi_NX = self._gamma_weight(tokens, correction_NX)
            return -phi_NX * advantages_NX * tokens.logp, {
                "vespo/phi_seq_mean": mean(phi_NX, mask_NC, per_completion=True)
            }
        clipped_NX = ratio_NX.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        if self.delta is not None:
            ratio_NX = ratio_NX.clamp(max=self.delta)
        low_NX = (ratio_NX < 1 - self.epsilon) & (advantages_NX < 0)
        high_NX = (ratio_NX > 1 + self.epsilon_high) & (advantages_NX > 0)
        return -torch.minimum(ratio_NX * advantages_NX, clipped_NX * advantages_NX), clip_statistics(
            low_NX, high_NX, tokens, per_completion=per_completion
        )

    @torch.no_grad()
    def _gamma_weight(self, tokens: Tokens, correction_NX: Tensor | None) -> Tensor:
        """Vespo's phi(W), computed from log W: [N, X]."""
        log_ratio_NC = (tokens.logp - tokens.old_logp).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
        if correction_NX is not None:
            log_ratio_NC = log_ratio_NC + correction_NX.log().clamp(LOG_RATIO_MIN, LOG_RATIO_MAX)
        log_w_N1 = torch.where(tokens.mask, log_ratio_NC, 0).sum(1, keepdim=True).clamp(LOG_RATIO_MIN, LOG_RATIO_MAX)
        kept_NX = tokens.advantages >= 0
        k_NX = _where(kept_NX, self.vespo_k_pos, self.vespo_k_neg, log_w_N1)
        lambda_NX = _where(kept_NX, self.vespo_lambda_pos, self.vespo_lambda_neg, log_w_N1)
        return (lambda_NX + k_NX * log_w_N1 - lambda_NX * log_w_N1.exp()).exp()

    @torch.no_grad()
    def _sampler_ratio(self, tokens: Tokens) -> Tensor | None:
        """Old policy / sampler of each token, [N, C], or completion, [N, 1], bounded; None without a correction."""
        if self.sampler_correction is None or tokens.sampler_logp is None:
            return None
        # Where the sampler has no log-prob nothing is corrected.
        log_ratio_NC = (tokens.old_logp - tokens.sampler_logp).nan_to_num(nan=0.0)
        ratio_NX = (log_ratio_NC.sum(1, keepdim=True) if self._corrects_sequences else log_ratio_NC).exp()
        low, high = self.sampler_correction_min, self.sampler_correction_max
        if self.sampler_correction.endswith("truncate"):
            return ratio_NX.clamp(low, high)
        outside_NX = (ratio_NX < (low or 0)) | (ratio_NX > (math.inf if high is None else high))
        return ratio_NX.masked_fill(outside_NX, 0)

    def _near_policy(self, tokens: Tokens, threshold: float) -> Tensor:
        """Whether the policy term of a completion is kept: [N, X] bool (DeepSeek-V3.2, arXiv 2512.02556, Eq. 9)."""
        sampled_NC = tokens.old_logp if tokens.sampler_logp is None else tokens.sampler_logp
        fallen_NC = (sampled_NC - tokens.logp.detach()).nan_to_num(nan=0.0)
        fallen_N1 = sequence_mean(fallen_NC, tokens.mask)[:, None]
        return (tokens.advantages >= 0) | (fallen_N1 <= threshold)

    def _acting(self, tokens: Tokens, threshold: Tensor | float | None) -> Tensor:
        """Tokens that act in the policy term and the entropy bonus: [N, C] bool."""
        if self.top_entropy_quantile == 1 or tokens.entropy is None:
            return tokens.mask
        if threshold is None:
            threshold = entropy_threshold(tokens.entropy, tokens.mask, self.top_entropy_quantile)
        return tokens.mask & (tokens.entropy >= threshold)

    def _kl(self, tokens: Tokens, ratio_NX: Tensor) -> Tensor | None:
        if tokens.ref_logp is None:
            return None
        kl_NC = kl_estimate(tokens.logp, tokens.ref_logp, self.kl_estimator)
        return kl_NC * ratio_NX if self.use_bias_correction_kl else kl_NC

    def _sum(self, loss_NX: Tensor, mask_NC: Tensor) -> Tensor:
        if self.loss_type in ("grpo", "sapo"):
            return sequence_mean(loss_NX, mask_NC).sum()
        return torch.where(mask_NC, loss_NX, 0).sum()


def entropy_threshold(entropy: Tensor, mask: Tensor, top_entropy_quantile: float) -> Tensor:
    """The entropy from which a token is among the `top_entropy_quantile` of highest entropy.

    Args:
        entropy: entropies in nats, of any shape and number.
        mask: true on the tokens to count, of that shape.
        top_entropy_quantile: the share to keep.

    Returns:
        a scalar, interpolated between entropies as torch.quantile does; infinite without any token.
    """
    values = entropy.detach()[mask.bool()]
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if not len(values):
        return values.new_tensor(math.inf)
    if len(values) <= QUANTILE_LIMIT:
        return torch.quantile(values, 1 - top_entropy_quantile)
    ordered = values.sort().values
    rank = (1 - top_entropy_quantile) * (len(ordered) - 1)
    below = int(rank)
    return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], rank - below)


def _where(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """`yes` or `no` in the dtype of `like`."""
    return torch.where(condition, torch.full_like(condition, yes, dtype=like.dtype), no)


def _or_one(count: Tensor | float) -> Tensor | float:
    """The count, which may be a share of one, or 1 where nothing was counted."""
    return count + (count == 0)
