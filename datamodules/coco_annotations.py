"""COCO's instances files and the pictures they describe, read and checked."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from rft_lightning.datamodules import annotation_cache, bad_images
from rft_lightning.datamodules.fewshot import hash_order
from rft_lightning.datamodules.selection import with_close_matches
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.metrics.ap_files import check_category_ids

Box = tuple[float, float, float, float]
RowKey = tuple[int, int]  # (image id, category id)

_DOWNLOADS = "https://cocodataset.org/#download"
# Up to so many pictures are looked up one by one, more of them in a listing of their folder.
_LOOKED_UP = 32
# Number of the form in which annotations are cached; raised for new checks as well, a cache is not checked again.
_CACHE_VERSION = 3
_BOX, _CROWD, _NO_AREA = range(3)


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

    def add(self, box: Box, area: float, *, is_crowd: bool) -> None:
        """Add an object or a crowd."""
        (self.ignore_boxes if is_crowd else self.boxes).append(box)
        (self.ignore_areas if is_crowd else self.areas).append(area)


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
        self.categories: dict[int, str] = {}
        self.pictures: dict[int, Picture] = {}
        self.objects: dict[RowKey, CategoryObjects] = {}
        self.annotation_count = 0
        with annotation_cache.no_collection():
            self._load(root / split)

    def _load(self, folder: Path) -> None:
        before = annotation_cache.state(self.file)
        arrays = annotation_cache.load(self.file, _CACHE_VERSION)
        if arrays is not None:
            self._unpack(arrays, folder)
            return
        self._fill(_parse(self.file), folder)
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # ids that are no int64: not kept
            annotation_cache.store(self.file, _CACHE_VERSION, self._pack(folder), before)

    def _fill(self, content: Mapping[str, Any], folder: Path) -> None:
        try:
            notes = content["annotations"]
            self._check_ids("image", content["images"])
            self._check_ids("category", content["categories"])
            check_category_ids(content["categories"], str(self.file))
            self.categories = {entry["id"]: entry["name"] for entry in sorted(content["categories"], key=_id)}
            first = {note["image_id"]: note["id"] for note in reversed(notes)}
            self.pictures = {
                entry["id"]: Picture(
                    folder / entry["file_name"],
                    (int(entry["width"]), int(entry["height"])),
                    first.get(entry["id"]),
                )
                for entry in content["images"]
            }
        except AnnotationError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise AnnotationError(_no_instances_file(self.file, error)) from error
        for what, entries in (("image", content["images"]), ("category", content["categories"]), ("annotation", notes)):
            check_unique(f"{what} id", map(_id, entries), self.file)
        self._check_names()
        self.annotation_count = len(notes)
        for note in notes:
            self._add(note)

    def _pack(self, folder: Path) -> dict[str, np.ndarray]:
        """Everything as arrays, for the cache."""
        pictures, notes = self.pictures.values(), []
        for pair, found in self.objects.items():
            notes += [(pair, box, area, _BOX) for box, area in zip(found.boxes, found.areas, strict=True)]
            ignored = zip(found.ignore_boxes, found.ignore_areas, strict=True)
            notes += [(pair, box, area, _CROWD) for box, area in ignored]
            notes += [(pair, (0.0,) * 4, 0.0, _NO_AREA)] * found.is_empty
        pairs, boxes, areas, kinds = zip(*notes, strict=True) if notes else ((), (), (), ())
        return {
            "category_ids": _integers(self.categories),
            "category_names": np.array(list(self.categories.values()), dtype=str),
            "image_ids": _integers(self.pictures),
            "image_files": np.array([p.path.relative_to(folder).as_posix() for p in pictures], dtype=str),
            "image_sizes": np.array([p.size for p in pictures], dtype=np.int64).reshape(-1, 2),
            "image_notes": _integers(-1 if p.annotation is None else p.annotation for p in pictures),
            "pairs": _integers(number for pair in pairs for number in pair).reshape(-1, 2),
            "boxes": np.array(boxes, dtype=np.float64).reshape(-1, 4),
            "areas": np.array(areas, dtype=np.float64),
            "kinds": np.array(kinds, dtype=np.int8),
            "annotation_count": np.array(self.annotation_count),
        }

    def _unpack(self, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
        """The contrary of :meth:`_pack`."""
        lists = {name: array.tolist() for name, array in arrays.items()}
        self.categories = dict(zip(lists["category_ids"], lists["category_names"], strict=True))
        entries = zip(*(lists[f"image_{name}"] for name in ("ids", "files", "sizes", "notes")), strict=True)
        self.pictures = {
            image: Picture(folder / file, tuple(size), None if note == -1 else note)
            for image, file, size, note in entries
        }
        self.annotation_count = lists["annotation_count"]
        notes = zip(*(lists[name] for name in ("pairs", "boxes", "areas", "kinds")), strict=True)
        for pair, box, area, kind in notes:
            found = self.objects.setdefault(tuple(pair), CategoryObjects())
            if kind != _NO_AREA:
                found.add(tuple(box), area, is_crowd=kind == _CROWD)

    def _check_ids(self, what: str, entries: Iterable[Mapping[str, Any]]) -> None:
        for entry in entries:
            if type(entry["id"]) is not int:
                raise AnnotationError(
                    f"{self.file} has the {what} id {entry['id']!r}; expected whole numbers, as in COCO's own files. "
                    "CustomDetectionDataModule (configs/custom_detection.yaml) reads such files with other ids."
                )

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
                raise AnnotationError(not_listed(where, kind, value))
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
        objects.add(box, area, is_crowd=bool(note.get("iscrowd", 0)))

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
                f"Unknown class in data.classes: {'; '.join(with_close_matches(name, known) for name in unknown)}. "
                f"{self.file} has {len(names)} classes: {', '.join(names)}. Sets of classes: {', '.join(sets) or '-'}."
            )
        return {category: name for category, name in self.categories.items() if name in wanted}

    def absent(self, categories: Sequence[int], seed: int, *, skip: Collection[int] = frozenset()) -> Iterator[RowKey]:
        """(image id, category id) of what pictures do not show; each picture once, then each a second time, ...

        Args:
            categories: ids of the categories to ask for.
            seed: seed of the order.
            skip: ids of pictures to leave out.
        """
        images = [image for image in hash_order(self.pictures, seed=seed, salt="negatives") if image not in skip]
        for turn in range(len(categories)):
            for image in images:
                left = [category for category in categories if (image, category) not in self.objects]
                if turn < len(left):
                    yield image, hash_order(left, seed=seed, salt=f"negatives/{image}")[turn]

    def check_pictures(self, images: Iterable[int]) -> bool:
        """See that the pictures exist and, unless they are too many to open, have the size that the file states.

        Returns:
            Whether the sizes were compared.

        Raises:
            DatasetNotFoundError: a picture is missing or cannot be read.
            AnnotationError: a picture has another size.
        """
        pictures = {image: self.pictures[image] for image in sorted(set(images))}
        missing = _missing(pictures)
        if missing:
            image = min(missing, key=lambda i: pictures[i].annotation is None)
            path, annotation = pictures[image].path, pictures[image].annotation
            who = f"Image {image}" if annotation is None else f"Annotation {annotation} (image {image})"
            raise DatasetNotFoundError(
                f"{who} in {self.file} needs the picture {path}, which does not exist. {len(missing)} of the "
                f"{len(pictures)} pictures used of {self.split} are missing: restore them ({_source(self.split)}), or "
                "remove them and their annotations from the file."
            )
        few = len(pictures) <= bad_images.AT_START
        if few:
            for image, picture in pictures.items():
                check_size(image, picture, self.file, self.split)
        return few


def check_size(image: int, picture: Picture, file: Path, split: str) -> None:
    """Compare the size of a picture with its annotation file; only the header is read.

    Raises:
        DatasetNotFoundError: the picture cannot be read.
        AnnotationError: the sizes differ.
    """
    path, stated = picture.path, picture.size
    try:
        with Image.open(path) as opened:
            found = opened.size  # EXIF rotation not applied, as in COCO
    except OSError as error:
        raise DatasetNotFoundError(
            f"The picture {path} of image {image} in {file} cannot be read ({error}). Restore it ({_source(split)}), "
            "or remove it and its annotations from the file."
        ) from error
    if found != stated:
        raise AnnotationError(
            f"The picture {path} has {found[0]}x{found[1]} pixels, but {file} states {stated[0]}x{stated[1]} for image "
            f"{image}, so its boxes do not fit. Restore the original picture ({_source(split)}), without resizing or "
            "rotating it, or correct the file."
        )


def check_unique(what: str, values: Iterable[Hashable], source: Path) -> None:
    """See that no value occurs twice.

    Raises:
        AnnotationError: one does.
    """
    seen = set()
    for value in values:
        if value in seen:
            raise AnnotationError(f"{source} has the {what} {value!r} twice; expected it once. Rename or remove one.")
        seen.add(value)


def not_listed(where: str, kind: str, value: object) -> str:
    """What to say of an annotation of an unknown image or category."""
    return (
        f"{where} belongs to {kind} {value!r}, which the file does not list. Add the {kind} or remove the annotation."
    )


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


def _missing(pictures: Mapping[int, Picture]) -> list[int]:
    """The pictures that do not exist."""
    if len(pictures) <= _LOOKED_UP:
        return [image for image, picture in pictures.items() if not picture.path.is_file()]
    # One listing per folder: single look-ups of many thousands take minutes on a network disk.
    folders = {picture.path.parent for picture in pictures.values()}
    names = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in folders}
    return [image for image, picture in pictures.items() if picture.path.name not in names[picture.path.parent]]


def _integers(numbers: Iterable[Any]) -> np.ndarray:
    """An array of integers.

    Raises:
        TypeError: one is none.
    """
    found = list(numbers)
    if not all(type(number) is int for number in found):
        raise TypeError("not an integer")
    return np.array(found, dtype=np.int64)


__all__ = [
    "Box",
    "COCOAnnotations",
    "CategoryObjects",
    "Picture",
    "RowKey",
    "annotation_file",
    "check_size",
    "check_unique",
    "coco_root",
    "not_listed",
]
