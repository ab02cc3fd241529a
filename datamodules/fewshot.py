"""The k-shot draw by images: which rows of a data set a few-shot training split holds.

There is no random generator in it. Keys are sorted by a hash of (seed, class, key), so a draw is the same on any
machine, with any Python version and any number of processes, and whether other keys or classes exist changes nothing in
the order of the rest. k shots are the first k keys of a class: they contain the k - 1 shots.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import TypeVar

from rft_lightning.errors import ConfigConflictError, EmptyClassError

Key = TypeVar("Key", bound=Hashable)


def hash_order(keys: Iterable[Key], *, seed: int, salt: str = "") -> list[Key]:
    """The distinct `keys` in an order that looks random and follows from `seed` and `salt` alone.

    The first n of them are a draw of n keys, and a greater draw contains it.

    Args:
        keys: integers, strings or tuples of both; of one kind, so that they can be sorted.
        seed: seed of the order.
        salt: what the order is for; orders with different salts are unrelated.
    """
    # Sorted first, so that even equal hashes could not bring the order of a set (which varies with the process) back.
    return sorted(sorted(set(keys)), key=lambda key: _digest(seed, salt, key))  # type: ignore[type-var]


def draw_shots(
    rows: Iterable[tuple[Key, str]],
    shots: int | None,
    *,
    seed: int,
    classes: Sequence[str] | None = None,
    split: str = "train",
    looked_at: int | None = None,
    remark: str = "",
) -> list[tuple[Key, str]]:
    """Draw `shots` images of each class; a class that has fewer keeps them all and is named in a warning.

    Args:
        rows: (key, class) pairs, one per image and class that shows it, in any order; pairs that occur again count
            once. A key names the image: an integer or a string, the same on every machine (no absolute path).
        shots: images per class; None takes all.
        seed: seed of the draw.
        classes: the classes to draw; each needs an example. None takes those that occur.
        split: name of the split, for messages.
        looked_at: how many annotations the rows were made from, for messages; the number of rows when None.
        remark: a sentence on what is no example, for messages.

    Returns:
        The drawn pairs, in ascending order.

    Raises:
        ConfigConflictError: `shots` is below 1.
        EmptyClassError: a class of `classes` has no row.
    """
    if shots is not None and shots < 1:
        raise ConfigConflictError(f"Expected shots >= 1 or null (all), found {shots}.")
    keys: dict[str, set[Key]] = {name: set() for name in classes or ()}
    count = 0
    for count, (key, name) in enumerate(rows, start=1):  # noqa: B007  (the number of rows, read below)
        if classes is None or name in keys:
            keys.setdefault(name, set()).add(key)
    _check_empty(keys, split, count if looked_at is None else looked_at, remark)
    _warn_about_few(keys, shots, split)
    drawn = [(key, name) for name in keys for key in hash_order(keys[name], seed=seed, salt=f"shots/{name}")[:shots]]
    return sorted(drawn)


def _digest(seed: int, salt: str, key: Hashable) -> bytes:
    # JSON keeps neighbouring parts apart and writes integers and strings the same everywhere.
    return blake2b(json.dumps([salt, seed, key]).encode("ascii"), digest_size=16).digest()


def _check_empty(keys: dict[str, set[Key]], split: str, looked_at: int, remark: str) -> None:
    empty = [name for name, found in keys.items() if not found]
    if empty or not keys:
        raise EmptyClassError(
            f"No example of {', '.join(map(repr, empty)) or 'any class'} in {split}: {looked_at} annotations were "
            f"looked at.{' ' * bool(remark)}{remark} Take what has no example out of data.classes, or train on another "
            "split."
        )


def _warn_about_few(keys: dict[str, set[Key]], shots: int | None, split: str) -> None:
    few = [f"{name} ({len(found)})" for name, found in keys.items() if len(found) < (shots or 0)]
    if few:
        warnings.warn(
            f"Fewer than {shots} images of {len(few)} of {len(keys)} classes in {split}; all of them are used: "
            f"{', '.join(few)}.",
            stacklevel=3,
        )


__all__ = ["draw_shots", "hash_order"]
