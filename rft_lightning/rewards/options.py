"""Checks of the options of rewards; each names the option, what was found and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rft_lightning.errors import ConfigConflictError

RULES = ("strict", "paper", "published_code")


def check_rules(rules: str) -> None:
    """Raises ConfigConflictError where there is no rule set of this name."""
    check_choice("rules", rules, RULES)


def check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raises ConfigConflictError where the value is none of those known."""
    if value not in known:
        words = ", ".join("null" if choice is None else str(choice) for choice in known)
        raise ConfigConflictError(f"Expected {name} to be one of {words}, found {value!r}.")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises ConfigConflictError where the value is no finite number in [low, high]."""
    if not _is_number(value) or not low <= value <= high:
        raise ConfigConflictError(f"Expected {name} to be a finite number in [{low}, {high}], found {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Raises ConfigConflictError where the value is no whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigConflictError(f"Expected {name} to be a whole number of at least 1, found {value!r}.")


def check_ascending(**values: Any) -> None:
    """Raises ConfigConflictError where the values are no finite numbers, or one is less than the one before it."""
    numbers = list(values.values())
    if not all(map(_is_number, numbers)) or sorted(numbers) != numbers:
        found = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ConfigConflictError(f"Expected finite numbers that ascend in this order, found {found}.")


def refuse_changed(**options: tuple[Any, Any]) -> None:
    """Raises ConfigConflictError where an option, given as (value, default), is not at its default."""
    changed = [name for name, (value, default) in options.items() if value != default]
    if changed:
        raise ConfigConflictError(
            f"rules: published_code takes no options, found {', '.join(changed)}; leave out, or take other rules."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
