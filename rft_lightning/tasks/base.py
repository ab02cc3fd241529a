"""Task: how to ask a question, write the right answer, read a completion and reward it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rft_lightning.answers import ParsedAnswer, parse_answer
from rft_lightning.errors import ConfigConflictError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.rewards import published
from rft_lightning.rewards.guarded import GuardedReward
from rft_lightning.rewards.options import check_rules
from rft_lightning.sample import Answer, Target

Reward = Callable[..., float | None]


class Task(ABC):
    """Question, solution, reading and rewards of one kind of answer.

    Rewards live here, so that swapping the datamodule swaps prompts and rewards together.

    Args:
        rules: ``strict`` (hardened, default), ``paper`` (the paper's equations) or ``published_code`` (what the
            authors' repository computes, quirks included).
        rewards: name -> reward ``(answer, target, *, rules, step) -> float | None``, called with those of `rules` and
            `step` that it takes; replaces the task's own set (configuration files merge theirs: docs/rewards.md). In
            YAML the import path of a function, or `class_path` and `init_args` of a class whose instances are called:
            the user's own, or :class:`rft_lightning.rewards.RewardWithOptions`.
        reward_weights: name -> weight of the rewards in the sum; 1 where not given.
        template: the question, with the placeholders of the task in braces; the paper's wording by default.
        reward_time_limit: seconds for one call of a reward that is not this package's own; None waits without end.
            See :mod:`rft_lightning.rewards.time_limit`.
        failed_reward: what a reward counts as that raises, runs out of time or returns something else than a finite
            number or None; None stops the run.

    Raises:
        ConfigConflictError: unknown rules, ``published_code`` without the package it needs, a reward that cannot be
            called, a weight for a reward that does not exist, or a number out of its range.
    """

    name: ClassVar[str]
    default_template: ClassVar[str]

    def __init__(
        self,
        *,
        rules: str = "strict",
        rewards: Mapping[str, Callable] | None = None,
        reward_weights: Mapping[str, float] | None = None,
        template: str | None = None,
        reward_time_limit: float | None = 10.0,
        failed_reward: float | None = 0.0,
    ) -> None:
        check_rules(rules)
        if rules == "published_code" and not published.math_verify_available():
            raise ConfigConflictError(
                "rules: published_code compares answers with the package math-verify, which is not installed. "
                "pip install 'rft_lightning[published-code]', or take rules: strict or paper."
            )
        if reward_time_limit is not None and not reward_time_limit > 0:
            raise ConfigConflictError(f"Expected reward_time_limit > 0 seconds or null, found {reward_time_limit}.")
        if failed_reward is not None and not math.isfinite(failed_reward):
            raise ConfigConflictError(f"Expected failed_reward to be a finite number or null, found {failed_reward}.")
        self.rules = rules
        self.rewards: dict[str, Reward] = self.default_rewards() if rewards is None else dict(rewards)
        if not self.rewards:
            raise ConfigConflictError(f"{type(self).__name__} has no rewards; leave `rewards` out for the default set.")
        self._guarded = {
            name: GuardedReward(name, reward, time_limit=reward_time_limit, failed_reward=failed_reward)
            for name, reward in self.rewards.items()
        }
        weights = reward_weights or {}
        unknown = set(weights) - set(self.rewards)
        if unknown:
            raise ConfigConflictError(
                f"reward_weights names {sorted(unknown)}, but the rewards are {sorted(self.rewards)}."
            )
        self.reward_weights = {name: float(weights.get(name, 1.0)) for name in self.rewards}
        self.template = template if template is not None else self.default_template

    @abstractmethod
    def default_rewards(self) -> dict[str, Reward]:
        """The paper's rewards of this task."""

    @abstractmethod
    def question(self, target: Target | None, frame: CoordinateFrame) -> str:
        """The text of the user turn."""

    @abstractmethod
    def solution(self, target: Any, frame: CoordinateFrame) -> str:
        """The right answer in its answer tags, as the published data writes it."""

    def thought(self, target: Any) -> str:
        """A minimal thought for supervised examples; the data sets have none."""
        return "I look at the image."

    @abstractmethod
    def read(self, text: str, frame: CoordinateFrame, image_size: tuple[int, int]) -> Answer:
        """A completion as an Answer in pixels of the original image. Never raises on model text."""

    def prepare(self, answers: Sequence[Answer], target: Target) -> None:  # noqa: B027
        """Look at all answers to a question before they are scored one by one; a task may save time by it."""

    def score(
        self,
        answer: Answer,
        target: Target,
        *,
        step: int | None = None,
        sample_id: str = "?",
        failures: Counter[str] | None = None,
    ) -> Tensor:
        """Rewards [K] in the order of `rewards`, unweighted; NaN where a reward does not apply (None).

        Args:
            answer: the completion as read.
            target: the right answer.
            step: optimiser steps so far, for rewards that change over a run.
            sample_id: for messages.
            failures: the names of rewards that failed are counted here.

        Raises:
            RewardError: a reward raised or ran out of time, and `failed_reward` is None; or too many that ran out of
                time could not be stopped.
            NonFiniteError: a reward returned something else than a finite number or None, and `failed_reward` is None.
            RFTError: raised by a reward, since a mistake in the configuration is no failure.
        """
        values = []
        for name, reward in self._guarded.items():
            value, failed = reward(answer, target, rules=self.rules, step=step, sample_id=sample_id)
            values.append(value)
            if failed and failures is not None:
                failures[name] += 1
        return torch.from_numpy(np.array(values, dtype=np.float32))


def read_text(text: str) -> tuple[Answer, ParsedAnswer]:
    """The part of reading that all tasks share.

    Returns:
        an Answer without boxes and points that is not yet called parsed, and the completion taken apart, which has
        them as they are written.
    """
    parsed = parse_answer(text)
    answer = Answer(
        text=text,
        label=parsed.label,
        thought=parsed.thought,
        well_formed=parsed.well_formed,
        no_objects=parsed.no_objects,
        answer_blocks=parsed.answer_blocks,
        parsed=False,
        problems=tuple(parsed.problems),
    )
    return answer, parsed
