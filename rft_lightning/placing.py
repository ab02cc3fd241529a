"""Putting a checkpoint in its place, so that a crash at any moment leaves the old one whole, or the new one.

A checkpoint is a file or a folder. It is written under another name beside its place (:func:`partial_of`) and then put
there by one rename. A rename cannot replace a folder that holds files, so a folder gets a name of its own,
``NAME.ckpt.TOKEN``, and ``NAME.ckpt`` is a relative link to it, which a rename can replace, whatever was there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rft_lightning.errors import CheckpointError

_FOLDER = re.compile(r"(?P<name>.+\.ckpt)\.[0-9a-f]{8}")
_claims: set[int] = set()
_UNFINISHED = re.compile(r"\..+\.ckpt\.(partial|link)")


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written before it is put at `path`."""
    return path.with_name(f".{path.name}.partial")


def place(partial: Path, path: Path) -> None:
    """Put a complete checkpoint in its place; what was there is removed afterwards. One process alone may call it.

    Raises:
        OSError: the file system refuses; `path` is as it was.
    """
    # A power cut may keep a rename and lose what was written just before it, unless that was flushed first.
    _flush(partial)
    earlier = _target(path)
    if partial.is_dir():
        folder = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        link = path.with_name(f".{path.name}.link")
        os.replace(partial, folder)
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name, target_is_directory=True)
        os.replace(link, path)
    else:
        os.replace(partial, path)
    _flush_one(path.parent)
    if earlier is not None:
        shutil.rmtree(earlier, ignore_errors=True)


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a text file so that no reader, and no power cut, ever sees a part of it; its folder is made.

    Args:
        path: of the file.
        text: what it holds, whole or in pieces, which need not be in memory at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines([text] if isinstance(text, str) else text)
        _flush_one(partial)
        os.replace(partial, path)
        _flush_one(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a checkpoint, with the folder that it is a link to; nothing where there is none."""
    folder = _target(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(directory: Path, *, keep: str | Path | None = None) -> None:
    """Remove what a run that was killed while saving left behind.

    Args:
        directory: where checkpoints are kept.
        keep: a checkpoint in use, which is no leftover.
    """
    used = None if keep is None else Path(keep).resolve()
    for path in list(directory.iterdir()) if directory.is_dir() else ():
        folder = _FOLDER.fullmatch(path.name)
        orphan = folder is not None and path.is_dir() and _target(directory / folder["name"]) != path
        if (orphan or _UNFINISHED.fullmatch(path.name)) and path.resolve() != used:
            remove(path)


@contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Inside, no other process claims the folder; whether that is so, False where another one has done so before.

    The claim ends with the process, however it ends. On file systems without locks, everybody gets it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    _claims.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        yield free
    finally:
        _claims.discard(descriptor)
        os.close(descriptor)


def _give_up_claims() -> None:
    """In a forked process, which may outlive the one that made them by seconds."""
    for descriptor in _claims:
        os.close(descriptor)
    _claims.clear()


os.register_at_fork(after_in_child=_give_up_claims)


def check_place(path: Path) -> None:
    """Refuse a place that no rename can take.

    Raises:
        CheckpointError: a folder is there, not a link to one.
    """
    if path.is_dir() and not path.is_symlink():
        raise CheckpointError(
            f"{path} is a folder, expected a file or a link to a folder, which alone can be replaced without a moment "
            "at which there is neither (copies that follow links make such folders). Rename it; a run can be resumed "
            "from it under any name."
        )


def size(path: Path) -> int:
    """Bytes of a checkpoint, 0 where there is none."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0


def _target(path: Path) -> Path | None:
    """The folder of ours that a checkpoint is a link to, or None."""
    if not path.is_symlink():
        return None
    name = os.readlink(path)
    folder = _FOLDER.fullmatch(name)
    return path.with_name(name) if folder is not None and folder["name"] == path.name else None


def _flush(path: Path) -> None:
    for part in path.rglob("*") if path.is_dir() else ():
        _flush_one(part)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
