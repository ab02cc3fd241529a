"""What processes tell each other beside gradients. On one process each of these returns what it was given."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """The values of all processes, by rank. All processes must call it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def everywhere(condition: bool) -> bool:
    """Whether a condition holds on every process. All processes must call it."""
    return all(gather_objects(condition))


def anywhere(condition: bool) -> bool:
    """Whether a condition holds on some process. All processes must call it."""
    return any(gather_objects(condition))


def rank() -> int:
    """The number of this process."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
