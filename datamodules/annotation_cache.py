"""What was parsed of a large annotation file, kept beside it, so that the next start does not parse it again.

A cache is an npz file without pickled objects. It is used only for the size and the time of change of the source that
it was made from, replaced in one step, and made anew when it is damaged: deleting one is always safe.
"""

from __future__ import annotations

import gc
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np

from rft_lightning.datamodules.manifest import write_atomically

# Smaller files are parsed in no time, and nobody wants files beside them.
SMALLEST_SOURCE = 2 * 1024**2  # bytes
_KEY = "rft_lightning"

State = tuple[int, int]  # (bytes, time of change in ns)


def state(source: Path) -> State:
    """What tells one content of a file from another."""
    found = source.stat()
    return found.st_size, found.st_mtime_ns


def load(source: Path, version: int) -> dict[str, np.ndarray] | None:
    """The arrays that :func:`store` kept of a file; None when there are none, or the file has changed since.

    Args:
        source: the annotation file.
        version: number of the form that the arrays are in; those of another one are not used.
    """
    if source.stat().st_size < SMALLEST_SOURCE:
        return None
    for place in _places(source):
        try:
            # Not by name: a damaged archive would leave the file open.
            with place.open("rb") as file, np.load(file, allow_pickle=False) as found:
                if found[_KEY].tobytes() == _key(source, version, state(source)):
                    return {name: found[name] for name in found.files if name != _KEY}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.zlib.error):  # type: ignore[attr-defined]
            continue
    return None


def store(source: Path, version: int, arrays: Mapping[str, np.ndarray], before: State) -> None:
    """Keep arrays beside a file, or in the user's cache folder where that is read-only; where neither works, not.

    Args:
        source: the annotation file.
        version: number of the form that the arrays are in.
        arrays: what was parsed.
        before: :func:`state` of the file before it was parsed. They are not kept when it has changed since, for they
            may be of the old content.
    """
    if before[0] < SMALLEST_SOURCE or state(source) != before:
        return
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, allow_pickle=False, **{_KEY: np.frombuffer(_key(source, version, before), np.uint8)}, **arrays
    )
    for place in _places(source):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, buffer.getvalue())
            return
        except OSError:
            continue


@contextmanager
def no_collection() -> Iterator[None]:
    """Make millions of objects that stay without the garbage collector looking through them again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _places(source: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rft_lightning"
    name = blake2b(str(source.resolve()).encode(), digest_size=8).hexdigest()
    return [source.with_name(f".{source.name}.rft.npz"), cache / f"{source.name}.{name}.npz"]


def _key(source: Path, version: int, found: State) -> bytes:
    return json.dumps([version, source.name, *found]).encode()


__all__ = ["SMALLEST_SOURCE", "State", "load", "no_collection", "state", "store"]
