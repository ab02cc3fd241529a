"""A tiny LVIS v1 tree in the true on-disk format.

Pictures of train2017 and val2017, named by `coco_url` alone; two of the four validation pictures are in train2017.
Categories have the ids, names and frequencies of LVIS v1; `papaya` is in a single training picture, `omelet` in none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

# id -> (name, frequency)
CATEGORIES = {
    207: ("car_(automobile)", "f"),
    365: ("die", "r"),
    733: ("omelet", "r"),
    755: ("papaya", "r"),
    793: ("person", "f"),
    1012: ("stepladder", "r"),
    1062: ("teapot", "c"),
}
# split -> image id -> (folder, size, boxes by category, negatives, not exhaustive)
Entry = tuple[str, tuple[int, int], dict[int, list[list[float]]], list[int], list[int]]
PICTURES: dict[str, dict[int, Entry]] = {
    "train": {
        101: (
            "train2017",
            (60, 40),
            {365: [[4, 5, 20.5, 10.25], [30, 8, 20, 22]], 793: [[1, 1, 30, 30]]},
            [1012],
            [793],
        ),
        102: ("train2017", (40, 60), {365: [[5, 5, 20, 20]], 1062: [[20, 30, 15, 15]]}, [755, 1012], []),
        103: ("train2017", (50, 50), {365: [[-2.5, 30, 20, 25]]}, [733], []),
        104: ("train2017", (48, 36), {755: [[2, 2, 20, 20]], 207: [[20, 10, 20, 20]]}, [365], [755]),
        105: ("train2017", (36, 48), {1012: [[2, 2, 30, 40]]}, [365, 755], []),
        106: ("train2017", (52, 44), {1012: [[5, 5, 20, 30]], 733: [[40, 20, 0, 5]]}, [], []),
        107: ("train2017", (44, 44), {1012: [[8, 2, 20, 40]]}, [793, 365], []),
    },
    "val": {
        201: ("train2017", (60, 44), {365: [[10, 10, 20, 20]]}, [755, 793], []),
        202: ("val2017", (44, 60), {755: [[5, 5, 15, 25]], 793: [[20, 20, 20, 30]]}, [365], [755]),
        203: ("val2017", (50, 40), {1012: [[5, 5, 30, 30]]}, [733], []),
        204: ("train2017", (40, 40), {207: [[5, 5, 30, 30]]}, [1012], []),
    },
}


def write_lvis(root: Path) -> Path:
    """Write ``lvis/annotations/`` and ``coco/``; returns the annotation folder."""
    folder = root / "lvis" / "annotations"
    folder.mkdir(parents=True)
    for split, pictures in PICTURES.items():
        (folder / f"lvis_v1_{split}.json").write_text(json.dumps(content(split)))
        for image, (place, size, objects, _, _) in pictures.items():
            _draw(root / "coco" / place / f"{image:012}.jpg", image, size, objects)
    return folder


def content(split: str) -> dict[str, Any]:
    """The content of the annotation file of a split."""
    boxes = [
        (image, category, box)
        for image, (_, _, objects, _, _) in PICTURES[split].items()
        for category, found in objects.items()
        for box in found
    ]
    return {
        "info": {"description": "Rendered fake of LVIS v1", "version": "1", "year": 2020},
        "licenses": [{"id": 1, "name": "none", "url": "http://localhost"}],
        "images": [_image(image, entry) for image, entry in PICTURES[split].items()],
        "annotations": [_annotation(number, *row) for number, row in enumerate(boxes, start=1)],
        "categories": [_category(*item) for item in reversed(CATEGORIES.items())],
    }


def _image(image: int, entry: Entry) -> dict[str, Any]:
    folder, (width, height), _, negative, not_exhaustive = entry
    return {
        "id": image,
        "width": width,
        "height": height,
        "license": 1,
        "coco_url": f"http://images.cocodataset.org/{folder}/{image:012}.jpg",
        "flickr_url": "http://localhost",
        "date_captured": "2013-11-14 17:02:52",
        "neg_category_ids": negative,
        "not_exhaustive_category_ids": not_exhaustive,
    }


def _annotation(number: int, image: int, category: int, box: list[float]) -> dict[str, Any]:
    x, y, width, height = box
    outline = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": width * height * 0.75,
        "segmentation": [outline],
    }


def _category(number: int, entry: tuple[str, str]) -> dict[str, Any]:
    name, frequency = entry
    counts = {"r": 5, "c": 50, "f": 500}
    return {
        "id": number,
        "name": name,
        "frequency": frequency,
        "image_count": counts[frequency],
        "instance_count": counts[frequency],
        "synset": f"{name}.n.01",
        "synonyms": [name],
        "def": "rendered",
    }


def _draw(path: Path, image: int, size: tuple[int, int], objects: dict[int, list[list[float]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, (210, 215, image % 255))
    draw = ImageDraw.Draw(picture)
    for category, boxes in objects.items():
        for x, y, width, height in boxes:
            draw.rectangle((x, y, x + width, y + height), fill=(category % 200, 90, image % 200))
    picture.save(path, quality=90)
