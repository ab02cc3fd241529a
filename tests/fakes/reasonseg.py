"""A tiny ReasonSeg tree in the true on-disk format, with the oddities of the real one.

Polygons with float corners labelled target, ignore or flag (a flag may be a line of two points), up to six texts in any
split, a file in cp1252, and no picture sizes anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

Point = list[float]
SIZES = {"monkey": (80, 60), "soup": (64, 64), "zoo": (70, 50), "cafe": (60, 50)}

SQUARE = [[10.0, 10.0], [30.0, 10.0], [30.0, 30.0], [10.0, 30.0]]
BAR = [[40.5, 20.25], [60.75, 20.25], [60.75, 24.5], [40.5, 24.5]]
SMALL = [[20.0, 40.0], [26.0, 40.0], [26.0, 46.0], [20.0, 46.0]]
LINE = [[1.0, 1.0], [50.0, 35.0]]
INNER = [[15.0, 15.0], [20.0, 15.0], [20.0, 20.0], [15.0, 20.0]]
# name -> (texts, sentence?, (label, points)); the same pictures in every split, under other names
SCENES: dict[str, tuple[list[str], bool, list[tuple[str, list[Point]]]]] = {
    "monkey": (
        ["what the monkey pierces its food with"],
        False,
        [("target", BAR), ("target", SQUARE), ("ignore", INNER)],
    ),
    "soup": ([f"Which tool scoops soup, wording {n}?" for n in range(6)], True, [("target", SQUARE)]),
    "zoo": (["Where do animals live?", "What cages them?"], True, [("flag", LINE), ("ignore", BAR), ("target", SMALL)]),
    "cafe": (["Où est le café \u2013 « ici » ?"], True, [("Target", SQUARE), ("target", SMALL)]),
}


def write_reasonseg(root: Path) -> Path:
    """Write ``ReasonSeg/{train,val,test,explanatory}/``; returns the folder ReasonSeg."""
    folder = root / "ReasonSeg"
    for split in ("train", "val", "test"):
        for name in SCENES:
            write_scene(folder / split, f"{split}_{name}", name)
    (folder / "explanatory").mkdir()
    (folder / "explanatory" / "train.json").write_text(
        json.dumps([{"query": "?", "outputs": "!", "image": "", "json": ""}])
    )
    return folder


def write_scene(folder: Path, stem: str, name: str) -> Path:
    """Write a picture and its annotation file; returns the latter."""
    texts, is_sentence, shapes = SCENES[name]
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", SIZES[name], (210, 215, len(stem) * 9 % 255))
    draw = ImageDraw.Draw(picture)
    for label, points in shapes:
        draw.polygon([tuple(point) for point in points], fill=(len(label) * 20, 60, 120))
    picture.save(folder / f"{stem}.jpg", quality=90)
    content = {"text": texts, "is_sentence": is_sentence, "shapes": [_shape(stem, *shape) for shape in shapes]}
    text = json.dumps(content, ensure_ascii=False)
    file = folder / f"{stem}.json"
    file.write_bytes(text.encode("cp1252" if name == "cafe" else "utf-8"))
    return file


def _shape(stem: str, label: str, points: list[Point]) -> dict[str, Any]:
    return {
        "label": label,
        "labels": [label],
        "shape_type": "polygon",
        "image_name": f"{stem}.jpg",
        "points": points,
        "group_id": None,
        "group_ids": [None],
        "flags": {},
    }
