"""A reward with some of its options set, as a configuration file can write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rft_lightning.errors import ConfigConflictError
from rft_lightning.rewards.signature import KEYWORDS, accepted_keywords, option_names, path_of
from rft_lightning.sample import Answer, Target


class RewardWithOptions:
    """A reward function with some of its keyword options set.

    In YAML, under `rewards` of a task::

        iou:
          class_path: rft_lightning.rewards.RewardWithOptions
          init_args:
            reward: rft_lightning.rewards.detection_iou_reward
            options: {matching: hungarian}

    Args:
        reward: called as ``reward(answer, target, *, rules, step, **options)``; `rules` and `step` where it takes them.
        options: values of its other keywords; those not given keep their defaults.

    Raises:
        ConfigConflictError: the reward has no such option, or lacks one without a default; names those it has.
    """

    def __init__(self, reward: Callable[..., float | None], *, options: Mapping[str, Any]) -> None:
        self.reward, self.options = reward, dict(options)
        known = option_names(reward) if callable(reward) else []
        unknown = [name for name in self.options if name in KEYWORDS or (known is not None and name not in known)]
        if unknown:
            theirs = "any but rules and step, which the task sets" if known is None else ", ".join(known) or "none"
            raise ConfigConflictError(
                f"{path_of(reward)} has no option {', '.join(map(repr, unknown))}; its options: {theirs}."
            )
        self.keywords = accepted_keywords(reward, tuple(self.options))

    def __call__(
        self, answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
    ) -> float | None:
        """The reward, with the options."""
        offered = {"rules": rules, "step": step}
        return self.reward(answer, target, **{name: offered[name] for name in self.keywords}, **self.options)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({path_of(self.reward)}, {options})"
