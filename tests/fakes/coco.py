"""A tiny COCO tree in the true on-disk format, with the oddities of the real one.

Seven pictures with gaps between their ids, listed in no order: one without annotations (61), one stored in grey (285),
one with an EXIF rotation that COCO does not apply (42). Annotations: crowds with RLE masks (25, 42, 139), a box that
passes the border (30), one without width (30). Of the seven categories `car` is never annotated and `toothbrush` only
as a crowd.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = {1: "person", 3: "car", 6: "bus", 17: "cat", 18: "dog", 27: "backpack", 90: "toothbrush"}
SIZES = {285: (60, 44), 9: (64, 48), 139: (80, 60), 30: (64, 64), 61: (50, 40), 25: (48, 64), 42: (72, 48)}
# (annotation id, image id, category, xywh, iscrowd)
ANNOTATIONS: list[tuple[int, int, str, list[float], int]] = [
    (1001, 9, "cat", [4, 5, 20.5, 30.25], 0),
    (1002, 9, "dog", [30, 8, 25, 32], 0),
    (1005, 9, "cat", [40, 2, 12, 10], 0),
    (1010, 25, "cat", [10, 20, 30, 40], 0),
    (900100000025, 25, "bus", [2, 2, 44, 12], 1),
    (1015, 30, "cat", [-2.5, 10, 30, 60.25], 0),
    (1016, 30, "dog", [10, 10, 0, 5], 0),
    (1020, 42, "dog", [5, 6, 20, 30], 0),
    (1021, 42, "cat", [40, 6, 24, 30], 0),
    (900100000042, 42, "cat", [0, 36, 72, 12], 1),
    (1030, 139, "bus", [20, 10, 50, 40], 0),
    (1031, 139, "person", [2, 10, 10, 40], 0),
    (900100000139, 139, "toothbrush", [60, 50, 15, 8], 1),
    (1040, 285, "cat", [6, 6, 30, 30], 0),
    (1041, 285, "person", [38, 4, 18, 38], 0),
    (1042, 285, "backpack", [40, 12, 8, 10], 0),
]
GREY, ROTATED = 285, 42
MASK_SHARE = 0.75  # areas are areas of masks, smaller than the boxes


def write_coco(root: Path, split: str = "val2017") -> Path:
    """Write one split of the tree, ``{train,val}{2014,2017}``; returns its annotation file."""
    folder = root / split
    folder.mkdir(parents=True)
    for image in SIZES:
        _draw(folder / file_name(split, image), image)
    content = {
        "info": {"description": "Rendered fake of COCO", "version": "1.0", "year": int(split[-4:])},
        "licenses": [{"id": 1, "name": "none", "url": "http://localhost"}],
        "images": [_image(split, image) for image in SIZES],
        "annotations": [_annotation(*row) for row in ANNOTATIONS],
        "categories": [{"supercategory": "thing", "id": key, "name": name} for key, name in CATEGORIES.items()],
    }
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of an annotation file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def file_name(split: str, image: int) -> str:
    """Name of a picture: the tree of 2014 repeats the split in it."""
    return f"COCO_{split}_{image:012}.jpg" if split.endswith("2014") else f"{image:012}.jpg"


def _image(split: str, image: int) -> dict[str, Any]:
    width, height = SIZES[image]
    name = file_name(split, image)
    return {
        "license": 1,
        "file_name": name,
        "coco_url": f"http://localhost/{split}/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 17:02:52",
        "id": image,
    }


def _annotation(number: int, image: int, name: str, box: list[float], crowd: int) -> dict[str, Any]:
    x, y, width, height = box
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {
        "segmentation": _rle(image, box) if crowd else [corners],
        "area": width * height * MASK_SHARE,
        "iscrowd": crowd,
        "image_id": image,
        "bbox": box,
        "category_id": next(key for key, value in CATEGORIES.items() if value == name),
        "id": number,
    }


def _rle(image: int, box: list[float]) -> dict[str, Any]:
    """The uncompressed run lengths of a filled box, column by column, starting with zeros."""
    width, height = SIZES[image]
    x, y, w, h = (int(value) for value in box)
    mask = np.zeros((height, width), dtype=np.int8)
    mask[y : y + h, x : x + w] = 1
    column = np.concatenate([[0], mask.ravel(order="F")])
    edges = np.concatenate([[0], np.flatnonzero(np.diff(column)), [mask.size]])
    return {"counts": np.diff(edges).tolist(), "size": [height, width]}


def _draw(path: Path, image: int) -> None:
    picture = Image.new("RGB", SIZES[image], (210, 215, 220))
    draw = ImageDraw.Draw(picture)
    for number, owner, _, (x, y, width, height), _ in ANNOTATIONS:
        if owner == image and width:
            draw.rectangle((x, y, x + width, y + height), fill=(number % 200, number * 7 % 200, number * 13 % 200))
    options = {}
    if image == ROTATED:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees for display
        options["exif"] = exif
    (picture.convert("L") if image == GREY else picture).save(path, quality=90, **options)
