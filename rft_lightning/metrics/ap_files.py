"""Ground truth and results in the formats of COCO and LVIS, as rows of the states of an average precision."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rft_lightning.errors import AnnotationError, DatasetNotFoundError
from rft_lightning.metrics.ap_updates import EVERYTHING

# Class ids stand in tables of float64, which from here on does not hold every whole number.
END_OF_CLASS_IDS = 2**53


@dataclass
class FileRows:
    """The content of two files, by picture in ascending order of the ids.

    Attributes:
        images: ids of the pictures, ascending.
        det: [N, 6] (class, x, y, w, h, score).
        gt: [M, 8] (class, x, y, w, h, area, crowd, ignore).
        n_det: detections of each picture.
        n_gt: objects of each picture.
        results: the results in the order of `det`.
        notes: the annotations in the order of `gt`.
        classes: ids of the categories that are kept, ascending; None for all.
        boxes_first: whether the first result of the file has a box.
        infos: the entries of the pictures.
        categories: the entries of the categories, by id.
    """

    images: list[Any]
    det: np.ndarray
    gt: np.ndarray
    n_det: list[int]
    n_gt: list[int]
    results: list[Mapping[str, Any]]
    notes: list[Mapping[str, Any]]
    classes: list[int] | None
    boxes_first: bool
    infos: list[Mapping[str, Any]]
    categories: dict[int, Mapping[str, Any]]

    def questions(self, n_marks: Sequence[int] | None = None) -> np.ndarray:
        """[Q, 5] rows of the state `questions`; ids that are no int64 by their place, which keeps their order."""
        integers = all(isinstance(image, int) and -(2**63) < image < 2**63 for image in self.images)
        keys = self.images if integers else range(len(self.images))
        marks = n_marks if n_marks is not None else [0] * len(self.images)
        rows = [(key, EVERYTHING, *sizes) for key, *sizes in zip(keys, self.n_det, self.n_gt, marks, strict=True)]
        return np.array(rows, dtype=np.int64).reshape(-1, 5)


def read_files(
    gt: Any,
    results: Any,
    *,
    classes: Sequence[int] | None = None,
    what: str = "COCO",
    boxes: bool = True,
    most_per_image: int | None = None,
) -> FileRows:
    """Ground truth and results, by picture.

    Args:
        gt: path or content: ``images``, ``annotations``, ``categories``.
        results: path or content: a list of ``image_id, category_id, bbox (xywh), score``; may be empty.
        classes: ids of the categories that are kept; None: those of the file, or all where it names none.
        what: the format, for errors.
        boxes: whether every result must have a box.
        most_per_image: so many results of the highest scores are kept of each picture, before anything else.

    Raises:
        DatasetNotFoundError: a file does not exist.
        AnnotationError: a file is none of its kind, an entry lacks what is read, or results name pictures that the
            ground truth does not have.
    """
    truth, found = load_json(gt, f"{what} ground truth"), load_json(results, f"{what} results")
    if not isinstance(truth, Mapping) or "images" not in truth or not isinstance(found, Sequence):
        raise AnnotationError(
            f"Expected a {what} ground truth (a dict with `images`, `annotations`, `categories`) and a list of "
            f"results, found {_outline(truth)} and {_outline(found)}; check the order of the two arguments."
        )
    try:
        return _file_rows(truth, found, classes, boxes, most_per_image)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, AnnotationError):
            raise
        lacks = f"lacks {error}" if isinstance(error, KeyError) else f"has something else than expected ({error})"
        raise AnnotationError(
            f"An entry of the {what} ground truth or results {lacks}. Images have id; annotations image_id, category_id"
            " and bbox (x, y, width, height) or segmentation; results also score."
        ) from error


def _file_rows(
    truth: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
    classes: Sequence[int] | None,
    boxes: bool,
    most_per_image: int | None,
) -> FileRows:
    infos = {image["id"]: image for image in truth["images"]}
    images = sorted(infos)
    place = {image: number for number, image in enumerate(images)}
    boxes_first = len(found) > 0 and bool(found[0].get("bbox"))
    unknown = {result["image_id"] for result in found} - place.keys()
    if unknown:
        raise AnnotationError(
            f"The results name {len(unknown)} images that the ground truth does not have, for example "
            f"{min(unknown, key=str)!r}; evaluate them against the split they were made for."
        )
    check_category_ids(truth.get("categories", ()), "the ground truth")
    notes = [note for note in truth.get("annotations", ()) if note["image_id"] in place]
    if classes is None and "categories" in truth:
        classes = sorted({category["id"] for category in truth["categories"]})
    if most_per_image is not None:
        found = _best_of_images(found, most_per_image)
    if classes is not None:
        kept = set(classes)
        found, notes = ([entry for entry in entries if entry["category_id"] in kept] for entries in (found, notes))
    found, n_det = _by_image(found, place)
    notes, n_gt = _by_image(notes, place)
    return FileRows(
        images=images,
        det=_table([_detection_row(result, boxes) for result in found], 6),
        gt=_table([_object_row(note) for note in notes], 8),
        n_det=n_det,
        n_gt=n_gt,
        results=found,
        notes=notes,
        classes=None if classes is None else list(classes),
        boxes_first=boxes_first,
        infos=[infos[image] for image in images],
        categories={category["id"]: category for category in truth.get("categories", ())},
    )


def check_category_ids(categories: Iterable[Mapping[str, Any]], where: str) -> None:
    """See that the ids of categories are whole numbers which class ids of a metric can be.

    Args:
        categories: entries with ``id``.
        where: what lists them, for the message.

    Raises:
        AnnotationError: one is not.
    """
    for category in categories:
        number = category["id"]
        if not isinstance(number, int | float) or number != number // 1 or abs(number) >= END_OF_CLASS_IDS:
            raise AnnotationError(
                f"Category {category.get('name', '')!r} of {where} has the id {number!r}; expected a whole number "
                "below 2**53. Number the categories, here and in the results."
            )


def _best_of_images(results: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    for image, entries in by_image.items():
        if len(entries) > most:
            by_image[image] = sorted(entries, key=lambda result: result["score"], reverse=True)[:most]
    return [result for entries in by_image.values() for result in entries]


def _by_image(entries: Sequence[Mapping[str, Any]], place: Mapping[Any, int]) -> tuple[list[Any], list[int]]:
    """Entries by picture, in the order of the file within one, and how many each has."""
    places = np.array([place[entry["image_id"]] for entry in entries], dtype=np.int64)
    counts = np.bincount(places, minlength=len(place)).tolist()
    return [entries[row] for row in places.argsort(kind="stable").tolist()], counts


def _detection_row(result: Mapping[str, Any], needs_box: bool) -> tuple[float, ...]:
    box = result["bbox"] if needs_box else result.get("bbox", (0, 0, 0, 0))
    score = result["score"]
    if score is None or isinstance(score, str):  # numpy would make a number of either
        raise TypeError(f"score {score!r}")
    return (result["category_id"], *box, score)


def _object_row(note: Mapping[str, Any]) -> tuple[float, ...]:
    box = note.get("bbox", (0, 0, 0, 0))
    return (note["category_id"], *box, note.get("area", box[2] * box[3]), note.get("iscrowd", 0), note.get("ignore", 0))


def _table(rows: list[Any], columns: int) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(-1, columns)


def file_masks(rows: FileRows) -> tuple[Tensor, Tensor]:
    """IoU of each pair of masks of a picture, one picture after the other, and the areas of the detections.

    Polygons and run lengths are read and compared by pycocotools' mask functions, pixel by pixel.
    """
    from pycocotools import mask as coco_mask

    overlaps, areas = [], []
    det_end, gt_end = np.cumsum([0, *rows.n_det]), np.cumsum([0, *rows.n_gt])
    for number, info in enumerate(rows.infos):
        found = [_run_lengths(r, info) for r in rows.results[det_end[number] : det_end[number + 1]]]
        notes = rows.notes[gt_end[number] : gt_end[number + 1]]
        truth = [_run_lengths(note, info) for note in notes]
        crowd = [int(note.get("iscrowd", 0)) for note in notes]
        overlaps.append(np.asarray(coco_mask.iou(found, truth, crowd)).reshape(-1) if found and truth else np.zeros(0))
        areas.append(np.array([coco_mask.area(mask) for mask in found], dtype=np.float64))
    area = rows.det[:, 3] * rows.det[:, 4] if rows.boxes_first else np.concatenate([np.zeros(0), *areas])
    return torch.from_numpy(np.concatenate([np.zeros(0), *overlaps])), torch.from_numpy(area)


def _run_lengths(entry: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
    from pycocotools import mask as coco_mask

    content = entry["segmentation"]
    if isinstance(content, list):
        return coco_mask.merge(coco_mask.frPyObjects(content, info["height"], info["width"]))
    if not isinstance(content["counts"], list):
        return content
    height, width = content["size"]
    if sum(content["counts"]) != height * width:  # pycocotools would not return
        raise AnnotationError(
            f"The run lengths of a mask of image {entry['image_id']!r} add up to {sum(content['counts'])} pixels, "
            f"expected {height} x {width}; write the file again."
        )
    return coco_mask.frPyObjects(content, height, width)


def load_json(source: Any, what: str) -> Any:
    """The content of a JSON file, or the content itself where that is given.

    Raises:
        DatasetNotFoundError: there is no such file.
        AnnotationError: it is no JSON.
    """
    if not isinstance(source, str | Path):
        return source
    try:
        return json.loads(Path(source).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f"The {what} {source} does not exist; check the path.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"The {what} {source} is no JSON file ({error}); write it again.") from error


def _outline(content: Any) -> str:
    keys = f" with {sorted(map(str, content))[:5]}" if isinstance(content, Mapping) else ""
    return f"a {type(content).__name__}{keys}"
