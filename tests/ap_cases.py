"""Adversarial random cases for average precision, and what the official evaluators make of them.

A case is a ground truth and a list of results in the format of the files. `exact` cases lie on a grid of quarter
pixels, so that boxes survive the way from xywh to corners and back without a rounding error.

Shape legend: N boxes or masks, H rows and W columns, T IoU thresholds, R recall points, K classes, A area ranges.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rft_lightning.lvis_api import load_lvis

Content = dict[str, Any]
Picture = tuple[dict[str, Any], dict[str, Any]]

COCO_KEYS = (
    "map", "map_50", "map_75", "map_small", "map_medium", "map_large",
    "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large",
)  # fmt: skip
LVIS_KEYS = (
    "map", "map_50", "map_75", "map_small", "map_medium", "map_large", "map_rare", "map_common", "map_frequent",
    "mar_300", "mar_small", "mar_medium", "mar_large",
)  # fmt: skip

SIDES = np.array([1, 4, 8, 10, 16, 20, 32, 40, 64, 96, 144])  # 32 * 32, 16 * 64, 96 * 96, 64 * 144: range borders
BORDERS = (0.0, 1024.0, 9216.0, float(np.nextafter(1024.0, 2e3)), float(np.nextafter(9216.0, 0)), 1e10, 2e10)
FREQUENCIES = "rcf"


class Expected(NamedTuple):
    """An official evaluation.

    Attributes:
        precision: [T, R, K, A] float64.
        recall: [T, K, A, 3] (COCO) or [T, K, A] (LVIS) float64.
        summary: the numbers of COCO_KEYS or LVIS_KEYS, by key.
        classes: [K], ascending.
    """

    precision: np.ndarray
    recall: np.ndarray
    summary: dict[str, float]
    classes: list[int]


class Draw:
    """The random parts of one case; what the whole case has in common is drawn first."""

    def __init__(self, *seed: int, exact: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.exact = exact
        self.decimals = not exact and self.rng.random() < 0.4
        self.score_style = str(self.rng.choice(["ones", "tenths", "close", "signed", "nan", "uniform"]))
        self.crowd_share = float(self.rng.choice([0.0, 0.2, 0.6]))
        self.crowded_group = self.rng.random() < 0.12

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def ids(self, count: int, special: Sequence[int]) -> list[int]:
        """`count` distinct ids with gaps, in no order, some of `special` among them."""
        drawn = [int(i) for i in self.rng.choice(np.arange(1, 500), count, replace=False)]
        for place, value in enumerate(self.rng.permutation(special)[: count - 1]):
            if self.chance(0.3):
                drawn[place] = int(value)
        return drawn

    def scores(self, count: int) -> list[float]:
        """Scores of the style of the case: tied, equal in float32 only, not positive, not a number."""
        pools = {
            "ones": [1.0],
            "tenths": [k / 10 for k in range(11)],
            "close": [0.5, 0.5 + 1e-12, 0.5 - 1e-12, 0.9],
            "signed": [0.0, -0.0, -1.5, 1e-300, 2.0],
            "nan": [float("nan"), 0.3, 1.0],
        }
        if self.score_style in pools:
            return [float(score) for score in self.rng.choice(pools[self.score_style], count)]
        return [float(score) for score in self.rng.random(count)]

    def boxes(self, count: int) -> list[list[float]]:
        """[N, 4] xywh, many of them nested, touching or equal."""
        boxes = np.concatenate([self.rng.integers(0, 8, (count, 2)) * 8, self.rng.choice(SIDES, (count, 2))], 1)
        if self.decimals:
            boxes = (boxes + self.rng.uniform(0, 3, boxes.shape)).round(2)
        return boxes.tolist()

    def near(self, box: list[float]) -> list[float]:
        """A detection made from an object: equal, a part of it (IoU on or beside a threshold), moved or malformed."""
        x, y, w, h = box
        part = int(self.rng.integers(9, 21)) / 20
        kind = int(self.rng.integers(10))
        if kind < 3:
            made = [x, y, w * part, h]
        elif kind < 5:
            made = [x, y, w, h / part]
        elif kind < 7:
            made = [x + float(self.rng.integers(-2, 3)), y, w, h + float(self.rng.integers(0, 3))]
        elif kind < 8:
            made = [x, y, *([w, 0], [0, h], [-w, h], [w, -h], [-w, -h])[int(self.rng.integers(5))]]
        else:
            made = list(box)
        return (np.floor(np.array(made) * 4) / 4).tolist() if self.exact else made

    def twins(self, box: list[float]) -> tuple[list[list[float]], list[float]]:
        """Two objects with the same IoU with the detection between them: what it takes decides what is left."""
        x, y, w, h = box
        shift = float(self.rng.choice([w / 8, w / 4])) if w >= 8 else 0.0
        return [[x - shift, y, w, h], [x + shift, y, w, h]], [x, y, w, h]

    def group(self, empty: bool) -> tuple[list[list[float]], list[list[float]]]:
        """Objects and detections of one class in one image."""
        objects = [] if empty else self.boxes(int(self.rng.choice([0, 0, 1, 1, 2, 3, 7])))
        if objects and self.chance(0.3):
            objects += [objects[0]] * int(self.rng.integers(1, 3))
        found = [self.near(box) for box in objects for _ in range(int(self.rng.integers(0, 3)))]
        if objects and self.chance(0.4):
            pair, between = self.twins(objects[-1])
            objects += pair
            found += [between, pair[int(self.rng.integers(2))]]
        found += self.boxes(int(self.rng.integers(0, 3)))
        if self.chance(0.2):
            found.append([0.0, 0.0, 200.0, 200.0])  # covers every object
        if self.crowded_group and found:
            self.crowded_group = False
            found = [self.near(found[i % len(found)]) for i in range(int(self.rng.integers(101, 125)))]
        return objects, found

    def area(self, natural: float) -> float:
        """The area field of an object: that of its box or mask, smaller, or on the border of a range."""
        if self.chance(0.5):
            return natural
        return float(self.rng.choice(BORDERS)) if self.chance(0.5) else natural * float(self.rng.uniform(0.3, 1))


def coco_case(seed: int, *, exact: bool = False) -> tuple[Content, list[Content]]:
    """A random COCO box case; without `exact` with unknown classes and images, and sometimes ids that are strings."""
    draw = Draw(1, seed, exact=exact)
    gt, results = _skeleton(draw)
    _fill_boxes(draw, gt, results)
    for note in gt["annotations"]:
        note["iscrowd"] = int(draw.chance(draw.crowd_share))
        if draw.chance(0.2):
            note["ignore"] = int(draw.chance(0.5))  # COCO reads `iscrowd` alone
        if note["iscrowd"] and draw.chance(0.3):
            note.update(bbox=[0.0, 0.0, 200.0, 200.0], area=40000.0)
    if not exact:
        _add_strangers(draw, gt, results)
        if draw.chance(0.2):
            gt["images"].append(dict(gt["images"][0]))  # an image listed twice
        if draw.chance(0.15):
            _rename_images(gt, results)
    return _shuffled(draw, gt), _permuted(draw, results)


def lvis_case(seed: int, *, exact: bool = False) -> tuple[Content, list[Content]]:
    """A random LVIS case; `exact` as in :func:`coco_case`."""
    draw = Draw(2, seed, exact=exact)
    gt, results = _skeleton(draw)
    _fill_boxes(draw, gt, results)
    ids = [category["id"] for category in gt["categories"]]
    for category in gt["categories"]:
        category["frequency"] = FREQUENCIES[int(draw.rng.integers(3))]
    for image in gt["images"]:
        image["neg_category_ids"] = [i for i in ids if draw.chance(0.4)]
        image["not_exhaustive_category_ids"] = [i for i in ids if draw.chance(0.3)]
    for note in gt["annotations"]:
        if draw.chance(0.3):
            note["ignore"] = int(draw.chance(0.5))
        if draw.chance(0.1):
            note["area"] = float(draw.rng.choice([0.0, -4.0]))
        if draw.chance(0.1):
            note["iscrowd"] = 1  # LVIS does not read it
    if not exact:
        _add_strangers(draw, gt, results)
    if results and draw.chance(0.2) and draw.score_style != "nan":  # sorting NaN with Python means nothing
        busy = [result for result in results if result["image_id"] == results[0]["image_id"]]
        while len(busy) <= 310:
            busy.append({**busy[int(draw.rng.integers(len(busy)))], "score": draw.scores(1)[0]})
        results = [result for result in results if result["image_id"] != results[0]["image_id"]] + busy
    return _shuffled(draw, gt), _permuted(draw, results)


def segm_case(seed: int, *, exact: bool = False) -> tuple[Content, list[Content]]:
    """A random COCO mask case; without `exact` all or some results have a bbox, which may then give their area."""
    draw = Draw(3, seed, exact=exact)
    gt, results = _skeleton(draw)
    size = (100, 110) if draw.chance(0.2) else (40, 60)
    with_box = 0.0 if exact else float(draw.rng.choice([0.0, 0.5, 1.0]))
    for image in gt["images"]:
        image["height"], image["width"] = size
    for image, category in _groups(draw, gt):
        objects = [_shape(draw, size) for _ in range(int(draw.rng.choice([0, 1, 1, 2, 4])))]
        found = [_altered(draw, mask) for mask in objects for _ in range(int(draw.rng.integers(0, 3)))]
        if objects and draw.chance(0.4):  # as the twins among the boxes
            pair = [np.roll(objects[0], step, 1) for step in (-1, 1)]
            found += [objects[0], pair[int(draw.rng.integers(2))]]
            objects = pair + objects[1:]
        found += [_shape(draw, size) for _ in range(int(draw.rng.integers(0, 2)))]
        if draw.crowded_group and found:
            draw.crowded_group = False
            found = [_altered(draw, found[i % len(found)]) for i in range(102)]
        for mask in objects:
            note = _note(image, category, mask_utils.toBbox(encode(mask)).tolist(), draw.area(float(mask.sum())))
            note.update(iscrowd=int(draw.chance(draw.crowd_share)), segmentation=_segmentation(draw, mask))
            gt["annotations"].append(note)
        for mask, score in zip(found, draw.scores(len(found)), strict=True):
            result = {"image_id": image, "category_id": category, "segmentation": encode(mask), "score": score}
            results.append({**result, "bbox": draw.boxes(1)[0]} if draw.chance(with_box) else result)
    results = _permuted(draw, results)
    if with_box == 0.5 and results:
        results[0].pop("bbox", None)  # pycocotools refuses a first result with and a later one without
    return _shuffled(draw, gt), results


def encode(mask: np.ndarray) -> Content:
    """A mask [H, W] as compressed RLE that JSON can hold."""
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def decode(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """[H, W] bool mask of polygons or RLE, compressed or not."""
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_utils.frPyObjects(segmentation, *size)
    return mask_utils.decode(segmentation).astype(bool)


def _skeleton(draw: Draw) -> tuple[Content, list[Content]]:
    images = draw.ids(int(draw.rng.integers(1, 9)), [0, 2**53, 2**53 + 1, -3])
    categories = draw.ids(int(draw.rng.integers(1, 6)), [0, 10**6])
    gt: Content = {
        "images": [{"id": image, "height": 200, "width": 200} for image in images],
        "categories": [{"id": category, "name": f"class {category}"} for category in categories],
        "annotations": [],
    }
    return gt, []


def _groups(draw: Draw, gt: Content) -> list[tuple[Any, int]]:
    """(image, class) pairs that hold anything: some images and some classes stay empty."""
    images = [image["id"] for image in gt["images"] if not draw.chance(0.15)]
    classes = [category["id"] for category in gt["categories"] if not draw.chance(0.15)]
    return [(image, category) for image in images for category in classes]


def _note(image: Any, category: int, box: list[float], area: float) -> Content:
    return {"image_id": image, "category_id": category, "bbox": box, "area": area}


def _fill_boxes(draw: Draw, gt: Content, results: list[Content]) -> None:
    # Two images without objects, or without detections, are as likely as the sets are small.
    without_objects = {image["id"] for image in gt["images"] if draw.chance(0.15)}
    without_results = {image["id"] for image in gt["images"] if draw.chance(0.1)}
    for image, category in _groups(draw, gt):
        objects, found = draw.group(empty=image in without_objects)
        gt["annotations"] += [_note(image, category, box, draw.area(float(box[2] * box[3]))) for box in objects]
        if image not in without_results:
            for box, score in zip(found, draw.scores(len(found)), strict=True):
                results.append({"image_id": image, "category_id": category, "bbox": box, "score": score})


def _add_strangers(draw: Draw, gt: Content, results: list[Content]) -> None:
    """Objects and results of a class that is not listed, objects of an image that is not listed."""
    image, category = gt["images"][0]["id"], gt["categories"][0]["id"]
    if draw.chance(0.3):
        results += [{"image_id": image, "category_id": 777, "bbox": box, "score": 1.0} for box in draw.boxes(3)]
    if draw.chance(0.1):
        strangers = [_note(image, 777, draw.boxes(1)[0], 50.0), _note(888, category, draw.boxes(1)[0], 50.0)]
        gt["annotations"] += [{**note, "iscrowd": 0} for note in strangers]


def _rename_images(gt: Content, results: list[Content]) -> None:
    """Strings as image ids, whose order is another than that of the numbers."""
    for entry, key in [*((i, "id") for i in gt["images"]), *((e, "image_id") for e in gt["annotations"] + results)]:
        entry[key] = f"image {entry[key]}"


def _permuted(draw: Draw, entries: list[Content]) -> list[Content]:
    return [entries[i] for i in draw.rng.permutation(len(entries))]


def _shuffled(draw: Draw, gt: Content) -> Content:
    shuffled = {name: _permuted(draw, gt[name]) for name in ("images", "categories", "annotations")}
    ids = draw.rng.permutation(np.arange(3 * len(shuffled["annotations"]) + 1))
    for note, number in zip(shuffled["annotations"], ids.tolist(), strict=False):
        note["id"] = number  # with gaps, and sometimes 0
    return shuffled


def _shape(draw: Draw, size: tuple[int, int]) -> np.ndarray:
    """A mask [H, W]: a rectangle, an ellipse, noise, everything or nothing."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    y, x = int(draw.rng.integers(0, height - 8)), int(draw.rng.integers(0, width - 8))
    h, w = (int(side) for side in draw.rng.choice([4, 8, 20, 32, 96], 2))
    kind = int(draw.rng.integers(10))
    if kind < 5:
        return (rows >= y) & (rows < y + h) & (columns >= x) & (columns < x + w)
    if kind < 7:
        return ((rows - y) / h) ** 2 + ((columns - x) / w) ** 2 <= 1
    if kind < 8:
        return draw.rng.random(size) < 0.4
    return np.full(size, kind == 8)


def _altered(draw: Draw, mask: np.ndarray) -> np.ndarray:
    """A detection made from an object: equal, moved, or without some of its columns (exact shares of rectangles)."""
    kind = int(draw.rng.integers(4))
    if kind == 0:
        return mask
    if kind == 1:
        return np.roll(mask, draw.rng.integers(-3, 4, 2), (0, 1))
    if kind == 2:
        return mask & (draw.rng.random(mask.shape) < 0.9)
    made = mask.copy()
    filled = np.flatnonzero(mask.any(0))
    made[:, filled[: int(draw.rng.integers(0, len(filled) // 2 + 1))]] = False
    return made


def _segmentation(draw: Draw, mask: np.ndarray) -> Any:
    """A mask as the files hold it: RLE, compressed or as counts, or its bounding box as a polygon."""
    if draw.chance(0.2) and mask.any():
        x, y, w, h = mask_utils.toBbox(encode(mask)).tolist()
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if draw.chance(0.7):
        return encode(mask)
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends.tolist(), flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}  # zeros come first


def coco_oracle(gt: Content, results: list[Content], iou_type: str = "bbox") -> Expected:
    """What pycocotools says."""
    gt, results = copy.deepcopy(gt), copy.deepcopy(results)
    for number, note in enumerate(gt["annotations"], start=1):
        note["id"] = number  # an object with id 0 is taken for unmatched there
    if not results:
        # It fails on an empty list; a result of a class that nobody has is dropped.
        stranger = {"image_id": gt["images"][0]["id"], "category_id": -1, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 1.0}
        results = [stranger]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = gt
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision, recall = evaluation.eval["precision"][..., -1], evaluation.eval["recall"]
    summary = dict(zip(COCO_KEYS, evaluation.stats.tolist(), strict=True))
    return Expected(precision, recall, summary, sorted(int(i) for i in evaluation.params.catIds))


def lvis_oracle(gt: Content, results: list[Content]) -> Expected:
    """What lvis-api says."""
    annotations = [{**note, "id": number} for number, note in enumerate(gt["annotations"], start=1)]
    if not results:
        # It fails on an empty list; a result without area is dropped.
        category = gt["categories"][0]["id"]
        results = [{"image_id": gt["images"][0]["id"], "category_id": category, "bbox": [0, 0, 0, 0], "score": 1.0}]
    api = load_lvis()
    logging.getLogger("lvis").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gt.json")
        path.write_text(json.dumps({**gt, "annotations": annotations}))
        truth = api.LVIS(str(path))
    evaluation = api.LVISEval(truth, api.LVISResults(truth, copy.deepcopy(results)), "bbox")
    evaluation.run()
    summary = dict(zip(LVIS_KEYS, (float(value) for value in evaluation.get_results().values()), strict=True))
    return Expected(evaluation.eval["precision"], evaluation.eval["recall"], summary, evaluation.params.cat_ids)


def pictures(gt: Content, results: list[Content], *, masks: bool = False) -> list[Picture]:
    """(prediction, target) of each image, in the order of the file, as `update` takes them."""
    return [_picture(image, gt["annotations"], results, masks) for image in gt["images"]]


def _picture(image: Content, annotations: list[Content], results: list[Content], masks: bool) -> Picture:
    notes = [note for note in annotations if note["image_id"] == image["id"]]
    found = [result for result in results if result["image_id"] == image["id"]]
    size = (image["height"], image["width"])
    pred = {"labels": _long(found, "category_id"), "scores": _double([result["score"] for result in found])}
    target = {"labels": _long(notes, "category_id"), "area": _double([note["area"] for note in notes])}
    target["image_id"] = image["id"]
    for item, entries in ((pred, found), (target, notes)):
        if masks:
            item["masks"] = _masks(entries, size)
        else:
            item["boxes"] = _corners([entry["bbox"] for entry in entries])
    if "neg_category_ids" in image:
        target["neg_labels"] = image["neg_category_ids"]
        target["not_exhaustive_labels"] = image["not_exhaustive_category_ids"]
        target["ignore"] = torch.tensor([note.get("ignore", 0) for note in notes], dtype=torch.long)
    else:
        target["iscrowd"] = _long(notes, "iscrowd")
    return pred, target


def _corners(boxes: list[list[float]]) -> torch.Tensor:
    rows = _double(boxes).reshape(-1, 4)
    return torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:]], 1)


def _masks(entries: list[Content], size: tuple[int, int]) -> torch.Tensor:
    masks = [decode(entry["segmentation"], size) for entry in entries]
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *size, dtype=torch.bool)


def _double(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _long(entries: list[Content], name: str) -> torch.Tensor:
    return torch.tensor([entry[name] for entry in entries], dtype=torch.long)
