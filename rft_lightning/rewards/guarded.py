"""A reward that cannot hang a run, and whose failures count as one chosen value."""

from __future__ import annotations

import logging
import math
import reprlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any

import torch

from rft_lightning.errors import NonFiniteError, RewardError, RFTError
from rft_lightning.rewards.signature import accepted_keywords, path_of
from rft_lightning.rewards.time_limit import OutOfTimeError, call_within, stuck_calls
from rft_lightning.rewards.with_options import RewardWithOptions
from rft_lightning.sample import Answer, Target

MAX_STUCK_CALLS = 8
# So often in a row a reward may run out of time: a call is bounded, and so is what a batch of them costs.
MAX_LATE_CALLS = 8
MAX_WARNINGS = 3

_log = logging.getLogger(__name__)
_serial = count()
# Per process, since tasks are copied into every sample: how often a reward has failed.
_failures: Counter[int] = Counter()
_late: Counter[int] = Counter()
# Rewards are float32 tensors.
_LARGEST = torch.finfo(torch.float32).max


class GuardedReward:
    """One reward of a task, called so that it neither hangs a run nor poisons its group.

    Args:
        name: the reward's name in its task.
        reward: called with an answer, a target and those of `rules` and `step` that it takes.
        time_limit: seconds for one call of a reward that is not this package's own (those are bounded); None waits.
        failed_reward: what a failure counts as; None stops the run.

    Raises:
        ConfigConflictError: the reward cannot be called so.
    """

    def __init__(
        self, name: str, reward: Callable[..., Any], *, time_limit: float | None, failed_reward: float | None
    ) -> None:
        self.name, self.reward, self.failed_reward = name, reward, failed_reward
        self.keywords = accepted_keywords(reward)
        self.time_limit = None if _is_own(reward) else time_limit
        self.serial = next(_serial)

    def __call__(
        self, answer: Answer, target: Target | None, *, rules: str, step: int | None, sample_id: str
    ) -> tuple[float, bool]:
        """The reward as a number, NaN where it does not apply (None), and whether it failed.

        Raises:
            RFTError: raised by the reward, since a mistake in the configuration is no failure.
            NonFiniteError: it returned something else than a finite number or None; only if `failed_reward` is None.
            RewardError: it raised or ran out of time; only if `failed_reward` is None, or if it ran out of time too
                often in a row, or if too many calls that did could not be stopped.
        """
        offered = {"rules": rules, "step": step}
        keywords = {name: offered[name] for name in self.keywords}
        try:
            if self.time_limit is None:
                value = self.reward(answer, target, **keywords)
            else:
                value = call_within(self.time_limit, partial(self.reward, answer, target, **keywords))
        except RFTError:
            raise
        except OutOfTimeError as error:
            if stuck_calls() >= MAX_STUCK_CALLS:
                raise RewardError(
                    f"Reward {self.name!r} ({path_of(self.reward)}) ran out of time again, and {stuck_calls()} such "
                    "calls could not be stopped and go on in the background. Give what the reward waits for a time "
                    "limit of its own, shorter than the task's reward_time_limit."
                ) from error
            _late[self.serial] += 1
            if _late[self.serial] >= MAX_LATE_CALLS:
                raise RewardError(
                    f"Reward {self.name!r} ({path_of(self.reward)}) ran out of time {_late[self.serial]} times in a "
                    f"row, last for sample {sample_id!r}; {self.time_limit:g} seconds are too few for it, or it hangs. "
                    "Mend it, or set the task's reward_time_limit."
                ) from error
            return self._fail(
                f"did not return within {self.time_limit:g} seconds", RewardError, error, answer, sample_id
            )
        except (Exception, SystemExit) as error:
            return self._fail(f"raised {type(error).__name__}: {error}", RewardError, error, answer, sample_id)
        _late.pop(self.serial, None)
        number = as_number(value)
        if number is None:
            what = f"returned {reprlib.repr(value)}, expected a finite number or None"
            return self._fail(what, NonFiniteError, None, answer, sample_id)
        return number, False

    def _fail(
        self, what: str, error: type[RFTError], cause: Exception | SystemExit | None, answer: Answer, sample_id: str
    ) -> tuple[float, bool]:
        message = (
            f"Reward {self.name!r} ({path_of(self.reward)}) {what}, for sample {sample_id!r} on the completion "
            f"{answer.text[:200]!r}."
        )
        if self.failed_reward is None:
            raise error(
                f"{message} Mend the reward, or set the task's failed_reward to the number that a failure counts as."
            ) from cause
        first = not _failures[self.serial]
        _failures[self.serial] += 1
        if _failures[self.serial] <= MAX_WARNINGS:
            silence = " Further failures are counted without a word." if _failures[self.serial] == MAX_WARNINGS else ""
            text = "%s It counts as failed_reward=%g.%s"
            _log.warning(text, message, self.failed_reward, silence, exc_info=cause if first else None)
        return self.failed_reward, True


def as_number(value: Any) -> float | None:
    """A reward as a float: NaN for None (not applicable); None for what is no finite number of float32."""
    if type(value) is float and abs(value) <= _LARGEST:
        return value
    if value is None:
        return math.nan
    if isinstance(value, (str, bytes)) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= _LARGEST else None


def _is_own(reward: Callable[..., Any]) -> bool:
    """Whether a reward is this package's, with options or without."""
    if isinstance(reward, partial):
        return _is_own(reward.func)
    if type(reward) is RewardWithOptions:
        return _is_own(reward.reward)
    # Not the function's __module__, which a decorator of the user's copies from what it decorates.
    module = reward.__globals__["__name__"] if isinstance(reward, FunctionType) else type(reward).__module__
    return module.startswith("rft_lightning.")
