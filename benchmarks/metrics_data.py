"""Generated detections of fixed seeds, in the sizes that occur; what benchmarks/metrics.py measures on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

SIZE = np.array([640.0, 480.0])  # width and height of a picture


@dataclass(frozen=True)
class Preset:
    """Sizes of a data set, and what its detections are like.

    Attributes:
        near: share of detections that lie at an object.
        palette: classes that occur in a picture.
        decimals: of the scores; None leaves them as float32.
        lvis: federated annotations, and as many detections per picture as come.
    """

    images: int
    classes: int
    objects: int
    detections: int
    near: float = 0.3
    palette: int = 3
    decimals: int | None = None
    lvis: bool = False

    def scaled(self, scale: float) -> Preset:
        """The same with fewer pictures, and all that goes with them."""
        sizes = {name: max(1, round(scale * getattr(self, name))) for name in ("images", "objects", "detections")}
        return replace(self, **sizes)


PRESETS = {
    "coco500": Preset(5000, 80, 36_800, 500_000),
    "coco100": Preset(5000, 80, 36_800, 100_000),
    "few-answers": Preset(5000, 80, 36_800, 3_000, near=0.8, decimals=2),
    "fewshot": Preset(500, 8, 620, 900, near=0.7, palette=1, decimals=2),
    "dense": Preset(500, 2, 20_000, 100_000, near=0.6, palette=2),
    "lvis": Preset(1000, 1203, 12_300, 300_000, palette=7, lvis=True),
}


@dataclass(frozen=True)
class Data:
    """Boxes are float32 xyxy; objects and detections are in the order of their pictures, which count from 1."""

    preset: Preset
    gt_image: np.ndarray
    gt_class: np.ndarray
    gt_boxes: np.ndarray
    gt_area: np.ndarray
    gt_crowd: np.ndarray
    det_image: np.ndarray
    det_class: np.ndarray
    det_boxes: np.ndarray
    det_scores: np.ndarray
    negative: list[list[int]]
    not_exhaustive: list[list[int]]
    frequency: np.ndarray


def random_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    """[K, 4] float32 boxes of all sizes inside a picture."""
    size = np.minimum(np.exp(rng.normal(4.2, 1.0, (count, 1)) + rng.normal(0, 0.3, (count, 2))), SIZE - 2).clip(2)
    low = rng.uniform(0, 1, (count, 2)) * (SIZE - size)
    return np.concatenate([low, low + size], 1).astype(np.float32)


def generate(preset: Preset, seed: int = 0) -> Data:
    """Objects in the classes of each picture's palette; detections at objects, of the palette's classes, and of any."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(10, 10 + preset.classes)
    palette = rng.choice(preset.classes, (preset.images, preset.palette), p=weights / weights.sum()) + 1
    gt_image = np.sort(rng.integers(preset.images, size=preset.objects))
    gt_class = palette[gt_image, rng.integers(preset.palette, size=preset.objects)]
    gt_boxes = random_boxes(preset.objects, rng)
    sides = gt_boxes[:, 2:] - gt_boxes[:, :2]

    if preset.lvis:  # uneven, so that some pictures exceed the limit of 300
        shares = rng.gamma(4.0, size=preset.images)
        det_image = np.repeat(np.arange(preset.images), rng.multinomial(preset.detections, shares / shares.sum()))
    else:
        det_image = np.arange(preset.detections) * preset.images // preset.detections
        if preset.detections < preset.images:
            det_image = np.sort(rng.integers(preset.images, size=preset.detections))
    count = preset.detections
    kind = rng.uniform(size=count)
    per_image = np.bincount(gt_image, minlength=preset.images)
    starts = per_image.cumsum() - per_image
    at = np.minimum(starts[det_image] + (rng.uniform(size=count) * per_image[det_image]).astype(int), len(gt_image) - 1)
    near = (kind < preset.near) & (per_image[det_image] > 0)
    det_class = palette[det_image, rng.integers(preset.palette, size=count)]
    anywhere = kind > preset.near + (1 - preset.near) / 3
    det_class[anywhere] = rng.integers(1, preset.classes + 1, anywhere.sum())
    det_class[near] = gt_class[at[near]]
    det_boxes = random_boxes(count, rng)
    error = rng.exponential(0.15, (count, 1)) * rng.normal(size=(count, 4)) * np.tile(sides[at], 2)
    det_boxes[near] = (gt_boxes[at] + error)[near]
    det_boxes[:, 2:] = np.maximum(det_boxes[:, 2:], det_boxes[:, :2] + 1)
    scores = 1 / (1 + np.exp(-(rng.normal(-1.5, 1.5, count) + 2.5 * near)))
    if preset.decimals is not None:
        scores = scores.round(preset.decimals)

    others = [sorted(set(rng.integers(1, preset.classes + 1, 8).tolist()) - set(row)) for row in palette.tolist()]
    return Data(
        preset=preset,
        gt_image=gt_image + 1,
        gt_class=gt_class,
        gt_boxes=gt_boxes,
        # An object fills part of its box.
        gt_area=(sides.prod(1) * rng.uniform(0.4, 1, len(sides))).astype(np.float32),
        gt_crowd=np.zeros(len(sides), bool) if preset.lvis else rng.uniform(size=len(sides)) < 0.01,
        det_image=det_image + 1,
        det_class=det_class,
        det_boxes=det_boxes,
        det_scores=scores.astype(np.float32),
        negative=others,
        not_exhaustive=[[row[0]] if rng.uniform() < 0.2 else [] for row in palette.tolist()],
        frequency=np.array(list("fcr"))[np.arange(preset.classes) * 3 // preset.classes],
    )


def batches(data: Data, batch_size: int, device: str) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """(predictions, targets) of each batch; every picture has tensors of its own."""
    images = range(1, data.preset.images + 1)

    def split(values: np.ndarray, image: np.ndarray) -> list[torch.Tensor]:
        counts = np.bincount(image, minlength=data.preset.images + 1)[1:].tolist()
        return [part.clone() for part in torch.from_numpy(values).to(device).split(counts)]

    found = {"boxes": data.det_boxes, "scores": data.det_scores, "labels": data.det_class}
    truth = {"boxes": data.gt_boxes, "labels": data.gt_class, "area": data.gt_area}
    if not data.preset.lvis:
        truth["iscrowd"] = data.gt_crowd
    preds_by_key = {key: split(values, data.det_image) for key, values in found.items()}
    targets_by_key = {key: split(values, data.gt_image) for key, values in truth.items()}
    preds = [dict(zip(preds_by_key, parts, strict=True)) for parts in zip(*preds_by_key.values(), strict=True)]
    targets = [dict(zip(targets_by_key, parts, strict=True)) for parts in zip(*targets_by_key.values(), strict=True)]
    for image, target in zip(images, targets, strict=True):
        target["image_id"] = image
        if data.preset.lvis:
            target["neg_labels"] = data.negative[image - 1]
            target["not_exhaustive_labels"] = data.not_exhaustive[image - 1]
    return [(preds[i : i + batch_size], targets[i : i + batch_size]) for i in range(0, len(preds), batch_size)]


def annotations(data: Data) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same as content of files: ground truth, results."""

    def xywh(boxes: np.ndarray) -> list[list[float]]:
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()

    images = [
        {"id": number, "neg_category_ids": negative, "not_exhaustive_category_ids": open_ended}
        for number, (negative, open_ended) in enumerate(zip(data.negative, data.not_exhaustive, strict=True), start=1)
    ]
    categories = [
        {"id": number, "name": f"class {number}", "frequency": frequency}
        for number, frequency in enumerate(data.frequency.tolist(), start=1)
    ]
    rows = (data.gt_image, data.gt_class, xywh(data.gt_boxes), data.gt_area, data.gt_crowd)
    objects = [
        {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for number, (image, label, box, area, crowd) in enumerate(zip(*map(as_list, rows), strict=True), start=1)
    ]
    rows = (data.det_image, data.det_class, xywh(data.det_boxes), data.det_scores)
    results = [
        {"image_id": image, "category_id": label, "bbox": box, "score": score}
        for image, label, box, score in zip(*map(as_list, rows), strict=True)
    ]
    return {"images": images, "categories": categories, "annotations": objects, "info": {}}, results


def as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else values.tolist()
