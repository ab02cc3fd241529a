"""Readers of the user's own detection sets: COCO JSON, Pascal VOC XML, YOLO text, JSON lines."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rft_lightning.datamodules.coco_annotations import check_unique, not_listed
from rft_lightning.datamodules.detection import ImageId, picture_size
from rft_lightning.datamodules.detection_formats import (
    SUFFIXES,
    Content,
    Labelled,
    Reader,
    Thing,
    first_existing,
    parse_json,
    stated_size,
    to_xyxy,
)
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.metrics.ap_files import check_category_ids


class COCOReader(Reader):
    """COCO JSON: whole numbers (gaps too) and strings as ids, crowds as RLE."""

    name = "coco"
    tree = "annotations.json (or annotations/{split}.json, instances_{split}.json, {split}.json), images/"

    def find(self, split: str | None) -> Path | None:
        names = (
            ["annotations.json", "annotations/annotations.json", "annotations/instances.json",
             "annotations/instances_default.json", "instances.json", "result.json", "labels.json", "coco.json",
             "_annotations.coco.json"]
            if split is None
            else [f"annotations/instances_{split}.json", f"annotations/{split}.json", f"instances_{split}.json",
                  f"{split}.json", f"{split}/_annotations.coco.json", f"{split}/annotations.json"]
        )  # fmt: skip
        return first_existing(self.root / name for name in names)

    def read(self, source: Path, split: str | None) -> Content:
        content = parse_json(source.read_bytes(), str(source))
        try:
            entries, notes = list(content["images"]), list(content["annotations"])
            listed = list(content["categories"])
            check_unique("category id", (entry["id"] for entry in listed), source)
            check_unique("category name", (entry["name"] for entry in listed), source)
            check_unique("image id", (entry["id"] for entry in entries), source)
            check_unique("annotation id", (note["id"] for note in notes if "id" in note), source)
            names = {entry["id"]: str(entry["name"]) for entry in listed}
            _check_image_ids((entry["id"] for entry in entries), source)
            pictures = {entry["id"]: self.attempt(lambda e=entry: self._picture(e, split, source)) for entry in entries}
            for position, note in enumerate(notes):
                _add_note(note, f"{source}: annotations[{position}] (id {note.get('id')})", names, pictures)
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise AnnotationError(
                f"{source} is no usable COCO file ({problem}). Expected JSON with `images` (id, file_name), "
                "`annotations` (image_id, category_id, bbox) and `categories` (id, name)."
            ) from error
        return Content(
            _category_ids(names, source), _with_one_kind_of_ids(p for p in pictures.values() if p is not None)
        )

    def _picture(self, entry: Mapping[str, Any], split: str | None, source: Path) -> Labelled:
        where = f"{source}: image {entry['id']!r}"
        path = self.picture(str(entry["file_name"]), split, source, where)
        return Labelled(entry["id"], path, stated_size(path, entry.get("width"), entry.get("height"), where), where)


class VOCReader(Reader):
    """Pascal VOC XML: corners 1-based and inclusive; difficult objects are neither right nor wrong."""

    name = "voc"
    tree = "Annotations/*.xml, JPEGImages/, ImageSets/Main/{split}.txt (or {split}/*.xml beside the pictures)"

    def find(self, split: str | None) -> Path | None:
        if split is None:
            return first_existing((self.root / part for part in ("Annotations", "annotations", ".")), "*.xml")
        listed = self.root / "ImageSets" / "Main" / f"{split}.txt"
        folders = (self.root / part for part in (f"{split}/Annotations", f"{split}/annotations", split))
        return listed if listed.is_file() else first_existing(folders, "*.xml")

    def read(self, source: Path, split: str | None) -> Content:
        if source.is_dir():
            files = sorted(source.glob("*.xml"))
        else:
            names = [line.split()[0] for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
            check_unique("name", names, source)
            folder = self.root / "Annotations"
            files = [folder / f"{name}.xml" for name in names]
        pictures = [self.attempt(lambda f=file: self._read_file(f, split)) for file in files]
        return Content(None, [picture for picture in pictures if picture is not None])

    def _read_file(self, file: Path, split: str | None) -> Labelled:
        try:
            tree = ElementTree.fromstring(file.read_bytes())
            name = _text(tree, "filename")
            size = [int(float(tree.findtext(f"size/{key}") or 0)) or None for key in ("width", "height")]
            things = [
                _voc_thing(entry, f"{file}: object {number}")
                for number, entry in enumerate(tree.findall("object"), start=1)
            ]
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise AnnotationError(
                f"{file} is no usable VOC file ({error}). Expected <annotation> with <filename> and for each <object> "
                "<name> and <bndbox> of <xmin> <ymin> <xmax> <ymax>. Correct or remove it."
            ) from error
        path = self.picture(name, split, file, str(file))
        return Labelled(file.stem, path, stated_size(path, *size, str(file)), str(file), things)


class YOLOReader(Reader):
    """YOLO: one text file per picture with lines ``class cx cy w h`` in 0 to 1; names in data.yaml or classes.txt."""

    name = "yolo"
    tree = "data.yaml or classes.txt, images/{split}/, labels/{split}/*.txt (or {split}/images/, {split}/labels/)"

    def find(self, split: str | None) -> Path | None:
        if self._names_file() is None:
            return None
        parts = ["images"] if split is None else [f"images/{split}", f"{split}/images"]
        return first_existing(folder for folder in (self.root / part for part in parts) if _pictures_in(folder))

    def read(self, source: Path, split: str | None) -> Content:
        names = self._names()
        parts = list(source.relative_to(self.root).parts)
        parts[parts.index("images")] = "labels"  # ultralytics' rule: the same path with labels for images
        folder = self.root.joinpath(*parts)
        found = _pictures_in(source)
        check_unique("picture (name without its suffix)", (path.stem for path in found), source)
        pictures = {path.stem: path for path in found}
        lost = sorted(f for f in folder.glob("*.txt") if f.stem not in pictures and f.name != "classes.txt")
        if lost:
            raise DatasetNotFoundError(
                f"{len(lost)} label files have no picture of the same name in {source}, the first is {lost[0]}. "
                "Restore the pictures, or remove the label files."
            )
        read = [
            self.attempt(lambda p=path: _yolo_picture(p, folder / f"{p.stem}.txt", names)) for path in pictures.values()
        ]
        return Content(names, [picture for picture in read if picture is not None])

    def _names_file(self) -> Path | None:
        names = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "labels/classes.txt", "obj.names")
        return first_existing(self.root / name for name in names)

    def _names(self) -> dict[int, str]:
        file = self._names_file()
        assert file is not None
        if file.suffix not in (".yaml", ".yml"):
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            names = {number: line for number, line in enumerate(lines) if line}
        else:
            try:
                listed = yaml.safe_load(file.read_text(encoding="utf-8"))["names"]
                names = {int(k): str(v) for k, v in (listed.items() if isinstance(listed, dict) else enumerate(listed))}
            except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
                raise AnnotationError(f"{file} states no class names ({error}). Expected `names`: a list.") from error
        check_unique("class name", names.values(), file)
        return names


class JSONLReader(Reader):
    """JSON lines: {"image": path, "boxes": [[...], ...], "labels": [...]}, boxes in the declared `box_format`."""

    name = "jsonl"
    tree = '{split}.jsonl (or one *.jsonl) of {"image": path, "boxes": [[x1, y1, x2, y2], ...], "labels": [name, ...]}'

    def find(self, split: str | None) -> Path | None:
        if split is not None:
            return first_existing(self.root / name for name in (f"{split}.jsonl", f"annotations/{split}.jsonl"))
        files = sorted(self.root.glob("*.jsonl")) if self.root.is_dir() else []
        named = [file for file in files if file.name == "annotations.jsonl"]
        return named[0] if named else files[0] if len(files) == 1 else None

    def read(self, source: Path, split: str | None) -> Content:
        pictures: dict[ImageId, Labelled] = {}
        for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{source}:{number}"
            entry = parse_json(line, where)
            picture = self.attempt(lambda e=entry, w=where: self._read_line(e, split, source, w))
            if picture is None:
                continue
            if picture.id in pictures:
                raise AnnotationError(
                    f"{where} is about the picture {picture.id!r} once more, after {pictures[picture.id].where}. Put "
                    "all its boxes on one line."
                )
            pictures[picture.id] = picture
        return Content(None, list(pictures.values()))

    def _read_line(self, entry: Any, split: str | None, source: Path, where: str) -> Labelled:
        try:
            name, boxes, labels = str(entry["image"]), list(entry["boxes"]), list(entry["labels"])
            if len(boxes) != len(labels):
                raise ValueError(f"{len(boxes)} boxes and {len(labels)} labels")
            path = self.picture(name, split, source, where)
            size = stated_size(path, entry.get("width"), entry.get("height"), where)
            things = [
                Thing(str(label), to_xyxy(box, self.box_format, size), f"{where}: box {i}")
                for i, (box, label) in enumerate(zip(boxes, labels, strict=True), start=1)
            ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, AnnotationError | DatasetNotFoundError | ConfigConflictError):
                raise
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise AnnotationError(f"{where} cannot be used ({problem}). Expected {self.tree}.") from error
        return Labelled(name, path, size, where, things)


READERS: tuple[type[Reader], ...] = (COCOReader, VOCReader, YOLOReader, JSONLReader)


def _add_note(
    note: Mapping[str, Any], where: str, names: Mapping[Any, str], pictures: Mapping[Any, Labelled | None]
) -> None:
    for kind, value, known in (("image", note["image_id"], pictures), ("category", note["category_id"], names)):
        if value not in known:
            raise AnnotationError(not_listed(where, kind, value))
    picture = pictures[note["image_id"]]
    if picture is None:
        return
    try:
        box = to_xyxy(note["bbox"], "xywh", picture.size)
        area = float(note["area"]) if note.get("area") is not None else None
    except (KeyError, TypeError, ValueError) as error:
        raise AnnotationError(
            f"{where} has bbox {note.get('bbox')!r} and area {note.get('area')!r}; expected [x, y, width, height] and "
            "a number, in pixels. Correct or remove it."
        ) from error
    label = names[note["category_id"]]
    picture.things.append(Thing(label, box, where, area, bool(note.get("iscrowd", 0))))


def _voc_thing(entry: ElementTree.Element, where: str) -> Thing:
    x1, y1, x2, y2 = (float(_text(entry, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    # Pixel 1 is the first and the last one belongs to the box, which in half-open pixels ends where it ends.
    return Thing(_text(entry, "name"), (x1 - 1, y1 - 1, x2, y2), where, ignored=entry.findtext("difficult") == "1")


def _text(entry: ElementTree.Element, path: str) -> str:
    value = (entry.findtext(path) or "").strip()
    if not value:
        raise ValueError(f"<{path}> is missing")
    return value


def _yolo_picture(path: Path, file: Path, names: Mapping[int, str]) -> Labelled:
    picture = Labelled(path.stem, path, picture_size(path), str(file))
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []  # none: a picture without objects
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            category, *box = line.split()
            picture.things.append(Thing(names[int(category)], to_xyxy(box, "cxcywh_norm", picture.size), where))
        except KeyError as error:
            raise AnnotationError(
                f"{where} is of class {error}, but there are names for {len(names)} classes, from 0. Add its name or "
                "correct the line."
            ) from error
        except ValueError as error:
            raise AnnotationError(
                f"{where} is {line[:60]!r}; expected five numbers, class cx cy w h, the last four in 0 to 1."
            ) from error
    return picture


def _category_ids(names: Mapping[Any, str], source: Path) -> dict[int, str]:
    """Ids as they are if they are integers; else 1, 2, ... in the order of the file."""
    if all(type(key) is int for key in names):
        check_category_ids(({"id": key, "name": name} for key, name in names.items()), str(source))
        return dict(sorted(names.items()))
    return dict(enumerate(names.values(), start=1))


def _with_one_kind_of_ids(pictures: Iterable[Labelled]) -> list[Labelled]:
    """Ids that are all integers or all strings, so that they can be sorted; 3.0 is 3."""
    pictures = list(pictures)
    strings = any(isinstance(picture.id, str) for picture in pictures)
    for picture in pictures:
        picture.id = _string_id(picture.id) if strings else int(picture.id)
    return pictures


def _string_id(value: ImageId) -> str:
    return value if isinstance(value, str) else str(int(value))


def _check_image_ids(ids: Iterable[Any], source: Path) -> None:
    """See that ids are strings and whole numbers, and differ where all of them become strings.

    Raises:
        AnnotationError: they are not.
    """
    found = list(ids)
    for value in found:
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not value.is_integer()):
            raise AnnotationError(
                f"{source} has the image id {value!r}; expected a whole number or a string. Number the images, here "
                "and in the annotations."
            )
    check_unique("image id", map(_string_id, found), source)


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []


__all__ = ["READERS", "COCOReader", "JSONLReader", "VOCReader", "YOLOReader"]
