"""The k-shot draw: which pictures of a class a few-shot split holds.

There is no random generator in it. Keys are sorted by a hash of (seed, class, key), so a draw is the same on any
machine, with any Python version and any number of processes, and whether other keys or classes exist changes nothing in
the order of the rest. k shots are the first k keys of a class: they contain the k - 1 shots.

Objects may be counted instead of pictures, by the rule of few-shot detection (TFA, Wang et al. 2020): pictures are gone
through in the order of the draw, and one is taken only if all its objects of the class fit into what is left of k,
until there are exactly k. Nested draws repeat that for 1, 2, ... k objects, each keeping what the one before took. They
therefore take pictures with a single object as long as there are any, and may end short of k after them; a draw that
is not nested is the plain rule.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Literal, TypeVar

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


def in_turn(kinds: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Names in an order of which every beginning is spread: over the labels, and over the two kinds of each label.

    Args:
        kinds: name -> (label, whether it is of the second kind, which comes after the first in each turn).
    """
    turns: Counter[tuple[str, bool]] = Counter()
    place: dict[str, tuple[int, int]] = {}
    for number, name in enumerate(hash_order(kinds, seed=0, salt="val_limit")):
        kind = kinds[name]
        place[name] = 2 * turns[kind] + kind[1], number
        turns[kind] += 1
    return sorted(place, key=lambda name: place[name])


def draw_shots(
    rows: Iterable[tuple[Key, str]],
    shots: int | None,
    *,
    seed: int,
    classes: Sequence[str] | None = None,
    unit: Literal["image", "instance"] = "image",
    instances: Mapping[tuple[Key, str], int] | None = None,
    nested: bool = True,
    usable: Callable[[Key, str], bool] | None = None,
    salt: str = "shots",
    split: str = "train",
    looked_at: int | None = None,
    remark: str = "",
) -> list[tuple[Key, str]]:
    """Draw `shots` examples of each class; a class that has fewer keeps what it has and is named in a warning.

    Args:
        rows: (key, class) pairs, one per image and class that shows it, in any order; pairs that occur again count
            once. A key names the image: an integer or a string, the same on every machine (no absolute path).
        shots: examples per class; None takes all.
        seed: seed of the draw.
        classes: the classes to draw; each needs an example. None takes those that occur.
        unit: what an example is: an ``image``, or an ``instance`` of the class (see the module).
        instances: objects of the class in the image, by (key, class); 1 where it has no entry.
        nested: whether k shots contain k - 1 shots; false makes the draw of every k its own.
        usable: asked of every pair before it is taken, in the order of the draw; the next one takes the place of one
            that is refused.
        salt: what the draw is for; draws with different salts are unrelated.
        split: name of the split, for messages.
        looked_at: how many annotations the rows were made from, for messages; the number of rows when None.
        remark: a sentence on what is no example, for messages.

    Returns:
        The drawn pairs, in ascending order.

    Raises:
        ConfigConflictError: `shots` is below 1.
        EmptyClassError: a class of `classes` has no row, or none that can be taken.
    """
    if shots is not None and shots < 1:
        raise ConfigConflictError(f"Expected shots >= 1 or null (all), found {shots}.")
    keys: dict[str, set[Key]] = {name: set() for name in classes or ()}
    count = 0
    for count, (key, name) in enumerate(rows, start=1):  # noqa: B007  (the number of rows, read below)
        if classes is None or name in keys:
            keys.setdefault(name, set()).add(key)
    looked_at = count if looked_at is None else looked_at
    _check_empty([name for name, found in keys.items() if not found], keys, split, looked_at, remark)
    salt = salt if nested or shots is None else f"{salt}/{shots}"
    drawn: dict[str, list[Key]] = {}
    reached: dict[str, int] = {}
    for name, found in keys.items():
        sizes = {key: (instances or {}).get((key, name), 1) if unit == "instance" else 1 for key in found}
        order = sorted(found) if shots is None else hash_order(found, seed=seed, salt=f"{salt}/{name}")  # type: ignore[type-var]
        drawn[name] = _take(order, sizes, shots, nested=nested, usable=_asked_of(usable, name))
        reached[name] = sum(sizes[key] for key in drawn[name])
    unfit = f"{remark} None of its pictures can be used{' or fits into the shots' * (unit == 'instance')}.".strip()
    _check_empty([name for name in classes or () if not drawn[name]], any(drawn.values()), split, looked_at, unfit)
    _warn_about_few(reached, shots, split, unit)
    return sorted((key, name) for name, taken in drawn.items() for key in taken)


def _asked_of(usable: Callable[[Key, str], bool] | None, name: str) -> Callable[[Key], bool]:
    return (lambda key: True) if usable is None else lambda key: usable(key, name)


def _take(
    order: Sequence[Key], sizes: Mapping[Key, int], shots: int | None, *, nested: bool, usable: Callable[[Key], bool]
) -> list[Key]:
    """The keys of one class, in the order of the draw, that fit into `shots` together and are usable."""
    if shots is None:
        return [key for key in order if usable(key)]
    taken: dict[Key, None] = {}
    total = 0
    single = all(size == 1 for size in sizes.values())
    for goal in range(1, shots + 1) if nested and not single else (shots,):
        for key in order:
            if total == goal:
                break
            if key not in taken and total + sizes[key] <= goal and usable(key):
                taken[key] = None
                total += sizes[key]
    return list(taken)


def _digest(seed: int, salt: str, key: Hashable) -> bytes:
    # JSON keeps neighbouring parts apart and writes integers and strings the same everywhere.
    return blake2b(json.dumps([salt, seed, key]).encode("ascii"), digest_size=16).digest()


def _check_empty(empty: list[str], any_left: object, split: str, looked_at: int, remark: str) -> None:
    if empty or not any_left:
        raise EmptyClassError(
            f"No example of {', '.join(map(repr, empty)) or 'any class'} in {split}: {looked_at} annotations were "
            f"looked at.{' ' * bool(remark)}{remark} Take what has no example out of data.classes, or train on another "
            "split."
        )


def _warn_about_few(reached: dict[str, int], shots: int | None, split: str, unit: str) -> None:
    few = [f"{name or 'pictures'} ({count})" for name, count in reached.items() if count < (shots or 0)]
    if few:
        what, used = ("images", "all of them are") if unit == "image" else ("objects", "what fits is")
        warnings.warn(
            f"Fewer than {shots} {what} of {len(few)} of {len(reached)} classes in {split}; {used} used: "
            f"{', '.join(few)}.",
            stacklevel=3,
        )


__all__ = ["draw_shots", "hash_order", "in_turn"]
