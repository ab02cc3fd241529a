"""The same few pictures with boxes in the formats that people bring: COCO JSON, Pascal VOC XML, YOLO, JSON lines.

Nine training pictures and three each for validation and test, of sizes that differ, with two classes whose names hold
spaces and dashes; one picture shows nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

NAMES = ["slime", "feline-or-canid", "big bird"]
SPLITS = {"train": range(9), "val": range(9, 12), "test": range(12, 15)}
# Corners in whole pixels, so that every format can write them exactly; (class, x1, y1, x2, y2), half-open
Thing = tuple[str, int, int, int, int]


def size(number: int) -> tuple[int, int]:
    """(width, height) of a picture: powers of two, so that shares of them are exact."""
    return (64, 32) if number % 2 else (32, 64)


def things(number: int) -> list[Thing]:
    """What a picture shows."""
    if number == 8:
        return []
    found = [(NAMES[number % 3], 2 + number % 4, 4, 20, 28)]
    if number % 3 == 0:
        found.append((NAMES[number % 3], 20, 6, 30, 20))
    if number % 4 == 1:
        found.append((NAMES[(number + 1) % 3], 0, 0, 32, 32))
    return found


def draw(path: Path, number: int) -> None:
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size(number), (210, 215, number * 15))
    pen = ImageDraw.Draw(picture)
    for name, *box in things(number):
        pen.rectangle(box, fill=(NAMES.index(name) * 80, number * 10, 90))
    picture.save(path, quality=90)


def write_coco(root: Path, splits: Sequence[str | None] = tuple(SPLITS), ids: Sequence[Any] = (7, 1000, 3)) -> Path:
    """``annotations/instances_{split}.json`` or ``annotations.json``, pictures in images/; `ids` of categories."""
    for split in splits:
        file = root / (f"annotations/instances_{split}.json" if split else "annotations.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        numbers = _numbers(split)
        for number in numbers:
            draw(root / "images" / f"{number:03}.jpg", number)
        boxes = [(number, thing) for number in numbers for thing in things(number)]
        content = {
            "images": [
                {"id": n * 11 + 5, "file_name": f"{n:03}.jpg", "width": size(n)[0], "height": size(n)[1]}
                for n in numbers
            ],
            "annotations": [
                {
                    "id": position,
                    "image_id": number * 11 + 5,
                    "category_id": ids[NAMES.index(name)],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
                for position, (number, (name, x1, y1, x2, y2)) in enumerate(boxes, start=1)
            ],
            "categories": [
                {"id": key, "name": name, "supercategory": ""} for key, name in zip(ids, NAMES, strict=True)
            ],
        }
        file.write_text(json.dumps(content))
    return root


def write_voc(root: Path, splits: Sequence[str | None] = tuple(SPLITS)) -> Path:
    """``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/{split}.txt``."""
    (root / "Annotations").mkdir(parents=True)
    for split in splits:
        for number in _numbers(split):
            draw(root / "JPEGImages" / f"{number:03}.jpg", number)
            (root / "Annotations" / f"{number:03}.xml").write_text(voc_xml(number))
        if split is not None:
            file = root / "ImageSets" / "Main" / f"{split}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{number:03}\n" for number in _numbers(split)))
    return root


def voc_xml(number: int) -> str:
    """A VOC file: corners start at 1, and the last pixel belongs to the box."""
    objects = "".join(
        f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        f"<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in things(number)
    )
    width, height = size(number)
    return (
        f"<annotation><folder>mine</folder><filename>{number:03}.jpg</filename><size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"
    )


def write_yolo(root: Path, splits: Sequence[str | None] = tuple(SPLITS), folders_first: bool = False) -> Path:
    """``images/{split}/``, ``labels/{split}/`` (or ``{split}/images/``) and ``data.yaml``."""
    for split in splits:
        parts = {kind: f"{split}/{kind}" if folders_first else f"{kind}/{split or ''}" for kind in ("images", "labels")}
        for number in _numbers(split):
            draw(root / parts["images"] / f"{number:03}.jpg", number)
            lines = [yolo_line(thing, size(number)) for thing in things(number)]
            file = root / parts["labels"] / f"{number:03}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            if lines:  # a picture without objects has no file
                file.write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/train\nnames:\n  0: slime\n  1: feline-or-canid\n  2: big bird\n"
    )
    return root


def yolo_line(thing: Thing, of: tuple[int, int]) -> str:
    """Class number, centre, width and height in shares of the picture."""
    name, x1, y1, x2, y2 = thing
    numbers = (x1 + x2) / 2 / of[0], (y1 + y2) / 2 / of[1], (x2 - x1) / of[0], (y2 - y1) / of[1]
    return " ".join(map(str, (NAMES.index(name), *numbers)))


def write_jsonl(
    root: Path,
    splits: Sequence[str | None] = tuple(SPLITS),
    write_box: Callable[[Sequence[int], tuple[int, int]], list[float]] = lambda box, of: list(box),
) -> Path:
    """``{split}.jsonl`` or ``mine.jsonl``, boxes as `write_box` says, xyxy in pixels by default."""
    for split in splits:
        lines = []
        for number in _numbers(split):
            draw(root / "images" / f"{number:03}.jpg", number)
            boxes = [write_box(box, size(number)) for _, *box in things(number)]
            labels = [name for name, *_ in things(number)]
            lines.append(json.dumps({"image": f"{number:03}.jpg", "boxes": boxes, "labels": labels}))
        (root / f"{split or 'mine'}.jsonl").write_text("\n".join(lines) + "\n")
    return root


WRITERS: dict[str, Callable[..., Path]] = {
    "coco": write_coco,
    "voc": write_voc,
    "yolo": write_yolo,
    "jsonl": write_jsonl,
}


def _numbers(split: str | None) -> range:
    return SPLITS[split or "train"]
