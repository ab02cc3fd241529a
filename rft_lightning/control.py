"""Coefficients that adapt between optimiser steps: of the KL penalty, and of the entropy bonus.

The objective has no state; a controller holds the coefficient and is told what each step measured:
`start` once, then `value` before and `update` after every optimiser step. Its state belongs in the checkpoint. On
several ranks each must be given the same measurement, taken over all of them.
"""

from __future__ import annotations

import math

from rft_lightning.errors import ConfigConflictError, NonFiniteError

# Ziegler et al. 2019, section 2.2: one step answers to no more than this relative error.
MAX_RELATIVE_ERROR = 0.2


class AdaptiveKL:
    """Proportional control of beta towards a KL (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    After a step over n completions: ``beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon``; the paper's gain
    is written as n / horizon, as in its code.

    Args:
        target: the KL to keep, in the unit of the logged ``kl``: nats, mean over tokens. Greater than 0.
        horizon: how slowly beta follows, in completions: while the KL is off by 20 % or more, beta changes by a factor
            of about 1.2 in `horizon` completions.

    Raises:
        ConfigConflictError: an argument is out of its range.
    """

    def __init__(self, *, target: float, horizon: int = 10_000) -> None:
        if not 0 < target < math.inf or not 0 < horizon < math.inf:
            raise ConfigConflictError(f"AdaptiveKL: expected target > 0 and horizon > 0, found {target} and {horizon}.")
        self.target, self.horizon = float(target), horizon
        self.coefficient = math.nan

    @property
    def value(self) -> float:
        """Beta to apply now."""
        assert not math.isnan(self.coefficient), "start() comes first"
        return self.coefficient

    def start(self, value: float) -> None:
        """Begin a run with this beta.

        Raises:
            ConfigConflictError: it is not positive, so that no factor could ever change it.
        """
        if not 0 < value < math.inf:
            raise ConfigConflictError(
                f"AdaptiveKL multiplies beta, so it cannot start from {value}; set the objective's beta above 0, or "
                "take the controller out."
            )
        self.coefficient = float(value)

    def update(self, measured: float, completions: int) -> None:
        """Answer to one optimiser step.

        Args:
            measured: mean KL over the tokens of the step, nats.
            completions: how many completions the step was made of, on all ranks.

        Raises:
            ConfigConflictError: the step is so long beside `horizon` that beta could turn negative.
            NonFiniteError: `measured` is NaN or infinite.
        """
        measured = _finite("KL", measured)
        if MAX_RELATIVE_ERROR * completions >= self.horizon:
            raise ConfigConflictError(
                f"AdaptiveKL: a step of {completions} completions needs a horizon above "
                f"{MAX_RELATIVE_ERROR * completions:g}, found {self.horizon}; raise it (10000 is usual)."
            )
        error = min(max(measured / self.target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.coefficient = self.value * (1 + error * completions / self.horizon)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`; after `start`, whose value it replaces."""
        self.coefficient = float(state["coefficient"])


class AdaptiveEntropy:
    """An entropy bonus that comes when the policy collapses (Skywork-OR1, arXiv 2505.22312; as in TRL 1.16).

    After each step the coefficient rises by `delta` where the entropy was at or below `target` and falls by `delta`
    where it was above, between `minimum` and `maximum`. It is applied only while the last entropy was at or below
    `target`: not before the first measurement.

    Args:
        target: entropy to keep, in nats, mean over the tokens that act (all, or those of ``top_entropy_quantile``).
            Entropies differ between models and tasks: choose it a little below the ``entropy`` logged early in a run.
        delta: change per optimiser step; greater than 0.
        minimum: lower bound of the coefficient.
        maximum: upper bound of the coefficient.

    Raises:
        ConfigConflictError: an argument is out of its range.
    """

    def __init__(
        self, *, target: float = 0.2, delta: float = 0.005, minimum: float = 0.0, maximum: float = 1.0
    ) -> None:
        if not 0 <= target < math.inf or not 0 < delta < math.inf or not 0 <= minimum <= maximum < math.inf:
            raise ConfigConflictError(
                "AdaptiveEntropy: expected target >= 0, delta > 0 and 0 <= minimum <= maximum, found "
                f"{target}, {delta}, {minimum} and {maximum}."
            )
        self.target, self.delta, self.minimum, self.maximum = target, delta, minimum, maximum
        self.coefficient, self.last_entropy = 0.0, math.inf

    @property
    def value(self) -> float:
        """Coefficient to apply now: 0 while the last entropy was above the target. `coefficient` is the one held."""
        return self.coefficient if self.last_entropy <= self.target else 0.0

    def start(self, value: float) -> None:
        """Begin a run with this coefficient.

        Raises:
            ConfigConflictError: it is negative, or above `maximum`.
        """
        if not 0 <= value <= self.maximum:
            raise ConfigConflictError(
                f"AdaptiveEntropy: expected to start from an entropy_coef between 0 and its maximum {self.maximum}, "
                f"found {value}."
            )
        self.coefficient, self.last_entropy = float(value), math.inf

    def update(self, measured: float, completions: int) -> None:
        """Answer to one optimiser step.

        Args:
            measured: mean entropy of the tokens of the step that acted, on all ranks, nats.
            completions: not used; controllers are called alike.

        Raises:
            NonFiniteError: `measured` is NaN or infinite.
        """
        self.last_entropy = _finite("entropy", measured)
        if self.last_entropy <= self.target:
            self.coefficient = min(self.coefficient + self.delta, self.maximum)
        else:
            self.coefficient = max(self.coefficient - self.delta, self.minimum)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coefficient": self.coefficient, "last_entropy": self.last_entropy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`; after `start`, whose value it replaces."""
        self.coefficient, self.last_entropy = float(state["coefficient"]), float(state["last_entropy"])


def _finite(name: str, measured: float) -> float:
    if not math.isfinite(measured):
        raise NonFiniteError(f"The {name} that a coefficient adapts to is {measured}: the policy has diverged.")
    return float(measured)
