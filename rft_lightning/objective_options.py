"""The options of GRPOObjective: what each may be, and which contradict each other."""

from __future__ import annotations

import math
from typing import Any

from rft_lightning.errors import ConfigConflictError
from rft_lightning.kl import KL_ESTIMATORS

# Each loss type with what its summed loss is divided by: the number of completions or of tokens.
LOSS_TYPES = {
    "grpo": "completions",
    "bnpo": "tokens",
    "dr_grpo": "completions",
    "dapo": "tokens",
    "cispo": "tokens",
    "sapo": "completions",
    "luspo": "completions",
    "vespo": "tokens",
}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "loss_type": tuple(LOSS_TYPES),
    "importance_sampling_level": ("token", "sequence"),
    "kl_estimator": KL_ESTIMATORS,
    "kl_placement": ("loss", "reward"),
    "sampler_correction": (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
RANGES = {
    "beta": (">= 0", lambda x: 0 <= x < math.inf),
    "epsilon": (">= 0 and < 1", lambda x: 0 <= x < 1),
    "epsilon_high": (">= 0", lambda x: 0 <= x < math.inf),
    "delta": ("> 1", lambda x: x > 1),
    "max_completion_length": (">= 1", lambda x: x >= 1),
    "entropy_coef": (">= 0", lambda x: 0 <= x < math.inf),
    "top_entropy_quantile": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "off_policy_mask_threshold": (">= 0", lambda x: x >= 0),
    "sampler_correction_max": ("> 0", lambda x: x > 0),
    "sampler_correction_min": (">= 0", lambda x: x >= 0),
    "sapo_temperature_pos": ("> 0", lambda x: 0 < x < math.inf),
    "sapo_temperature_neg": ("> 0", lambda x: 0 < x < math.inf),
    "vespo_k_pos": (">= 0", lambda x: 0 <= x < math.inf),
    "vespo_lambda_pos": (">= 1e-4", lambda x: 1e-4 <= x < math.inf),  # TRL's bound
    "vespo_k_neg": (">= 0", lambda x: 0 <= x < math.inf),
    "vespo_lambda_neg": (">= 1e-4", lambda x: 1e-4 <= x < math.inf),
}
# What may be None, for no bound.
OPTIONAL = (
    "delta",
    "max_completion_length",
    "off_policy_mask_threshold",
    "sampler_correction_max",
    "sampler_correction_min",
)


def check_options(objective: Any) -> None:
    """Refuse options that are out of their range, or contradict one another.

    Args:
        objective: a GRPOObjective.

    Raises:
        ConfigConflictError: names the option, what it may be and what was found.
    """
    for name, choices in CHOICES.items():
        if getattr(objective, name) not in choices:
            known = ", ".join("null" if choice is None else choice for choice in choices)
            raise ConfigConflictError(f"Expected {name} to be one of {known}, found {getattr(objective, name)!r}.")
    for name, (expected, valid) in RANGES.items():
        value = getattr(objective, name)
        if value is None and name in OPTIONAL:
            continue
        if not isinstance(value, int | float) or not valid(value):
            raise ConfigConflictError(f"Expected {name} {expected}, found {value!r}.")
    if objective.kl_placement == "reward" and objective.use_bias_correction_kl:
        raise ConfigConflictError(
            "use_bias_correction_kl corrects the gradient of a KL term in the loss, and kl_placement is reward; "
            "set one of them back."
        )
    if objective.sampler_correction is None:
        return
    low, high = objective.sampler_correction_min, objective.sampler_correction_max
    if low is not None and high is not None and low >= high:
        raise ConfigConflictError(
            f"Expected sampler_correction_min below sampler_correction_max, found {low} and {high}."
        )
    if low is None and high is None and objective.sampler_correction.endswith("truncate"):
        raise ConfigConflictError(
            f"sampler_correction {objective.sampler_correction} needs sampler_correction_max or "
            "sampler_correction_min, found neither."
        )
    if objective.loss_type == "vespo" and objective.sampler_correction.startswith("sequence"):
        raise ConfigConflictError(
            f"vespo multiplies the corrections of tokens, found sampler_correction {objective.sampler_correction}; "
            "take token_truncate or token_mask."
        )
