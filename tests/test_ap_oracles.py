"""Average precision: the arrays of pycocotools and lvis-api on adversarial random cases, however they are fed in."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rft_lightning.errors import AnnotationError
from rft_lightning.metrics import COCOMeanAveragePrecision, LVISAveragePrecision
from tests.ap_cases import (
    BORDERS,
    COCO_KEYS,
    LVIS_KEYS,
    Content,
    Expected,
    Picture,
    coco_case,
    coco_oracle,
    decode,
    encode,
    lvis_case,
    lvis_oracle,
    pictures,
    segm_case,
)

# From pycocotools' mask functions under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Metric = COCOMeanAveragePrecision | LVISAveragePrecision
BLOCK = 50  # random cases of one slow test
WITH_MANY_PICTURES = (5, 9, 16, 17)  # exact cases, of boxes and of LVIS


def check(metric: Metric, expected: Expected, where: object) -> None:
    """Arrays within 1e-12 of the official ones, all summary numbers within 1e-9."""
    result = metric.compute()
    for name, array in (("precision", expected.precision), ("recall", expected.recall)):
        assert result[name].dtype == torch.float64
        np.testing.assert_allclose(result[name].numpy(), array, rtol=0, atol=1e-12, err_msg=f"{where}: {name}")
    for name, value in expected.summary.items():
        assert result[name].dtype == torch.float64
        assert float(result[name]) == pytest.approx(value, abs=1e-9, rel=0), f"{where}: {name}"
    assert result["classes"].reshape(-1).tolist() == expected.classes, where
    per_class = [mean(expected.precision[:, :, k, 0]) for k in range(len(expected.classes))]
    assert result["map_per_class"].reshape(-1).tolist() == pytest.approx(per_class, abs=1e-9, rel=0), where


def mean(values: np.ndarray) -> float:
    """Over the entries that are not -1, as both official evaluators average."""
    present = values[values > -1]
    return float(present.mean()) if present.size else -1.0


def check_coco(seed: int) -> None:
    gt, results = coco_case(seed)
    check(COCOMeanAveragePrecision.from_coco_json(gt, results, arrays=True), coco_oracle(gt, results), seed)


def check_segm(seed: int) -> None:
    gt, results = segm_case(seed)
    metric = COCOMeanAveragePrecision.from_coco_json(gt, results, iou_type="segm", arrays=True)
    check(metric, coco_oracle(gt, results, "segm"), seed)


def check_lvis(seed: int) -> None:
    gt, results = lvis_case(seed)
    check(LVISAveragePrecision.from_lvis_json(gt, results, arrays=True), lvis_oracle(gt, results), seed)


# Random cases


@pytest.mark.parametrize("seed", range(150))
def test_coco_cases_equal_pycocotools(seed: int) -> None:
    check_coco(seed)


@pytest.mark.parametrize("seed", range(100))
def test_lvis_cases_equal_lvis_api(seed: int) -> None:
    check_lvis(seed)


@pytest.mark.parametrize("seed", range(30))
def test_mask_cases_equal_pycocotools(seed: int) -> None:
    check_segm(seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check_one", "start"),
    [(one, start) for one, count in ((check_coco, 1000), (check_lvis, 600), (check_segm, 200))
     for start in range(0, count, BLOCK)],
)  # fmt: skip
def test_many_cases_equal_the_official_evaluators(check_one: Callable[[int], None], start: int) -> None:
    for seed in range(start, start + BLOCK):
        check_one(seed)


def test_the_cases_hold_what_goes_wrong() -> None:
    counts = {case: Counter[str]() for case in (coco_case, lvis_case, segm_case)}
    for case, count in counts.items():
        for seed in range(100):
            count.update(traits(*case(seed)))
    common = {"many of a class", "nan", "ties", "no results", "object 0", "image 0", "class 0", "near ids"}
    common |= {"image without objects", "image without results", "class without objects", "copies"}
    common |= {f"area {area}" for area in BORDERS}
    boxes = {"zero", "negative", "both negative", "area of result on a border", "unknown class"}
    assert {name for name, seen in counts[coco_case].items() if seen > 1} >= common | boxes | {"crowd", "strings"}
    assert {name for name, seen in counts[lvis_case].items() if seen > 1} >= common | boxes | {"many of an image"}
    assert {name for name, seen in counts[segm_case].items() if seen > 1} >= common | {"crowd", "bbox in part"}


def traits(gt: Content, results: list[Content]) -> set[str]:
    notes, images = gt["annotations"], [image["id"] for image in gt["images"]]
    scores = [result["score"] for result in results]
    boxes = [result["bbox"] for result in results if "bbox" in result]
    classes = [category["id"] for category in gt["categories"]]
    per_image = Counter(result["image_id"] for result in results)
    per_class = Counter((result["image_id"], result["category_id"]) for result in results)
    holds = {
        "many of a class": max(per_class.values(), default=0) > 100,
        "many of an image": max(per_image.values(), default=0) > 300,
        "nan": any(math.isnan(score) for score in scores),
        "ties": len(set(scores)) < len(scores),
        "no results": not results,
        "object 0": any(note["id"] == 0 for note in notes),
        "image 0": 0 in images,
        "class 0": 0 in classes,
        "near ids": {2**53, 2**53 + 1} <= set(images),
        "strings": isinstance(images[0], str),
        "image without objects": not {note["image_id"] for note in notes} >= set(images),
        "image without results": not set(per_image) >= set(images),
        "class without objects": not {note["category_id"] for note in notes} >= set(classes),
        "copies": len({(n["image_id"], n["category_id"], str(n["bbox"])) for n in notes}) < len(notes),
        "crowd": any(note.get("iscrowd") for note in notes),
        "zero": any(0 in box[2:] for box in boxes),
        "negative": any(box[2] * box[3] < 0 for box in boxes),
        "both negative": any(max(box[2:]) < 0 for box in boxes),
        "area of result on a border": any(box[2] * box[3] in BORDERS[1:3] for box in boxes),
        "unknown class": any(result["category_id"] not in classes for result in results),
        "bbox in part": 0 < len(boxes) < len(results),
    }
    return {name for name, held in holds.items() if held} | {f"area {note['area']}" for note in notes}


def test_the_cap_of_lvis_comes_before_all_filters() -> None:
    """Detections that no rule would count, of a class without object or of none, use up the 300 of their picture."""
    image = {"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500}
    classes = [{"id": 1, "frequency": "r"}, {"id": 2, "frequency": "f"}]
    gt = {"images": [image], "categories": classes, "annotations": [note]}
    hit = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "score": 0.5}
    for change in ({"category_id": 777}, {"category_id": 2}, {"bbox": [0, 0, 0, 50]}):
        for many in (299, 300):
            results = [{**hit, "score": 1.0, **change}] * many + [hit]
            results = [dict(result) for result in results]
            expected = lvis_oracle(gt, results)
            assert expected.summary["map"] == pytest.approx(float(many == 299))
            check(LVISAveragePrecision.from_lvis_json(gt, results, arrays=True), expected, (change, many))
            if change.get("category_id") != 777:
                options: dict[str, Any] = {"frequency": {1: "r", 2: "f"}, "classes": [1, 2], "arrays": True}
                items = pictures({**gt, "images": [{**image, "height": 200, "width": 200}]}, results)
                check(feed(LVISAveragePrecision(**options), items), expected, (change, many))


def test_the_cap_of_coco_is_per_class() -> None:
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0}
    gt = {"images": [{"id": 1}], "categories": [{"id": 1}, {"id": 2}], "annotations": [note]}
    hit = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "score": 0.5}
    for change, many, recall in (({}, 99, 1.0), ({}, 100, 0.0), ({"category_id": 2}, 100, 1.0)):
        results = [{**hit, "bbox": [60, 60, 9, 9], "score": 1.0, **change} for _ in range(many)] + [hit]
        expected = coco_oracle(gt, results)
        assert expected.summary["mar_100"] == recall
        check(COCOMeanAveragePrecision.from_coco_json(gt, results, arrays=True), expected, (change, many))


def test_the_first_result_of_the_file_says_what_an_area_is() -> None:
    """Without a box there, the mask; though other results, or all those that count, have boxes."""
    mask = np.ones((20, 30), dtype=bool)
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 20], "area": 600, "iscrowd": 0}
    gt = {
        "images": [{"id": number, "height": 20, "width": 30} for number in (1, 2)],
        "categories": [{"id": 1}],
        "annotations": [{**note, "segmentation": encode(mask)}],
    }
    found = {"category_id": 1, "segmentation": encode(mask), "score": 0.5}
    boxed = {**found, "image_id": 1, "segmentation": encode(mask[:, ::-1] & (np.arange(30) < 9)), "score": 0.9}
    boxed["bbox"] = [0, 0, 100, 100]  # outside of the small ones, where the mask is inside
    summaries = set()
    for first in ({**found, "image_id": 2}, {**found, "image_id": 2, "category_id": 777}, {**boxed, "image_id": 2}):
        results = [first, boxed, {**boxed, **found, "image_id": 1}]
        expected = coco_oracle(gt, results, "segm")
        summaries.add(expected.summary["map_small"])
        check(COCOMeanAveragePrecision.from_coco_json(gt, results, iou_type="segm", arrays=True), expected, first)
    assert len(summaries) > 1


def test_masks_of_another_size_match_nothing() -> None:
    mask = np.ones((20, 30), dtype=bool)
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 20], "area": 600, "iscrowd": 0}
    gt = {
        "images": [{"id": 1, "height": 20, "width": 30}],
        "categories": [{"id": 1}],
        "annotations": [{**note, "segmentation": encode(mask)}],
    }
    found = {"image_id": 1, "category_id": 1, "score": 0.5}
    results = [{**found, "segmentation": encode(mask.T), "score": 1.0}, {**found, "segmentation": encode(mask)}]
    expected = coco_oracle(gt, results, "segm")
    assert expected.summary["map"] == pytest.approx(0.5)
    check(COCOMeanAveragePrecision.from_coco_json(gt, results, iou_type="segm", arrays=True), expected, "size")


# Real annotations


def perturbed(gt: Content, seed: int, iou_type: str = "bbox") -> list[Content]:
    """Results as a fair detector would make them: moved, doubled, missed, of a wrong class, with tied scores."""
    rng = np.random.default_rng(seed)
    classes = [category["id"] for category in gt["categories"]]
    size = {image["id"]: (image["height"], image["width"]) for image in gt["images"]}
    results = []
    for note in gt["annotations"]:
        for _ in range(int(rng.choice([0, 1, 1, 2]))):
            category = int(rng.choice(classes)) if rng.random() < 0.1 else note["category_id"]
            score = float(rng.choice([1.0, 0.9, 0.5, round(float(rng.random()), 2)]))
            result = {"image_id": note["image_id"], "category_id": category, "score": score}
            x, y, w, h = np.array(note["bbox"]) + rng.normal(0, 0.08, 4) * np.array(note["bbox"])[[2, 3, 2, 3]]
            if iou_type == "segm":
                mask = decode(note["segmentation"], size[note["image_id"]])
                result["segmentation"] = encode(np.roll(mask, rng.integers(-5, 6, 2), (0, 1)))
            else:
                result["bbox"] = [float(x), float(y), float(w), float(h)]
            results.append(result)
    return [results[i] for i in rng.permutation(len(results))]


@pytest.mark.sample_data
@pytest.mark.parametrize(
    ("file", "iou_type"),
    [
        ("coco2017_mini/coco/annotations/instances_val2017.json", "bbox"),
        ("coco2017_mini/coco/annotations/instances_val2017.json", "segm"),
        ("coco2014_mini/coco/annotations/instances_val2014.json", "bbox"),
        ("custom_coco_crowd/annotations.json", "bbox"),
        ("custom_coco_crowd/annotations.json", "segm"),
    ],
)
def test_real_coco_annotations_equal_pycocotools(sample_data: Path, file: str, iou_type: Any, tmp_path: Path) -> None:
    gt = json.loads((sample_data / file).read_text())
    for seed in range(3):
        results = perturbed(gt, seed, iou_type)
        (tmp_path / "results.json").write_text(json.dumps(results))
        expected = coco_oracle(gt, results, iou_type)
        assert 0.1 < expected.summary["map"] < 0.9
        metric = COCOMeanAveragePrecision.from_coco_json(
            sample_data / file, str(tmp_path / "results.json"), iou_type=iou_type, arrays=True
        )
        check(metric, expected, (file, seed))


@pytest.mark.sample_data
def test_real_lvis_annotations_equal_lvis_api(sample_data: Path, tmp_path: Path) -> None:
    file = sample_data / "lvis_v1_mini/lvis/annotations/lvis_v1_val.json"
    gt = json.loads(file.read_text())
    for seed in range(3):
        results = perturbed(gt, seed)
        (tmp_path / "results.json").write_text(json.dumps(results))
        expected = lvis_oracle(gt, results)
        assert 0.1 < expected.summary["map"] < 0.9
        check(LVISAveragePrecision.from_lvis_json(file, tmp_path / "results.json", arrays=True), expected, seed)


# Fed in by update


def exact(kind: Any, seed: int) -> tuple[Metric, Callable[[], Metric], list[Picture]]:
    """The metric filled from files, a maker of the same metric without content, and what is to be fed to it."""
    if kind == "lvis":
        gt, results = lvis_case(seed, exact=True)
        frequency = {category["id"]: category["frequency"] for category in gt["categories"]}
        options: dict[str, Any] = {"classes": list(frequency), "frequency": frequency, "arrays": True}
        from_files = LVISAveragePrecision.from_lvis_json(gt, results, arrays=True)
        return from_files, lambda: LVISAveragePrecision(**options), pictures(gt, results)
    gt, results = coco_case(seed, exact=True) if kind == "bbox" else segm_case(seed, exact=True)
    options = {"classes": [category["id"] for category in gt["categories"]], "iou_type": kind, "arrays": True}
    filled = COCOMeanAveragePrecision.from_coco_json(gt, results, iou_type=kind, arrays=True)
    return filled, lambda: COCOMeanAveragePrecision(**options), pictures(gt, results, masks=kind == "segm")


def feed(metric: Metric, items: list[Picture], batch: int = 3) -> Metric:
    for start in range(0, len(items), batch):
        preds, targets = zip(*items[start : start + batch], strict=True)
        metric.update(preds, targets)
    return metric


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor], where: object = "") -> None:
    assert result.keys() == expected.keys()
    for name in result:
        assert torch.equal(result[name], expected[name]), f"{where}: {name}"


@pytest.mark.parametrize("kind", ["bbox", "segm", "lvis"])
@pytest.mark.parametrize("seed", range(18))
def test_batches_and_order_of_pictures_do_not_matter(kind: str, seed: int) -> None:
    filled, make, items = exact(kind, seed)
    expected = filled.compute()
    rng = np.random.default_rng(seed)
    for batch in (1, 3, 100):
        assert_same(feed(make(), items, batch).compute(), expected, (seed, batch))
        shuffled = [items[i] for i in rng.permutation(len(items))]
        assert_same(feed(make(), shuffled, batch).compute(), expected, (seed, batch, "shuffled"))
        repeated = [*shuffled, *shuffled[: int(rng.integers(len(items) + 1))]]
        assert_same(feed(make(), repeated, batch).compute(), expected, (seed, batch, "repeated"))


def named(items: list[Picture]) -> list[Picture]:
    return [(pred, {**target, "image_id": f"folder/image {target['image_id']}.jpg"}) for pred, target in items]


@pytest.mark.parametrize("kind", ["bbox", "lvis"])
@pytest.mark.parametrize("seed", WITH_MANY_PICTURES)
def test_pictures_may_be_named_by_strings(kind: str, seed: int) -> None:
    _, make, items = exact(kind, seed)
    expected = feed(make(), named(items), 2).compute()
    assert_same(feed(make(), named(items[::-1] + items[:2])).compute(), expected)


@pytest.mark.parametrize("seed", WITH_MANY_PICTURES)
def test_a_picture_may_be_asked_about_class_by_class(seed: int) -> None:
    filled, make, items = exact("bbox", seed)
    questions = []
    for pred, target in items[::-1]:
        for category in filled.compute()["classes"].flip(0).tolist():
            asked = {name: value[pred["labels"] == category] for name, value in pred.items()}
            rows = {name: target[name][target["labels"] == category] for name in ("labels", "boxes", "area", "iscrowd")}
            questions.append((asked, {**rows, "image_id": target["image_id"], "query": category}))
    assert_same(feed(make(), questions, 4).compute(), filled.compute(), seed)


@pytest.mark.parametrize("kind", ["bbox", "segm", "lvis"])
def test_forward_and_copies_keep_what_was_added(kind: str) -> None:
    filled, make, items = exact(kind, 2)
    metric = make()
    for pred, target in items[:2]:
        metric([pred], [target])
    copied, pickled = copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))
    for same in (metric, copied, pickled):
        assert_same(feed(same, items[2:]).compute(), filled.compute())
    metric.reset()
    assert_same(feed(metric, items).compute(), filled.compute())


@pytest.mark.parametrize("make", [COCOMeanAveragePrecision, LVISAveragePrecision])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_precision_of_other_pictures_does_not_matter(make: type[Metric], dtype: torch.dtype) -> None:
    """Corners become sides in the precision of their own picture, whatever else is in the batch or on the rank."""
    rng = np.random.default_rng(0)
    items: list[Picture] = []
    for image in range(30):
        corners = torch.from_numpy(rng.uniform(0, 900, (3, 2)))
        truth = torch.cat([corners, corners + torch.from_numpy(rng.choice([32, 96], (3, 2)))], 1).to(dtype)
        labels = torch.ones(3, dtype=torch.long)
        pred = {"boxes": truth[:2].clone(), "scores": torch.from_numpy(rng.random(2)), "labels": labels[:2]}
        items.append((pred, {"boxes": truth, "labels": labels, "image_id": image}))
    nothing: Picture = ({"boxes": [], "scores": [], "labels": []}, {"boxes": [], "labels": [], "image_id": 99})
    alone = feed(make(arrays=True), items).compute()
    assert float(alone["map_small"]) > -1
    assert_same(feed(make(arrays=True), [*items, nothing], 50).compute(), alone)
    wide = [(pred, {**target, "boxes": target["boxes"].double()}) for pred, target in items[:1]]
    wide = [({**pred, "boxes": pred["boxes"].double()}, target) for pred, target in wide]
    mixed = [*wide, *items[1:]]
    assert_same(feed(make(arrays=True), mixed, 50).compute(), feed(make(arrays=True), mixed, 1).compute())


def test_arrays_only_on_request() -> None:
    gt, results = coco_case(0, exact=True)
    assert not {"precision", "recall"} & COCOMeanAveragePrecision.from_coco_json(gt, results).compute().keys()
    gt, results = lvis_case(0, exact=True)
    result = LVISAveragePrecision.from_lvis_json(gt, results).compute()
    assert result.keys() == {*LVIS_KEYS, "map_per_class", "classes"}


# Means of classes


@pytest.mark.parametrize("seed", range(20))
def test_published_code_averages_all_areas(seed: int) -> None:
    gt, results = lvis_case(seed)
    expected = lvis_oracle(gt, results)
    selected = expected.classes[::2]
    options: dict[str, Any] = {"protocol": "published_code", "selected": selected}
    result = LVISAveragePrecision.from_lvis_json(gt, results, **options).compute()
    per_class = [mean(expected.precision[:, :, k, :]) for k in range(len(expected.classes))]
    assert result["map_per_class"].reshape(-1).tolist() == pytest.approx(per_class, abs=1e-9, rel=0)
    assert float(result["map"]) == pytest.approx(mean(np.array(per_class)), abs=1e-9, rel=0)
    assert float(result["map_selected"]) == pytest.approx(mean(np.array(per_class[::2])), abs=1e-9, rel=0)


def test_published_code_differs_from_the_standard() -> None:
    """Where objects fall into few area ranges, whose numbers then count twice."""
    gt, results = lvis_case(4)
    published = LVISAveragePrecision.from_lvis_json(gt, results, protocol="published_code").compute()
    standard = LVISAveragePrecision.from_lvis_json(gt, results).compute()
    assert abs(float(published["map"]) - float(standard["map"])) > 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_selected_classes_are_averaged(seed: int) -> None:
    gt, results = coco_case(seed)
    expected = coco_oracle(gt, results)
    options: dict[str, Any] = {"selected": expected.classes[::2], "arrays": True}
    metric = COCOMeanAveragePrecision.from_coco_json(gt, results, **options)
    check(metric, expected, seed)  # the other numbers stay those of all classes
    per_class = [mean(expected.precision[:, :, k, 0]) for k in range(len(expected.classes))]
    assert float(metric.compute()["map_selected"]) == pytest.approx(mean(np.array(per_class[::2])), abs=1e-9, rel=0)


# Little or nothing


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_one_class(kind: str) -> None:
    """Results of the other classes are dropped; torchmetrics makes scalars of what has one element."""
    case, oracle = (coco_case, coco_oracle) if kind == "coco" else (lvis_case, lvis_oracle)
    (gt, results), seed = case(5), 5
    while len(gt["categories"]) < 2 or oracle(gt, results).summary["map"] <= 0:
        seed += 1
        gt, results = case(seed)
    for chosen in oracle(gt, results).classes:
        alone = {**gt, "categories": [entry for entry in gt["categories"] if entry["id"] == chosen]}
        expected = oracle(alone, results)
        fill = COCOMeanAveragePrecision.from_coco_json if kind == "coco" else LVISAveragePrecision.from_lvis_json
        metric = fill(alone, results, arrays=True)
        check(metric, expected, chosen)
        assert metric.compute()["map_per_class"].ndim == metric.compute()["classes"].ndim == 0


@pytest.mark.parametrize("kind", ["coco", "lvis"])
@pytest.mark.parametrize("classes", [None, [3, 5]])
def test_no_pictures(kind: str, classes: list[int] | None) -> None:
    keys: tuple[str, ...] = COCO_KEYS if kind == "coco" else LVIS_KEYS
    metric: Metric = COCOMeanAveragePrecision(classes=classes, arrays=True)
    if kind == "lvis":
        metric = LVISAveragePrecision(frequency={3: "r", 5: "c"}, classes=classes, arrays=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compute before update
        result = metric.compute()
    assert [float(result[key]) for key in keys] == [-1.0] * len(keys)
    assert result["classes"].tolist() == (classes or [])
    assert result["map_per_class"].tolist() == [-1.0] * len(classes or [])
    assert result["precision"].shape == (10, 101, len(classes or []), 4)
    assert (result["precision"] == -1).all()
    assert (result["recall"] == -1).all()


def test_files_without_pictures() -> None:
    gt: Content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a", "frequency": "r"}]}
    for metric in (COCOMeanAveragePrecision.from_coco_json(gt, []), LVISAveragePrecision.from_lvis_json(gt, [])):
        assert float(metric.compute()["map"]) == float(metric.compute()["mar_small"]) == -1.0


@pytest.mark.parametrize("seed", range(10))
def test_nothing_found(seed: int) -> None:
    gt, _ = coco_case(seed)
    check(COCOMeanAveragePrecision.from_coco_json(gt, [], arrays=True), coco_oracle(gt, []), seed)
    gt, _ = lvis_case(seed)
    check(LVISAveragePrecision.from_lvis_json(gt, [], arrays=True), lvis_oracle(gt, []), seed)
    gt, _ = segm_case(seed)
    metric = COCOMeanAveragePrecision.from_coco_json(gt, [], iou_type="segm", arrays=True)
    check(metric, coco_oracle(gt, [], "segm"), seed)


# Bad input


BOX = torch.tensor([[0.0, 0.0, 50.0, 50.0]])
PRED = {"boxes": BOX, "scores": torch.tensor([0.5]), "labels": torch.tensor([3])}
TARGET = {"boxes": BOX, "labels": torch.tensor([3])}
BAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "five numbers per box": ({"boxes": torch.zeros(1, 5)}, {}),
    "two numbers per box": ({"boxes": torch.zeros(2, 2)}, {}),
    "three axes": ({"boxes": torch.zeros(1, 1, 4)}, {}),
    "five numbers per object": ({}, {"boxes": torch.zeros(1, 5)}),
    "two scores": ({"scores": torch.ones(2)}, {}),
    "two labels": ({"labels": torch.tensor([3, 3])}, {}),
    "no labels": ({}, {"labels": torch.zeros(0, dtype=torch.long)}),
    "two areas": ({}, {"area": torch.ones(2)}),
    "no scores": ({"scores": None}, {}),
    "a label that is not declared": ({"labels": torch.tensor([4])}, {}),
    "an object of a class that is not declared": ({}, {"labels": torch.tensor([4])}),
    "scores elsewhere": ({"scores": torch.ones(1, device="meta")}, {}),
    "objects elsewhere": ({}, {"boxes": torch.zeros(1, 4, device="meta")}),
}


def changed(item: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**item, **change}.items() if value is not None}


@pytest.mark.parametrize("make", [COCOMeanAveragePrecision, LVISAveragePrecision])
@pytest.mark.parametrize("image", [48151623, "folder/picture 7.jpg"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_picture(make: type[Metric], image: int | str, name: str) -> None:
    pred, target = BAD[name]
    metric = make(classes=[3, 5])
    metric.update([PRED], [{**TARGET, "image_id": 1}])
    with pytest.raises(ValueError, match=str(image)):  # noqa: PT012 what depends on values is found without a sync
        metric.update(
            [PRED, changed(PRED, pred)], [{**TARGET, "image_id": 2}, changed({**TARGET, "image_id": image}, target)]
        )
        metric.compute()


OTHERS = {
    "a box": ({"boxes": BOX + 1}, {}),
    "a score": ({"scores": torch.tensor([0.25])}, {}),
    "a label": ({"labels": torch.tensor([5])}, {}),
    "an object": ({}, {"boxes": BOX + 1}),
    "an area": ({}, {"area": torch.tensor([7.0])}),
    "nothing found": ({"boxes": BOX[:0], "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}, {}),
}


@pytest.mark.parametrize("make", [COCOMeanAveragePrecision, LVISAveragePrecision])
@pytest.mark.parametrize("image", [48151623, "folder/picture 7.jpg"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_picture_twice_with_other_content_is_refused(make: type[Metric], image: int | str, name: str) -> None:
    pred, target = OTHERS[name]
    first = (PRED, {**TARGET, "image_id": image})
    second = ({**PRED, **pred}, {**TARGET, **target, "image_id": image})
    between = (PRED, {**TARGET, "image_id": 2})
    with pytest.raises(ValueError, match=str(image)):
        feed(make(), [first, between, second]).compute()
    kept = feed(make(on_conflict="first", classes=[3, 5]), [first, between, second], 1).compute()
    assert_same(kept, feed(make(classes=[3, 5]), [first, between]).compute())
    moved = feed(make(on_conflict="first", classes=[3, 5]), [second, between, first], 2).compute()
    assert_same(moved, feed(make(classes=[3, 5]), [second, between]).compute())


def test_lists_of_a_picture_are_part_of_its_content() -> None:
    first = (PRED, {**TARGET, "image_id": 48151623, "neg_labels": [5], "not_exhaustive_labels": [3]})
    changes: list[Content] = [
        {"neg_labels": []}, {"neg_labels": [7]}, {"neg_labels": [], "not_exhaustive_labels": [5, 3]}
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(ValueError, match="48151623"):
            feed(LVISAveragePrecision(), [first, (PRED, {**first[1], **change})]).compute()


def test_masks_are_part_of_the_content() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    target = {"masks": mask, "labels": torch.tensor([3]), "image_id": 48151623}
    pred = {"masks": mask, "labels": torch.tensor([3]), "scores": torch.tensor([0.5])}
    for other in (({**pred, "masks": mask.roll(1, 1)}, target), (pred, {**target, "masks": mask.roll(1, 1)})):
        with pytest.raises(ValueError, match="48151623"):
            feed(COCOMeanAveragePrecision(iou_type="segm"), [(pred, target), other]).compute()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"bbox": None}, "lacks 'bbox'"),
        ({"score": None}, "lacks 'score'"),
        ({"bbox": [1, 2, 3]}, "something else than expected"),
        ({"score": "0.5"}, "something else than expected .score '0.5'"),
        ({"image_id": None}, "lacks 'image_id'"),
    ],
)
def test_files_with_incomplete_entries_are_refused(entry: dict[str, Any], words: str) -> None:
    gt, results = coco_case(1)
    changed = {name: value for name, value in {**results[0], **entry}.items() if value is not None}
    with pytest.raises(AnnotationError, match=words):
        COCOMeanAveragePrecision.from_coco_json(gt, [*results[1:], changed])


def test_masks_of_probabilities_are_refused() -> None:
    target = {"masks": torch.ones(1, 8, 8, dtype=torch.bool), "labels": torch.tensor([3]), "image_id": 48151623}
    pred = {"masks": torch.rand(1, 8, 8), "labels": torch.tensor([3]), "scores": torch.tensor([0.5])}
    with pytest.raises(ValueError, match=r"48151623.*found torch.float32; give logits > 0"):
        COCOMeanAveragePrecision(iou_type="segm").update([pred], [target])


def test_names_of_pictures_outlive_forward() -> None:
    metric = COCOMeanAveragePrecision(classes=[3])
    with contextlib.suppress(ValueError):  # that of the batch
        metric([{**PRED, "labels": torch.tensor([4])}], [{**TARGET, "image_id": "picture 7"}])
    metric([PRED], [{**TARGET, "image_id": "picture 8"}])
    metric.update([{**PRED, "scores": torch.tensor([0.25])}], [{**TARGET, "image_id": "picture 8"}])
    with pytest.raises(ValueError, match=r"picture [78]"):
        metric.compute()


@pytest.mark.parametrize("masks", [None, torch.zeros(2, 8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)])
def test_bad_masks_name_the_picture(masks: Tensor | None) -> None:
    good = {**PRED, "masks": torch.ones(1, 8, 8, dtype=torch.bool)}
    target = {**TARGET, "masks": torch.ones(1, 8, 8, dtype=torch.bool), "image_id": 48151623}
    for pair in ((changed(good, {"masks": masks}), target), (good, changed(target, {"masks": masks}))):
        with pytest.raises(ValueError, match="48151623"):
            feed(COCOMeanAveragePrecision(iou_type="segm"), [pair]).compute()


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_results_of_unknown_images_are_refused(kind: str) -> None:
    gt, results = coco_case(1, exact=True) if kind == "coco" else lvis_case(1, exact=True)
    fill = COCOMeanAveragePrecision.from_coco_json if kind == "coco" else LVISAveragePrecision.from_lvis_json
    stranger = {"image_id": 99991, "category_id": gt["categories"][0]["id"], "bbox": [0, 0, 9, 9], "score": 1.0}
    with pytest.raises(ValueError, match="99991"):
        fill(gt, [*results, stranger])
