"""Thresholds that change with the optimiser step.

Sources: V-Triune (arXiv 2505.18129) raises the IoU threshold twice in the first quarter of training, Vision-R1 (arXiv
2503.18013) once in the middle. Both state shares of the training; here the steps themselves are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rft_lightning.errors import ConfigConflictError

Threshold = float | Mapping[int | str, float]


def threshold_at(threshold: Threshold, step: int | None, *, name: str = "threshold", closed: bool = False) -> float:
    """The threshold that holds at an optimiser step.

    Args:
        threshold: a number, or {first step: number}: each holds from its step until the next one begins. One of the
            steps is 0. Steps may be strings of digits, as YAML may deliver them.
        step: the optimiser step; None (outside of training) means after the last change, so that all runs of a
            curriculum are judged by one rule.
        name: the option's name, for the error.
        closed: 1 is allowed as well; otherwise numbers lie in [0, 1), since no IoU is greater than 1.

    Raises:
        ConfigConflictError: a number out of range, a key that is no step, or no number for step 0.
    """
    if type(threshold) is float and 0 <= threshold < 1:  # nearly all are, in every call of every reward
        return threshold
    if not isinstance(threshold, Mapping):
        return _checked(threshold, name, closed)
    by_step = {_step(key, name): _checked(value, name, closed) for key, value in threshold.items()}
    if len(by_step) < len(threshold):
        raise ConfigConflictError(f"Expected each step once in {name}, found {dict(threshold)}.")
    if 0 not in by_step:
        raise ConfigConflictError(f"Expected {name} to say what holds from step 0 on, found {dict(threshold)}.")
    return by_step[max(first for first in by_step if step is None or first <= step)]


def _step(key: Any, name: str) -> int:
    whole = (isinstance(key, int) and not isinstance(key, bool) and key >= 0) or (
        isinstance(key, str) and key.strip().isdecimal()
    )
    if not whole:
        raise ConfigConflictError(f"Expected optimiser steps (0, 1, 2...) as keys of {name}, found {key!r}.")
    return int(key)


def _checked(value: Any, name: str, closed: bool) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value < 1 or (closed and value == 1)):
        bounds = "[0, 1]" if closed else "[0, 1)"
        raise ConfigConflictError(
            f"Expected {name} to be a number in {bounds}, or a mapping {{first step: number}} of them, found {value!r}."
        )
    return float(value)
