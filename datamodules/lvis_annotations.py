"""LVIS annotation files as flat arrays, which are kept beside the file: parsing a gigabyte of JSON takes minutes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rft_lightning.datamodules import annotation_cache
from rft_lightning.datamodules.coco_annotations import CategoryObjects, Picture, check_unique, not_listed
from rft_lightning.datamodules.detection import DetectionAnnotations, ImageId, Pair
from rft_lightning.errors import AnnotationError

SOURCE = "lvis_v1_{train,val}.json.zip from https://www.lvisdataset.org/dataset, pictures from https://cocodataset.org"

# Number of the form of the arrays; raised for new checks as well, a cache is not checked again.
_CACHE_VERSION = 2

Arrays = Mapping[str, np.ndarray]
# Which categories are asked for: (category id -> name, category id -> frequency) -> category id -> name.
Select = Callable[[dict[int, str], dict[int, str]], dict[int, str]]


def read_lvis(
    file: Path, split: str, folder: Path, select: Select, keep: Callable[[str], bool] | None = None
) -> DetectionAnnotations:
    """The content of an LVIS file about some categories, without its masks.

    Args:
        file: the annotation file.
        split: the split as it is called in sample ids, ``train`` or the like.
        folder: the folder with train2017/ and val2017/.
        select: which categories.
        keep: which pictures, by their path below `folder`; None for all.

    Raises:
        AnnotationError: the file cannot be used.
    """
    before = annotation_cache.state(file)
    arrays = annotation_cache.load(file, _CACHE_VERSION)
    if arrays is None:
        arrays = _parse(file, split)
        annotation_cache.store(file, _CACHE_VERSION, arrays, before)
    names = _pairs_of(arrays, "category_ids", "category_names")
    frequency = _pairs_of(arrays, "category_ids", "category_frequencies")
    categories = select(names, frequency)
    paths, sizes = arrays["image_paths"].tolist(), arrays["image_sizes"].tolist()
    pictures: dict[ImageId, Picture] = {
        image: Picture(folder / path, (width, height), None)
        for image, path, (width, height) in zip(arrays["image_ids"].tolist(), paths, sizes, strict=True)
        if keep is None or keep(path)
    }
    absent: dict[ImageId, set[int]] = {}
    for image, category in _about(arrays["negative"], categories):
        absent.setdefault(image, set()).add(category)
    return DetectionAnnotations(
        name=f"lvis/{split}",
        source=file,
        categories=categories,
        pictures=pictures,
        objects=_objects(arrays, categories, pictures),
        absent={image: frozenset(found) for image, found in absent.items()},
        not_exhaustive=set(_about(arrays["not_exhaustive"], categories)),
        frequency={category: frequency[category] for category in categories},
        annotation_count=len(arrays["pairs"]),
    )


def _objects(
    arrays: Arrays, categories: Mapping[int, str], pictures: Mapping[ImageId, Picture]
) -> dict[Pair, CategoryObjects]:
    """What is annotated of the categories: boxes cut at the border of the picture; those without area are left out."""
    rows = np.isin(arrays["pairs"][:, 1], list(categories))
    objects: dict[Pair, CategoryObjects] = {}
    notes = zip(*(arrays[name][rows].tolist() for name in ("pairs", "boxes", "areas")), strict=True)
    for (image, category), (x, y, width, height), area in notes:
        if image not in pictures:
            continue
        found = objects.setdefault((image, category), CategoryObjects())
        right, bottom = pictures[image].size
        box = max(x, 0.0), max(y, 0.0), min(x + width, float(right)), min(y + height, float(bottom))
        if box[0] < box[2] and box[1] < box[3]:
            found.boxes.append(box)
            found.areas.append(area)
    return objects


def _parse(file: Path, split: str) -> Arrays:
    try:
        content = json.loads(file.read_bytes())
        arrays = _arrays(content, split)
        _check_ids(file, content, arrays)
        return arrays
    except AnnotationError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise AnnotationError(
            f"{file} is no usable LVIS file ({problem}). Expected JSON with `images` (id, coco_url, width, height, "
            "neg_category_ids, not_exhaustive_category_ids), `annotations` (image_id, category_id, bbox of four "
            f"numbers) and `categories` (id, name, frequency). Unpack it again; {SOURCE}."
        ) from error


def _arrays(content: Mapping[str, Any], split: str) -> Arrays:
    images, notes = content["images"], content["annotations"]
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    boxes = np.array([note["bbox"] for note in notes], dtype=np.float64).reshape(len(notes), 4)
    if not np.isfinite(boxes).all():
        wrong = notes[int(np.flatnonzero(~np.isfinite(boxes).all(1))[0])]
        raise ValueError(f"annotation {wrong.get('id')} has bbox {wrong['bbox']}")
    return {
        "category_ids": np.array([entry["id"] for entry in categories], dtype=np.int64),
        "category_names": np.array([entry["name"] for entry in categories], dtype=str),
        "category_frequencies": np.array([entry["frequency"] for entry in categories], dtype=str),
        "image_ids": np.array([entry["id"] for entry in images], dtype=np.int64),
        "image_paths": np.array([_picture_path(entry, split) for entry in images], dtype=str),
        "image_sizes": np.array([(entry["width"], entry["height"]) for entry in images], dtype=np.int64).reshape(-1, 2),
        "negative": _id_pairs((entry["id"], c) for entry in images for c in entry["neg_category_ids"]),
        "not_exhaustive": _id_pairs((e["id"], c) for e in images for c in e["not_exhaustive_category_ids"]),
        "pairs": _id_pairs((note["image_id"], note["category_id"]) for note in notes),
        "boxes": boxes,
        "areas": np.array([note.get("area", note["bbox"][2] * note["bbox"][3]) for note in notes], dtype=np.float64),
    }


def _check_ids(file: Path, content: Mapping[str, Any], arrays: Arrays) -> None:
    """See that no id occurs twice, and that annotations are of images and categories that the file lists."""
    notes = content["annotations"]
    for what, entries in (("image", content["images"]), ("category", content["categories"]), ("annotation", notes)):
        check_unique(f"{what} id", (entry["id"] for entry in entries if "id" in entry), file)
    for column, kind in enumerate(("image", "category")):
        values = arrays["pairs"][:, column]
        unknown = np.flatnonzero(~np.isin(values, arrays[f"{kind}_ids"]))
        if len(unknown):
            note = notes[unknown[0]].get("id", f"at position {unknown[0]}")
            raise AnnotationError(not_listed(f"Annotation {note} in {file}", kind, int(values[unknown[0]])))


def _picture_path(entry: Mapping[str, Any], split: str) -> str:
    """Path of a picture below COCO's folder: a val picture of LVIS may be in train2017."""
    folder, name = ["", *str(entry.get("coco_url", "")).split("/")][-2:]
    if folder.endswith("2017") or "file_name" not in entry:
        return f"{folder}/{name}"
    # v0.5 names a picture as the tree of 2014 did, COCO_val2014_000000000042.jpg, or by its number alone; its splits
    # are those of COCO 2017.
    return f"{split}2017/{str(entry['file_name'])[-16:]}"


def _pairs_of(arrays: Arrays, keys: str, values: str) -> dict[int, str]:
    return dict(zip(arrays[keys].tolist(), arrays[values].tolist(), strict=True))


def _id_pairs(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    return np.array(list(pairs), dtype=np.int64).reshape(-1, 2)


def _about(pairs: np.ndarray, categories: Mapping[int, str]) -> Iterable[Pair]:
    return map(tuple, pairs[np.isin(pairs[:, 1], list(categories))].tolist())


__all__ = ["SOURCE", "read_lvis"]
