"""CustomDetectionDataModule: the user's own few pictures with boxes, in any of the common formats."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rft_lightning.datamodules.coco_annotations import Box, CategoryObjects, Picture
from rft_lightning.datamodules.detection import DetectionAnnotations, DetectionDataModule
from rft_lightning.datamodules.detection_formats import BOX_FORMATS, Content, Reader, Thing
from rft_lightning.datamodules.detection_readers import READERS
from rft_lightning.datamodules.rows import Row
from rft_lightning.datamodules.selection import select_classes
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError

# Names that folders and files of a split usually have; None: the only set, without a name.
_SPLITS: dict[str, tuple[str | None, ...]] = {
    "train": ("train", "training", None),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}
# A box may pass the border by rounding and by careless drawing: by so many pixels, or this share of the picture's side.
_OVERSHOOT_PIXELS, _OVERSHOOT_SHARE = 2.0, 0.05


class CustomDetectionDataModule(DetectionDataModule):
    """Your own pictures with boxes; one question per picture and category.

    One of these trees, recognised by its files (or named by `format`); each may also have a single set without splits::

        coco   root/annotations.json  root/images/                          (one set)
               root/annotations/instances_{split}.json or {split}.json, root/{split}.json  root/images/ or {split}/
        voc    root/Annotations/*.xml  root/JPEGImages/                     (one set)
               with root/ImageSets/Main/{split}.txt, or root/{split}/*.xml beside the pictures
        yolo   root/data.yaml or classes.txt  root/images/  root/labels/    (one set)
               root/images/{split}/ root/labels/{split}/, or root/{split}/images/ root/{split}/labels/
        jsonl  root/annotations.jsonl or the only *.jsonl                   (one set)
               root/{split}.jsonl; lines {"image": path, "boxes": [[...], ...], "labels": [name, ...]}

    Splits are train (training), val (valid, validation) and test, by the names of files or folders. Without validation
    pictures, `val_shots` holds training pictures out; without test pictures, test and prediction use the validation
    pictures (all that is asked about them, `val_limit` does not count there).

    The ids of pictures (coco) are whole numbers or strings. Categories may have any ids; where they are no integers, or
    the format has no table of them (voc, jsonl), they get 1, 2, ... in the order of the file or of their names. What is
    not annotated is taken to be absent: every object of the classes has to have its box. Crowds (coco) and difficult
    objects (voc) are no answers and no shots; in evaluation they are neither right nor wrong. A rotation that a file's
    EXIF data asks for is not applied.

    Boxes become xyxy in pixels of half-open ranges. VOC's corners are 1-based and inclusive: (1, 1, w, h) is the whole
    picture and becomes (0, 0, w, h). COCO's are [x, y, width, height]; YOLO's centre, width and height in 0 to 1; those
    of JSON lines what `box_format` says. A box that passes the border by at most 2 pixels or 5 % of the picture's side
    is cut there; one that passes it by more, or lies outside, is an error that names file and place, since it mostly
    means another format or another picture (`on_bad_box: drop` leaves it out with a warning); boxes without width or
    height are left out and counted in a warning.

    The data set is yours to bring, and its licence yours to keep.

    Args:
        root: folder of the data set.
        format: ``coco``, ``voc``, ``yolo`` or ``jsonl``; null recognises it.
        image_root: folder that the pictures' names are relative to; null looks in the usual places.
        box_format: how the boxes of JSON lines are written: ``xyxy``, ``xywh``, ``cxcywh`` or ``yxyx``, in pixels;
            with ``_norm`` in 0 to 1, with ``_norm1000`` in 0 to 1000 of width and height (``cxcywh_norm``).
        on_bad_box: what to do with a box outside its picture or with swapped corners: ``raise`` or ``drop``.
        **kwargs: see :class:`DetectionDataModule`.

    Raises:
        ConfigConflictError: an argument is out of its range, or (in `samples`) a class is not in the data set.
        DatasetNotFoundError: (in `samples`) no format is recognised, or a picture is missing.
        AnnotationError: (in `samples`) annotations cannot be used; names file and line or entry.
        EmptyClassError: (in `samples`) a named class has no training example.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        format: Literal["coco", "voc", "yolo", "jsonl"] | None = None,
        image_root: str | Path | None = None,
        box_format: str = "xyxy",
        on_bad_box: Literal["raise", "drop"] = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        known = [reader.name for reader in READERS]
        if format is not None and format not in known:
            raise ConfigConflictError(f"Expected format to be null or one of {', '.join(known)}, found {format!r}.")
        if box_format not in BOX_FORMATS:
            raise ConfigConflictError(
                f"Expected box_format to be one of {', '.join(BOX_FORMATS)}, found {box_format!r}."
            )
        if on_bad_box not in ("raise", "drop"):
            raise ConfigConflictError(f"Expected on_bad_box raise or drop, found {on_bad_box!r}.")
        self.format, self.box_format, self.on_bad_box = format, box_format, on_bad_box
        self.image_root = None if image_root is None else Path(image_root).expanduser()

    @property
    def has_val(self) -> bool:
        """Whether there are validation pictures."""
        return "val" in self._contents

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class; without test pictures, those of validation."""
        if split == "test" and "test" not in self._contents and not self.has_val and self.val_shots is not None:
            return self.questions(self._held_out)
        return super().rows(split)

    def read(self, split: str) -> DetectionAnnotations:
        """See the base class."""
        if split not in self._contents:  # test pictures, or those of validation, or those of training
            return self.annotations("val" if split == "test" and self.has_val else "train")
        source, content = self._contents[split]
        categories = select_classes(self._categories, self.classes, source)
        ids = {name: category for category, name in categories.items()}
        data = DetectionAnnotations(name=f"custom/{split}", source=source, categories=categories)
        judge = _BoxJudge(source, self.on_bad_box == "drop")
        for picture in content.pictures:
            data.pictures[picture.id] = Picture(picture.path, picture.size, None)
            data.annotation_count += len(picture.things)
            for thing in picture.things:
                box = judge(thing, picture.size)
                if thing.label in ids:
                    found = data.objects.setdefault((picture.id, ids[thing.label]), CategoryObjects())
                    _add(found, thing, box)
        judge.warn()
        return data

    @cached_property
    def _contents(self) -> dict[str, tuple[Path, Content]]:
        """Split -> the file or folder it was read from, and what it holds."""
        reader, found = self._reader()
        contents = {split: (source, reader.read(source, name)) for split, (source, name) in found.items()}
        if reader.bad:
            warnings.warn(
                f"{len(reader.bad)} pictures of {self.root} cannot be used and are left out (data.on_bad_image is "
                f"skip): {'; '.join(reader.bad[:10])}",
                stacklevel=2,
            )
        _warn_about_shared(contents)
        return contents

    def _reader(self) -> tuple[Reader, dict[str, tuple[Path, str | None]]]:
        """The reader whose training files are there, and the files of the splits with the names these have there."""
        settings = (self.root, self.image_root, self.box_format, self.on_bad_image == "skip")
        readers = [kind(*settings) for kind in READERS if self.format in (None, kind.name)]
        fitting = [(reader, found) for reader in readers if "train" in (found := _find(reader))]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ConfigConflictError(
                f"{self.root} holds several formats: {', '.join(reader.name for reader, _ in fitting)}. Set "
                "data.format to the one to read."
            )
        there = sorted(path.name for path in self.root.iterdir())[:12] if self.root.is_dir() else []
        trees = "".join(f"\n  {reader.name}: {reader.tree}" for reader in readers)
        raise DatasetNotFoundError(
            f"No training pictures with boxes in {self.root}, which "
            f"{'holds ' + ', '.join(there) if there else 'is empty or does not exist'}. Expected one of{trees}\n"
            "with split train (or training), or without splits. The data set is yours to bring: set data.root "
            "to its folder."
        )

    @cached_property
    def _categories(self) -> dict[int, str]:
        """Category id -> name, the same in all splits."""
        tables = [(source, content.categories) for source, content in self._contents.values()]
        if any(table is None for _, table in tables):
            things = (t for _, content in self._contents.values() for p in content.pictures for t in p.things)
            return dict(enumerate(sorted({thing.label for thing in things}), start=1))
        first, expected = tables[0]
        for source, table in tables[1:]:
            if table != expected:
                raise AnnotationError(
                    f"{source} and {first} list other categories or other ids of them. Expected the same in all "
                    "splits; export them together."
                )
        return expected or {}


class _BoxJudge:
    """Cuts boxes at the border of their picture, refuses or drops impossible ones, and counts what it left out."""

    def __init__(self, source: Path, drop: bool) -> None:
        self.source, self.drop = source, drop
        self.flat: list[str] = []
        self.outside: list[str] = []

    def __call__(self, thing: Thing, size: tuple[int, int]) -> Box | None:
        """The box inside the picture; None if it is left out.

        Raises:
            AnnotationError: it is impossible.
        """
        x1, y1, x2, y2 = thing.box
        problem = _problem(thing.box, size)
        if problem is not None:
            if not self.drop:
                raise AnnotationError(
                    f"{thing.where}: the box {_written(thing.box)} (xyxy in pixels) of {thing.label!r} {problem} of "
                    f"{size[0]}x{size[1]} pixels. Is it another picture, or another box format than the one declared "
                    "(data.box_format)? Correct or remove it, or set data.on_bad_box to drop."
                )
            self.outside.append(thing.where)
            return None
        box = max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1]))
        if box[0] >= box[2] or box[1] >= box[3]:
            self.flat.append(thing.where)
            return None
        return box

    def warn(self) -> None:
        """Say what was left out."""
        for kind, places in (("without width or height", self.flat), ("that do not fit their picture", self.outside)):
            if places:
                warnings.warn(
                    f"Left out {len(places)} boxes {kind} of {self.source}, the first at {places[0]}.", stacklevel=2
                )


def _problem(box: Box, size: tuple[int, int]) -> str | None:
    """What makes a box impossible, in words."""
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)):
        return "is not finite in the picture"
    if x1 > x2 or y1 > y2:
        return "has swapped corners in the picture"
    over = (max(-x1, x2 - size[0]), size[0]), (max(-y1, y2 - size[1]), size[1])
    if any(by > max(_OVERSHOOT_PIXELS, _OVERSHOOT_SHARE * side) for by, side in over):
        return "leaves the picture"
    return None


def _add(found: CategoryObjects, thing: Thing, box: Box | None) -> None:
    """An object of a category; one whose box was left out is there, but not where."""
    if box is None:
        return
    area = thing.area if thing.area is not None else (box[2] - box[0]) * (box[3] - box[1])
    (found.ignore_boxes if thing.ignored else found.boxes).append(box)
    (found.ignore_areas if thing.ignored else found.areas).append(area)


def _find(reader: Reader) -> dict[str, tuple[Path, str | None]]:
    """Split -> file or folder, and the name that the split has there."""
    found: dict[str, tuple[Path, str | None]] = {}
    for split, names in _SPLITS.items():
        for name in names:
            source = reader.find(name)
            if source is not None and source not in {path for path, _ in found.values()}:
                found[split] = source, name
                break
    return found


def _warn_about_shared(contents: dict[str, tuple[Path, Content]]) -> None:
    trained = {picture.path.resolve() for picture in contents["train"][1].pictures}
    for split, (source, content) in contents.items():
        shared = [p.path for p in content.pictures if split != "train" and p.path.resolve() in trained]
        if shared:
            warnings.warn(
                f"{len(shared)} pictures of {source} are training pictures too, such as {shared[0]}: scores on them "
                "are no measure of unseen pictures.",
                stacklevel=2,
            )


def _written(box: Box) -> list[float]:
    return [round(value, 2) for value in box]


__all__ = ["CustomDetectionDataModule"]
