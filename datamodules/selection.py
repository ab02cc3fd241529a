"""The classes of a data set that are asked for, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rft_lightning.errors import ConfigConflictError


def select_classes(
    names: Mapping[int, str],
    classes: Sequence[str] | str | None,
    source: Path,
    sets: Mapping[str, Sequence[str]] | None = None,
) -> dict[int, str]:
    """Category id -> name of `classes`, in the order of `names`.

    Args:
        names: category id -> name of all categories.
        classes: names, one name, or the name of a set; None takes all.
        source: where the names come from, for messages.
        sets: name of a set -> its classes.

    Raises:
        ConfigConflictError: a class is not in the data set.
    """
    if classes is None:
        return dict(names)
    sets = sets or {}
    wanted = list(sets.get(classes, ()) or [classes]) if isinstance(classes, str) else list(classes)
    unknown = [name for name in wanted if name not in set(names.values())]
    if unknown:
        known = list(names.values())
        listed = ", ".join(map(repr, known[:80])) + (f" and {len(known) - 80} more" if len(known) > 80 else "")
        matches = "; ".join(with_close_matches(name, [*known, *sets]) for name in unknown)
        raise ConfigConflictError(
            f"Unknown class in data.classes: {matches}. {source} has {len(known)} classes: {listed}."
            + (f" Sets of classes: {', '.join(sets)}." if sets else "")
        )
    return {category: name for category, name in names.items() if name in set(wanted)}


def with_close_matches(name: str, names: Iterable[str]) -> str:
    """A name in quotes, with the most similar of `names`."""
    lowered = {known.lower(): known for known in names}
    close = [repr(lowered[match]) for match in difflib.get_close_matches(name.lower(), lowered)]
    return f"{name!r} (did you mean {', '.join(close)}?)" if close else repr(name)


__all__ = ["select_classes", "with_close_matches"]
