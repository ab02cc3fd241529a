"""Tiny copies of the classification sets in their true on-disk format, with the oddities of the real ones.

Every set has three classes with four training pictures each, and one or two of the others; pictures are 28 to 40 pixels
wide, and each is different.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

FLOWERS = {12: "colt's foot", 60: "pink-yellow dahlia?", 74: "rose"}
PETS = {1: "Abyssinian", 2: "american_bulldog", 13: "english_cocker_spaniel"}
AIRCRAFT = {"707-320": "Boeing 707", "F-16A/B": "F-16", "Boeing 717": "Boeing 717"}
CARS = ["AM General Hummer SUV 2000", "Audi TTS Coupe 2012", "Ram C/V Cargo Van Minivan 2012"]
PER_SPLIT = {"train": 4, "val": 2, "test": 2}


def draw(path: Path, number: int, size: tuple[int, int] = (36, 28), **options) -> Path:
    """A picture that no other number has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 53 % 256))
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(path, **options)
    return path


# Flowers-102 ---------------------------------------------------------------------------------------------------------


def write_flowers(root: Path) -> Path:
    """jpg/ and the two .mat files: picture numbers from 1, labels as a row vector of bytes."""
    labels = [label for label in FLOWERS for _ in range(sum(PER_SPLIT.values()))]
    sets: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for number in range(1, len(labels) + 1):
        draw(root / f"jpg/image_{number:05}.jpg", number)
        place = (number - 1) % 8
        sets["train" if place < 4 else "val" if place < 6 else "test"].append(number)
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    names = {"trnid": "train", "valid": "val", "tstid": "test"}
    savemat(root / "setid.mat", {key: np.array([sets[split]], np.uint16) for key, split in names.items()})
    return root


def write_coop_flowers(root: Path) -> Path:
    """CoOp's split of the same pictures: across the official ones, names as in its cat_to_name.json."""
    splits: dict[str, list] = {"train": [], "val": [], "test": []}
    for place, (label, name) in enumerate(FLOWERS.items()):
        for number in range(8):
            split = "test" if number < 2 else "val" if number < 4 else "train"
            splits[split].append([f"image_{place * 8 + number + 1:05}.jpg", label - 1, name.rstrip("?")])
    return write_split(root / "split_zhou_OxfordFlowers.json", splits)


def write_split(file: Path, splits: dict[str, list]) -> Path:
    """A split file of CoOp's form."""
    file.write_text(json.dumps(splits, indent=4))
    return file


# Pets ----------------------------------------------------------------------------------------------------------------


def write_pets(root: Path) -> Path:
    """images/ with a PNG and a GIF named .jpg and a .mat; lists with and without comment lines."""
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for label, breed in PETS.items():
        for number in range(1, 9):
            name = f"{breed}_{number}"
            options = {"format": "PNG"} if (label, number) == (1, 7) else {"format": "JPEG"}
            draw(root / f"images/{name}.jpg", label * 10 + number, **options)
            lines["trainval" if number < 6 else "test"].append(f"{name} {label} {1 if breed[0].isupper() else 2} 1")
    Image.new("RGBA", (30, 30), (10, 20, 30, 0)).save(root / "images/Abyssinian_6.jpg", format="PNG")
    Image.new("P", (30, 30), 3).save(root / "images/Abyssinian_34.jpg", format="GIF")
    (root / "images/Abyssinian_101.mat").write_bytes(b"junk")
    (root / "annotations").mkdir()
    for name, entries in lines.items():
        (root / f"annotations/{name}.txt").write_text("\n".join(entries) + "\n")
    head = "#Image CLASS-ID SPECIES BREED ID\n#ID: 1:37 Class ids\n"
    (root / "annotations/list.txt").write_text(head + "\n".join(lines["trainval"] + lines["test"]) + "\n")
    return root


# FGVC-Aircraft -------------------------------------------------------------------------------------------------------


def write_aircraft(root: Path) -> Path:
    """The content of data/: names with spaces and slashes, picture ids with leading zeros, a grey banner of 20 rows."""
    root.mkdir(parents=True, exist_ok=True)
    families = list(dict.fromkeys(AIRCRAFT.values()))
    makers = ["Boeing", "Lockheed Martin"]
    for name, values in (("variants", AIRCRAFT), ("families", families), ("manufacturers", makers)):
        (root / f"{name}.txt").write_text("\n".join(values) + "\n")
    lists: dict[tuple[str, str], list[str]] = {}
    for place, (variant, family) in enumerate(AIRCRAFT.items()):
        for number in range(8):
            split = "train" if number < 4 else "val" if number < 6 else "test"
            picture = f"{place * 8 + number + 1:07}"
            draw(root / f"images/{picture}.jpg", place * 8 + number, size=(40, 60))
            maker = makers[variant == "F-16A/B"]
            for level, label in (("variant", variant), ("family", family), ("manufacturer", maker)):
                lists.setdefault((level, split), []).append(f"{picture} {label}")
    for (level, split), lines in lists.items():
        (root / f"images_{level}_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


# Stanford Cars -------------------------------------------------------------------------------------------------------


def car_rows(split: str) -> list[tuple[str, int]]:
    """(file name, class from 1) of a split; the names repeat in the other one."""
    classes = [label for _ in range(5 if split == "train" else 2) for label in range(1, len(CARS) + 1)]
    return [(f"{number:05}.jpg", label) for number, label in enumerate(classes, start=1)]


def write_car_pictures(root: Path, double: bool = False) -> Path:
    """cars_train/ and cars_test/, or each in a folder of the same name."""
    for offset, split in enumerate(("train", "test")):
        folder = root / f"cars_{split}"
        for number, (name, _) in enumerate(car_rows(split)):
            path = draw((folder / folder.name if double else folder) / name, offset * 50 + number)
            if number == 1:
                Image.open(path).convert("L").save(path)
    return root


def write_car_labels(devkit: Path, with_labels: Path | None) -> None:
    """The devkit's .mat files, and the labels of the test pictures."""
    devkit.mkdir(parents=True, exist_ok=True)
    savemat(devkit / "cars_meta.mat", {"class_names": np.array([CARS], object)})
    savemat(devkit / "cars_train_annos.mat", {"annotations": _struct(car_rows("train"), ("fname", "class"))})
    savemat(devkit / "cars_test_annos.mat", {"annotations": _struct(car_rows("test"), ("fname",))})
    if with_labels is not None:
        savemat(with_labels, {"annotations": _struct(car_rows("test"), ("fname", "class"))})


def write_car_ims(root: Path) -> Path:
    """car_ims/ and cars_annos.mat, which holds the class names, too."""
    rows = []
    for split in ("train", "test"):
        for _, label in car_rows(split):
            path = f"car_ims/{len(rows) + 1:06}.jpg"
            draw(root / path, len(rows))
            rows.append((path, label, int(split == "test")))
    notes = _struct(rows, ("relative_im_path", "class", "test"))
    savemat(root / "cars_annos.mat", {"annotations": notes, "class_names": np.array([CARS], object)})
    return root


def write_cars_by_class(root: Path) -> Path:
    """train/<class>/ and test/<class>/; a folder's name has no slash."""
    for offset, split in enumerate(("train", "test")):
        for number, (name, label) in enumerate(car_rows(split)):
            draw(root / split / CARS[label - 1].replace("/", "-") / name, offset * 50 + number)
    return root


def write_coop_cars(root: Path) -> Path:
    """CoOp's split of the official tree: the year comes first in a name."""
    names = [f"{name[-4:]} {name[:-5]}" for name in CARS]
    splits: dict[str, list] = {"train": [], "val": [], "test": []}
    for split in ("train", "test"):
        for number, (name, label) in enumerate(car_rows(split)):
            part = "val" if split == "train" and number >= 12 else split
            splits[part].append([f"cars_{split}/{name}", label - 1, names[label - 1]])
    return write_split(root / "split_zhou_StanfordCars.json", splits)


def _struct(rows: Iterable[Sequence], fields: Sequence[str]) -> np.ndarray:
    """A MATLAB struct array with box corners and `fields`."""
    corners = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    rows = list(rows)
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in (*corners, *fields)])
    for place, row in enumerate(rows):
        array[0, place] = (2, 3, 20, 21, *row[: len(fields)])
    return array


# A user's own --------------------------------------------------------------------------------------------------------

MUSHROOMS = ["fly agaric", "Boletus", "Chanterelle_1"]


def write_class_folders(root: Path, splits: Sequence[str] = ("train", "val", "test")) -> Path:
    """<split>/<class>/*.jpg, or <class>/*.jpg for the split "."; with subfolders, hidden files and other files."""
    number = 0
    for split in splits:
        for name in MUSHROOMS:
            for which in range(PER_SPLIT.get(split, 6)):
                number += 1
                folder = root / split / name
                draw(folder / ("more" if which == 1 else ".") / f"{which}.{'png' if which == 2 else 'JPG'}", number)
            (folder / "notes.txt").write_text("no picture")
            draw(folder / "._0.jpg", 0)
    return root


def write_csv(root: Path, files: dict[str, Sequence[str]]) -> Path:
    """CSV files that name their pictures; more than one split in a file brings a column split."""
    number = 0
    for file, splits in files.items():
        with (root / file).open("w", newline="", encoding="utf-8-sig") as lines:
            writer = csv.writer(lines)
            writer.writerow(["id", "path", "label", *["split"] * (len(splits) > 1)])
            for split in splits:
                for which in range(PER_SPLIT[split] * len(MUSHROOMS)):
                    number += 1
                    draw(root / f"pictures/{number}.jpg", number)
                    row = [number, f"pictures/{number}.jpg", MUSHROOMS[which % 3], split]
                    writer.writerow(row[: 3 + (len(splits) > 1)])
    return root
