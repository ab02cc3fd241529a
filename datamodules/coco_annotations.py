"""COCO's instances files and the pictures they describe, read and checked."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools.coco import COCO

from rft_lightning.datamodules.fewshot import hash_order
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError

Box = tuple[float, float, float, float]
RowKey = tuple[int, int]  # (image id, category id)

_DOWNLOADS = "https://cocodataset.org/#download"
# Reading the headers of more pictures than this would hold up the start; theirs are read when they are used.
_HEADERS_AT_START = 10_000


@dataclass(frozen=True)
class Picture:
    """A picture as the annotation file describes it: (width, height), and one annotation of it, if there is any."""

    path: Path
    size: tuple[int, int]
    annotation: int | None


@dataclass
class CategoryObjects:
    """What is annotated of one category in one picture: boxes xyxy in pixels, and COCO's areas in square pixels.

    Without boxes and crowds when all boxes had no area: the category is there, but not where.
    """

    boxes: list[Box] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    ignore_boxes: list[Box] = field(default_factory=list)
    ignore_areas: list[float] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Nothing to find, not even a crowd."""
        return not self.boxes and not self.ignore_boxes


class COCOAnnotations:
    """An instances file, without its masks.

    Attributes:
        file: the file.
        split: name of the split.
        categories: category id -> name, ascending.
        pictures: image id -> picture.
        objects: (image id, category id) -> what is annotated.
        annotation_count: number of annotations in the file.

    Raises:
        AnnotationError: the file is no instances file, or contradicts itself.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.file, self.split = annotation_file(root, split), split
        content = _parse(self.file)
        try:
            notes = content["annotations"]
            self.categories = {entry["id"]: entry["name"] for entry in sorted(content["categories"], key=_id)}
            first = {note["image_id"]: note["id"] for note in reversed(notes)}
            self.pictures = {
                entry["id"]: Picture(
                    root / split / entry["file_name"],
                    (int(entry["width"]), int(entry["height"])),
                    first.get(entry["id"]),
                )
                for entry in content["images"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise AnnotationError(_no_instances_file(self.file, error)) from error
        self._check_names()
        self.annotation_count = len(notes)
        self.objects: dict[RowKey, CategoryObjects] = {}
        for note in notes:
            self._add(note)
        self._measured: set[int] = set()

    def _check_names(self) -> None:
        twice = [name for name, count in Counter(self.categories.values()).items() if count > 1]
        if twice:
            raise AnnotationError(
                f"{self.file} has several categories named {twice[0]!r}; expected different names, since questions ask "
                "by name. Rename or merge them."
            )

    def _add(self, note: Mapping[str, Any]) -> None:
        image, category = note["image_id"], note["category_id"]
        where = f"Annotation {note['id']} in {self.file}"
        for kind, value, known in (("image", image, self.pictures), ("category", category, self.categories)):
            if value not in known:
                raise AnnotationError(
                    f"{where} belongs to {kind} {value}, which the file does not list. Add the {kind} or remove the "
                    "annotation."
                )
        objects = self.objects.setdefault((image, category), CategoryObjects())
        try:
            x, y, width, height = (float(value) for value in note["bbox"])
            area = float(note.get("area", width * height))
            if not all(map(math.isfinite, (x, y, width, height, area))):
                raise ValueError("not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise AnnotationError(
                f"{where} has bbox {note.get('bbox')!r} and area {note.get('area')!r}; expected [x, y, width, height] "
                "and a number, in pixels. Correct or remove the annotation."
            ) from error
        box = _clip(x, y, width, height, self.pictures[image].size)
        if box is None:
            return
        is_crowd = bool(note.get("iscrowd", 0))
        (objects.ignore_boxes if is_crowd else objects.boxes).append(box)
        (objects.ignore_areas if is_crowd else objects.areas).append(area)

    def select(self, classes: Iterable[str] | None, *, sets: Iterable[str] = ()) -> dict[int, str]:
        """Category id -> name of `classes` (None: all), ascending.

        Args:
            classes: names.
            sets: names of sets of classes, for the message.

        Raises:
            ConfigConflictError: the file has no such class.
        """
        if classes is None:
            return self.categories
        wanted, names = set(classes), list(self.categories.values())
        unknown = sorted(wanted - set(names))
        if unknown:
            known = [*names, *sets]
            raise ConfigConflictError(
                f"Unknown class in data.classes: {'; '.join(_with_close_matches(name, known) for name in unknown)}. "
                f"{self.file} has {len(names)} classes: {', '.join(names)}. Sets of classes: {', '.join(sets) or '-'}."
            )
        return {category: name for category, name in self.categories.items() if name in wanted}

    def absent(self, categories: Sequence[int], seed: int) -> Iterator[RowKey]:
        """(image id, category id) of what pictures do not show; each picture once, then each a second time, ..."""
        images = hash_order(self.pictures, seed=seed, salt="negatives")
        for turn in range(len(categories)):
            for image in images:
                left = [category for category in categories if (image, category) not in self.objects]
                if turn < len(left):
                    yield image, hash_order(left, seed=seed, salt=f"negatives/{image}")[turn]

    def check_pictures(self, images: Iterable[int]) -> None:
        """See that the pictures exist and, unless they are too many to open, have the size that the file states.

        Raises:
            DatasetNotFoundError: a picture is missing or cannot be read.
            AnnotationError: a picture has another size.
        """
        pictures = {image: self.pictures[image] for image in sorted(set(images))}
        folders = {folder: _names(folder) for folder in {picture.path.parent for picture in pictures.values()}}
        missing = [i for i, picture in pictures.items() if picture.path.name not in folders[picture.path.parent]]
        if missing:
            image = min(missing, key=lambda i: pictures[i].annotation is None)
            path, annotation = pictures[image].path, pictures[image].annotation
            who = f"Image {image}" if annotation is None else f"Annotation {annotation} (image {image})"
            raise DatasetNotFoundError(
                f"{who} in {self.file} needs the picture {path}, which does not exist. {len(missing)} of the "
                f"{len(pictures)} pictures used of {self.split} are missing: restore them ({_source(self.split)}), or "
                "remove them and their annotations from the file."
            )
        if len(pictures) <= _HEADERS_AT_START:
            for image in pictures:
                self.check_size(image)

    def check_size(self, image: int) -> None:
        """Compare the size of a picture with the annotation file, once; only the header is read.

        Raises:
            DatasetNotFoundError: the picture cannot be read.
            AnnotationError: the sizes differ.
        """
        if image in self._measured:
            return
        path, stated = self.pictures[image].path, self.pictures[image].size
        try:
            with Image.open(path) as picture:
                found = picture.size  # EXIF rotation not applied, as in COCO
        except OSError as error:
            raise DatasetNotFoundError(
                f"The picture {path} of image {image} in {self.file} cannot be read ({error}). Restore it "
                f"({_source(self.split)}), or remove it and its annotations from the file."
            ) from error
        if found != stated:
            raise AnnotationError(
                f"The picture {path} has {found[0]}x{found[1]} pixels, but {self.file} states {stated[0]}x{stated[1]} "
                f"for image {image}, so its boxes do not fit. Restore the original picture ({_source(self.split)}), "
                "without resizing or rotating it, or correct the file."
            )
        self._measured.add(image)


def annotation_file(root: Path, split: str) -> Path:
    """Where the official tree has the boxes of a split."""
    return root / "annotations" / f"instances_{split}.json"


def coco_root(root: str | Path, split: str) -> Path:
    """The folder of the tree that holds `split`: `root` itself or its subfolder ``coco``.

    Raises:
        DatasetNotFoundError: there is no annotation file of the split.
    """
    given = Path(root).expanduser()
    for folder in (given, given / "coco"):
        if annotation_file(folder, split).is_file():
            return folder
    file = annotation_file(given, split)
    others = [
        path.stem.removeprefix("instances_")
        for folder in (given, given / "coco")
        for path in sorted(folder.glob("annotations/instances_*.json"))
    ]
    found = f"{file} does not exist" if given.is_dir() else f"the folder {given} does not exist"
    splits = f" (splits found there: {', '.join(others)})" if others else ""
    raise DatasetNotFoundError(
        f"No COCO data for {split}: {found}{splits}. Looked for the official tree, {file} and the pictures in "
        f"{given / split}, and for the same in {given / 'coco'}. Set data.root to the folder that holds annotations/ "
        f"and {split}/; {_source(split)}."
    )


def _source(split: str) -> str:
    """Where the files of a split come from, in words."""
    official = re.fullmatch(r"(?:train|val)(2014|2017)", split)
    if official is None:
        return f"official splits are train2017, val2017, train2014 and val2014, from {_DOWNLOADS}"
    return f"{split}.zip and annotations_trainval{official[1]}.zip from {_DOWNLOADS}, unpacked there"


def _parse(file: Path) -> dict[str, Any]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(str(file)).dataset
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise AnnotationError(_no_instances_file(file, error)) from error


def _no_instances_file(file: Path, error: Exception) -> str:
    problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return (
        f"{file} is no usable COCO instances file ({problem}). Expected JSON with `images` (id, file_name, width, "
        "height), `annotations` (id, image_id, category_id, bbox) and `categories` (id, name). Unpack or download it "
        f"again from {_DOWNLOADS}, or correct it."
    )


def _id(entry: Mapping[str, Any]) -> Any:
    return entry["id"]


def _clip(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> Box | None:
    """The part of an xywh box inside the picture as xyxy; None without area."""
    box = max(x, 0.0), max(y, 0.0), min(x + width, float(size[0])), min(y + height, float(size[1]))
    return box if box[0] < box[2] and box[1] < box[3] else None


def _names(folder: Path) -> set[str]:
    """What a folder holds; one listing instead of a look-up per picture, which takes minutes on a network disk."""
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _with_close_matches(name: str, names: Sequence[str]) -> str:
    lowered = {known.lower(): known for known in names}
    close = [repr(lowered[match]) for match in difflib.get_close_matches(name.lower(), lowered)]
    return f"{name!r} (did you mean {', '.join(close)}?)" if close else repr(name)


__all__ = ["Box", "COCOAnnotations", "CategoryObjects", "Picture", "RowKey", "annotation_file", "coco_root"]
