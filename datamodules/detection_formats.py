"""What readers of the user's own detection sets share: what they find, where pictures are, how boxes are written.

A reader (:mod:`rft_lightning.datamodules.detection_readers`) gives the pictures of a split with objects by class name
and boxes xyxy in pixels as written. What is wrong with a box is judged in one place for all of them, by
:mod:`rft_lightning.datamodules.custom_detection`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rft_lightning.datamodules.coco_annotations import Box
from rft_lightning.datamodules.detection import ImageId, picture_size
from rft_lightning.errors import AnnotationError, DatasetNotFoundError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_LAYOUTS = ("xyxy", "xywh", "cxcywh", "yxyx")
# How the boxes of JSON lines are written: four numbers in pixels, in shares of the picture, or in thousandths of it.
BOX_FORMATS = tuple(layout + unit for layout in _LAYOUTS for unit in ("", "_norm", "_norm1000"))


@dataclass(frozen=True, slots=True)
class Thing:
    """An annotated object: class name, box xyxy in pixels, where it is written; a crowd or doubtful one is ignored."""

    label: str
    box: Box
    where: str
    area: float | None = None
    ignored: bool = False


@dataclass(slots=True)
class Labelled:
    """An annotated picture: id, path, (width, height), objects, and where it is written."""

    id: ImageId
    path: Path
    size: tuple[int, int]
    where: str
    things: list[Thing] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Content:
    """What a reader found: category id -> name (None: the format has no table of categories), and the pictures."""

    categories: dict[int, str] | None
    pictures: list[Labelled]


class Reader(ABC):
    """Reads one format below `root`.

    Args:
        root: folder of the data set.
        image_root: folder of the pictures; None for the usual places.
        box_format: how boxes are written, where the format leaves it open.
        skip_bad: leave out pictures that are missing or cannot be read; they are listed in `bad`.

    Attributes:
        name: the format's name.
        tree: its files, in words.
        bad: what is wrong with the pictures that were left out.
    """

    name: ClassVar[str]
    tree: ClassVar[str]

    def __init__(self, root: Path, image_root: Path | None, box_format: str, skip_bad: bool = False) -> None:
        self.root, self.image_root, self.box_format, self.skip_bad = root, image_root, box_format, skip_bad
        self.bad: list[str] = []

    @abstractmethod
    def find(self, split: str | None) -> Path | None:
        """The file or folder that holds a split (None: the only one); None if there is none."""

    @abstractmethod
    def read(self, source: Path, split: str | None) -> Content:
        """The content of what :meth:`find` found.

        Raises:
            AnnotationError: it cannot be used; names file and place.
            DatasetNotFoundError: a picture is missing.
        """

    def attempt(self, make: Callable[[], Labelled]) -> Labelled | None:
        """A picture, or None where it is bad and left out."""
        try:
            return make()
        except DatasetNotFoundError as error:
            if not self.skip_bad:
                raise
            self.bad.append(str(error))
            return None

    def picture(self, name: str, split: str | None, source: Path, where: str) -> Path:
        """The picture of an annotation.

        Raises:
            DatasetNotFoundError: it is in none of the usual places.
        """
        base = source if source.is_dir() else source.parent
        roots = [self.image_root] if self.image_root else [self.root, base]
        below = ["images", "JPEGImages", "."]
        below += [f"images/{split}", split, f"{split}/images"] if split else []
        places = dict.fromkeys(root / part for root in roots for part in below)
        for folder in places:
            if (folder / name).is_file():
                return folder / name
        raise DatasetNotFoundError(
            f"{where} needs the picture {name!r}, which is in none of {', '.join(map(str, places))}. Restore it, set "
            "data.image_root to the folder that names are relative to, or remove the annotation."
        )


def to_xyxy(box: Sequence[float], box_format: str, size: tuple[int, int]) -> Box:
    """A box written in one of `BOX_FORMATS` as xyxy in pixels.

    Args:
        box: four numbers.
        box_format: layout (``xyxy``, ``xywh``, ``cxcywh``, ``yxyx``) and unit (pixels; ``_norm``: 0 to 1 of width and
            height; ``_norm1000``: 0 to 1000).
        size: (width, height) of the picture.

    Raises:
        ValueError: there are not four numbers.
    """
    if len(box) != 4:
        raise ValueError(f"{len(box)} numbers in a box, not 4")
    a, b, c, d = (float(value) for value in box)
    layout, _, unit = box_format.partition("_")
    x1, y1, x2, y2 = {
        "xyxy": (a, b, c, d),
        "xywh": (a, b, a + c, b + d),
        "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        "yxyx": (b, a, d, c),
    }[layout]
    extent = {"": None, "norm": 1.0, "norm1000": 1000.0}[unit]
    across, down = (1.0, 1.0) if extent is None else (size[0] / extent, size[1] / extent)
    return x1 * across, y1 * down, x2 * across, y2 * down


def parse_json(text: bytes | str, where: str) -> Any:
    """The content of JSON text.

    Raises:
        AnnotationError: it is none.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise AnnotationError(f"{where} is no JSON ({error}): cut off or damaged. Copy or export it again.") from error


def stated_size(path: Path, width: Any, height: Any, where: str) -> tuple[int, int]:
    """The size of a picture, which has to be the stated one where one is stated.

    Raises:
        AnnotationError: the sizes differ.
        DatasetNotFoundError: the picture cannot be read.
    """
    size = picture_size(path)
    if width is not None and height is not None and (int(width), int(height)) != size:
        raise AnnotationError(
            f"{where} states {width}x{height} pixels, but {path} has {size[0]}x{size[1]}, so its boxes do not fit. "
            "Restore the picture they were drawn on, without resizing or rotating it, or correct the size."
        )
    return size


def first_existing(paths: Iterable[Path], pattern: str | None = None) -> Path | None:
    """The first path that exists (and holds files of `pattern`)."""
    return next((p for p in paths if (p.exists() if pattern is None else any(p.glob(pattern)))), None)


__all__ = [
    "BOX_FORMATS",
    "SUFFIXES",
    "Content",
    "Labelled",
    "Reader",
    "Thing",
    "first_existing",
    "parse_json",
    "stated_size",
    "to_xyxy",
]
