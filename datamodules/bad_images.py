"""Pictures that cannot be read, found before training instead of in the middle of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image

from rft_lightning.datamodules.rows import Row
from rft_lightning.errors import AnnotationError, DatasetNotFoundError
from rft_lightning.sample import Sample

# Reading the headers of more pictures than this would hold up the start; theirs are read when they are used. With
# `on_bad_image: skip` all headers are read, but no more pictures than this decoded.
AT_START = 10_000
# What Pillow raises on damaged files, and what the data sets raise for them.
_DAMAGED = (OSError, SyntaxError, EOFError, Image.DecompressionBombError)
_UNUSABLE = (*_DAMAGED, DatasetNotFoundError, AnnotationError)

Maker = Callable[[Sequence[Row]], Callable[[Row], Sample]]


def check_headers(rows: Iterable[Row], make: Callable[[Row], Sample]) -> None:
    """Make a sample of every picture, which reads its header, unless there are too many.

    Raises:
        DatasetNotFoundError: a picture is missing or is none.
    """
    pictures = {row.image: row for row in rows}
    if len(pictures) > AT_START:
        return
    for row in pictures.values():
        try:
            make(row)
        except _DAMAGED as error:
            raise DatasetNotFoundError(
                f"Sample {row.id!r}: its picture cannot be read ({error}). Restore the file, remove its annotation, or "
                "set data.on_bad_image to skip."
            ) from error


class ReadableRows:
    """Which rows of a split have a picture that can be read; the pictures that cannot be are remembered.

    Args:
        maker: gives the function that makes samples of some rows, and may raise when their pictures are missing.
        decode: whether pictures are decoded; otherwise only their headers are read.
    """

    def __init__(self, maker: Maker, *, decode: bool) -> None:
        self.maker, self.decode = maker, decode
        self.bad: dict[Any, str] = {}
        self._good: set[Any] = set()

    def __call__(self, row: Row) -> bool:
        """Whether the picture of one row can be read."""
        return bool(self.keep([row]))

    def keep(self, rows: Sequence[Row]) -> list[Row]:
        """The rows whose pictures can be read."""
        new = {row.image: row for row in rows if row.image not in self._good and row.image not in self.bad}
        self._look_at(list(new.values()))
        return [row for row in rows if row.image in self._good]

    def warn(self, split: str) -> None:
        """Name the pictures that were left out, in one warning."""
        if self.bad:
            shown = "; ".join(list(self.bad.values())[:10])
            warnings.warn(
                f"{len(self.bad)} pictures of {split} cannot be used and are left out (data.on_bad_image is skip): "
                f"{shown}{'; ...' if len(self.bad) > 10 else ''}",
                stacklevel=2,
            )

    def _look_at(self, rows: list[Row]) -> None:
        """One row per picture. A maker that fails is asked for halves, until the picture at fault stands alone."""
        if not rows:
            return
        try:
            make = self.maker(rows)
        except _UNUSABLE as error:
            if len(rows) == 1:
                self.bad[rows[0].image] = f"{rows[0].id}: {error}"
            else:
                self._look_at(rows[: len(rows) // 2])
                self._look_at(rows[len(rows) // 2 :])
            return
        for row in rows:
            try:
                sample = make(row)
                if self.decode:
                    sample.load_image()
                self._good.add(row.image)
            except _UNUSABLE as error:
                self.bad[row.image] = f"{row.id}: {error}"


__all__ = ["AT_START", "ReadableRows", "check_headers"]
