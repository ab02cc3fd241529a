"""What a reward can be called with: the user's own may take less than ``(answer, target, *, rules, step)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rft_lightning.errors import ConfigConflictError

# What a task offers every reward by keyword.
KEYWORDS = ("rules", "step")

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def accepted_keywords(reward: Callable[..., Any], options: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Which of `rules` and `step` the reward takes.

    Args:
        reward: called as ``reward(answer, target, **keywords)``.
        options: names of further keywords that it will be given.

    Raises:
        ConfigConflictError: it cannot be called so.
    """
    if isinstance(reward, type) or not callable(reward):
        what = f"the class {path_of(reward)}" if isinstance(reward, type) else repr(reward)
        raise ConfigConflictError(
            f"Expected a reward that can be called as (answer, target), found {what}. Give a function, or an instance "
            "of a class with __call__ (in YAML its class_path and init_args)."
        )
    signature = signature_of(reward)
    if signature is None:
        return ()
    parameters = signature.parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    keywords = tuple(name for name in KEYWORDS if anything or (name in parameters and parameters[name].kind in _NAMED))
    try:
        signature.bind(None, None, **dict.fromkeys((*keywords, *options)))
    except TypeError as error:
        raise ConfigConflictError(
            f"{path_of(reward)}{signature} cannot be called as a reward: {error}. Expected (answer, target), and "
            "beyond them rules=, step= or arguments with defaults."
        ) from error
    return keywords


def option_names(reward: Callable[..., Any]) -> list[str] | None:
    """Keywords of a reward beyond `rules` and `step`; None where it takes any."""
    signature = signature_of(reward)
    if signature is None:
        return []
    parameters = list(signature.parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    answer_and_target = [p.name for p in parameters if p.kind in _POSITIONAL][:2]
    return [p.name for p in parameters if p.kind in _NAMED and p.name not in (*answer_and_target, *KEYWORDS)]


def signature_of(reward: Callable[..., Any]) -> inspect.Signature | None:
    """None for a function in C that does not tell."""
    try:
        return inspect.signature(reward)
    except (TypeError, ValueError):
        return None


def path_of(reward: Any) -> str:
    """Where a function or the class of an instance is defined, for messages."""
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"
