"""The answers of an evaluation that is under way: one file per process, to which whole batches are appended.

A process that is killed leaves whole lines and at most one that is cut off, which the next run removes. Every answered
sample is found again by its id, whatever number of processes wrote the files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rft_lightning.evaluation.rows import line_of, read_rows

PARTS, SETTINGS = "parts", ".settings.json"


class Parts:
    """The part files of an evaluation folder.

    Args:
        folder: of the evaluation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._settings = folder / PARTS, folder / SETTINGS

    def settings(self) -> dict[str, Any] | None:
        """What the answers in the folder depend on; None where none were begun."""
        return json.loads(self._settings.read_text(encoding="utf-8")) if self._settings.is_file() else None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Say what the answers will depend on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._settings.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self._settings)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all files; no other process may be writing. What was cut off is removed."""
        for file in sorted(self.folder.glob("part-*.jsonl")):
            _remove_cut_line(file)
            for _, row in read_rows(file):
                yield row

    def append(self, rows: Iterable[Mapping[str, Any]], rank: int) -> None:
        """Add the answers of a batch to the file of a process; they are on the disk when this returns."""
        with self._file(rank).open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write("".join(map(line_of, rows)))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the files, once the answers are elsewhere; what they depend on is still said."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, rank: int) -> Path:
        return self.folder / f"part-{rank:05d}.jsonl"


def _remove_cut_line(file: Path) -> None:
    """Cut the file after its last whole line."""
    with file.open("rb+") as opened:
        size = opened.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            opened.seek(start)
            newline = opened.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            opened.truncate(end)


__all__ = ["PARTS", "Parts"]
