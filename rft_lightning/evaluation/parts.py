"""The answers of an evaluation that is under way: one file per process, to which whole batches are appended.

A process that is killed leaves whole lines and at most one that is cut off, which the next run removes. Every answered
sample is found again by its id, whatever number of processes wrote the files.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from rft_lightning.errors import ConfigConflictError
from rft_lightning.evaluation.rows import line_of, read_rows
from rft_lightning.placing import write_whole

PARTS, SETTINGS = "parts", ".settings.json"


class Parts:
    """The part files of an evaluation folder.

    Args:
        folder: of the evaluation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._settings = folder / PARTS, folder / SETTINGS
        self._own: TextIO | None = None

    def settings(self) -> dict[str, Any] | None:
        """What the answers in the folder depend on; None where none were begun."""
        return json.loads(self._settings.read_text(encoding="utf-8")) if self._settings.is_file() else None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Say what the answers will depend on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._settings, json.dumps(settings, indent=1) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all files. What was cut off is removed.

        Raises:
            ConfigConflictError: a process still writes one of them: that of a run of which another process was killed.
        """
        for file in sorted(self.folder.glob("part-*.jsonl")):
            with file.open("rb+") as opened:
                try:
                    fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                        raise ConfigConflictError(
                            f"A process of an earlier run still writes {file}. It ends by itself once it finds the "
                            "others gone: try again in a minute, or end it."
                        ) from error
                _remove_cut_line(opened)
            for _, row in read_rows(file):
                yield row

    def append(self, rows: Iterable[Mapping[str, Any]], rank: int) -> None:
        """Add the answers of a batch to the file of a process; they are on the disk when this returns."""
        if self._own is None:
            self._own = self._file(rank).open("a", encoding="utf-8", errors="surrogateescape")
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(self._own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._own.write("".join(map(line_of, rows)))
        self._own.flush()
        os.fsync(self._own.fileno())

    def close(self) -> None:
        """Write no more; others may read then."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def remove(self) -> None:
        """Remove the files, once the answers are elsewhere; what they depend on is still said."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, rank: int) -> Path:
        return self.folder / f"part-{rank:05d}.jsonl"


def _remove_cut_line(file: BinaryIO) -> None:
    """Cut the file after its last whole line."""
    size = file.seek(0, os.SEEK_END)
    end = size
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


__all__ = ["PARTS", "Parts"]
