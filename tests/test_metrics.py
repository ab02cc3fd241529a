"""Metrics: equal to independent implementations, whatever the order, the batches and the repeats."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics import MetricCollection
from torchvision import ops

from rft_lightning.errors import AnnotationError, DatasetNotFoundError
from rft_lightning.metrics import (
    BoxIoU,
    ClassificationAccuracy,
    ClassNames,
    COCOMeanAveragePrecision,
    MaskIoU,
    MatchedIoU,
    ParseRate,
    stable_id,
)
from rft_lightning.sample import Answer, ClassTarget, DetectionTarget, GroundingTarget

SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
RECALLS = ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")


def random_boxes(rng: np.random.Generator, count: int, scale: float = 200.0) -> np.ndarray:
    """[count, 4] xywh of all COCO sizes, many of them overlapping."""
    side = scale * rng.uniform(0.02, 1.0, (count, 2))
    return np.concatenate([rng.uniform(0, scale / 2, (count, 2)), side], 1).round(1)


def jitter(rng: np.random.Generator, boxes: np.ndarray) -> np.ndarray:
    noisy = boxes + rng.normal(0, 0.08, boxes.shape) * boxes[:, [2, 3, 2, 3]]
    return np.concatenate([noisy[:, :2], noisy[:, 2:].clip(1)], 1).round(1)


def random_coco(seed: int, images: int = 12, classes: int = 4) -> tuple[dict, list[dict]]:
    """Ground truth and results in COCO format: crowds, empty images, tied scores, unordered and large ids."""
    rng = np.random.default_rng(seed)
    ids = [int(i) for i in rng.choice(10**6, images, replace=False)]
    ids[0] = 2**53 + 1  # no float64 holds it
    categories = sorted(int(c) for c in rng.choice(90, classes, replace=False))
    notes, results = [], []
    for image in ids:
        for category in categories:
            boxes = random_boxes(rng, int(rng.integers(0, 4)))
            for box in boxes:
                area = float(box[2] * box[3] * rng.uniform(0.4, 1))
                crowd = int(rng.random() < 0.2)
                note = {"id": len(notes) + 1, "image_id": image, "category_id": category, "bbox": box.tolist()}
                notes.append({**note, "area": area, "iscrowd": crowd})
            found = np.concatenate([jitter(rng, boxes), random_boxes(rng, int(rng.integers(0, 3)))])
            for box in found[: len(found) if rng.random() < 0.9 else 0]:
                score = float(rng.choice([0.5, 0.9, 1.0, round(rng.random(), 2)]))
                results.append({"image_id": image, "category_id": category, "bbox": box.tolist(), "score": score})
    order = rng.permutation(len(results))
    truth = {
        "images": [{"id": image} for image in ids],
        "categories": [{"id": category, "name": str(category)} for category in categories],
        "annotations": notes,
    }
    return truth, [results[i] for i in order]


def official(truth: dict, results: list[dict]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(json.dumps(truth))
        gt.createIndex()
        evaluation = COCOeval(gt, gt.loadRes(json.loads(json.dumps(results))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def xyxy(boxes: list[list[float]]) -> Tensor:
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def questions(truth: dict, results: list[dict], per_class: bool) -> list[tuple[dict, dict]]:
    """(pred, target) of each image, or of each image and category."""
    items = []
    categories = [category["id"] for category in truth["categories"]]
    for image in (image["id"] for image in truth["images"]):
        for query in categories if per_class else [None]:
            notes = [n for n in truth["annotations"] if n["image_id"] == image and query in (None, n["category_id"])]
            found = [r for r in results if r["image_id"] == image and query in (None, r["category_id"])]
            pred = {
                "boxes": xyxy([r["bbox"] for r in found]),
                "scores": torch.tensor([r["score"] for r in found], dtype=torch.float64),
                "labels": torch.tensor([r["category_id"] for r in found], dtype=torch.long),
            }
            target = {
                "boxes": xyxy([n["bbox"] for n in notes]),
                "labels": torch.tensor([n["category_id"] for n in notes], dtype=torch.long),
                "area": torch.tensor([n["area"] for n in notes], dtype=torch.float64),
                "iscrowd": torch.tensor([n["iscrowd"] for n in notes], dtype=torch.long),
                "image_id": image,
            }
            items.append((pred, target if query is None else {**target, "query": query}))
    return items


def filled(items: list[tuple[dict, dict]], batch: int = 3, **kwargs: object) -> COCOMeanAveragePrecision:
    metric = COCOMeanAveragePrecision(**kwargs)
    for start in range(0, len(items), batch):
        preds, targets = zip(*items[start : start + batch], strict=True)
        metric.update(preds, targets)
    return metric


def assert_same(a: dict, b: dict, tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def assert_official(result: dict, evaluation: COCOeval) -> None:
    found = [float(result[name]) for name in (*SUMMARY, *RECALLS)]
    np.testing.assert_allclose(found, evaluation.stats, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_coco_json_equals_pycocotools(seed: int) -> None:
    truth, results = random_coco(seed)
    evaluation = official(truth, results)
    result = COCOMeanAveragePrecision.from_coco_json(truth, results).compute()
    assert_official(result, evaluation)
    assert result["map"].dtype == torch.float64
    assert 0 < float(result["map"]) < 1
    precision = evaluation.eval["precision"][..., 0, -1]
    for k, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, k][precision[:, :, k] > -1]
        assert int(result["classes"][k]) == category
        assert float(result["map_per_class"][k]) == pytest.approx(values.mean() if values.size else -1, abs=1e-12)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_coco_updates_equal_pycocotools(seed: int, per_class: bool) -> None:
    truth, results = random_coco(seed)
    # Corners and back move a side by an ulp, which could flip a tie between overlaps but not these.
    result = filled(questions(truth, results, per_class)).compute()
    assert_official(result, official(truth, results))


def test_coco_order_batches_and_repeats_do_not_matter() -> None:
    truth, results = random_coco(3)
    items = questions(truth, results, per_class=True)
    once = filled(items).compute()
    generator = np.random.default_rng(0)
    shuffled = [items[i] for i in generator.permutation(len(items))]
    assert_same(filled(shuffled, batch=7).compute(), once)
    assert_same(filled([*shuffled, *items[:5], *items[:5]], batch=2).compute(), once)


def test_coco_without_query_an_image_counts_once() -> None:
    truth, results = random_coco(4)
    items = questions(truth, results, per_class=False)
    assert_same(filled([*items, items[2]]).compute(), filled(items).compute())


def test_coco_images_without_ids_are_all_different() -> None:
    pred = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "scores": torch.tensor([0.5]), "labels": torch.tensor([1])}
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}
    metric = COCOMeanAveragePrecision()
    for _ in range(3):
        metric(preds=[pred], targets=[target])  # forward, which resets and restores the states
    assert metric._tables().n_images == 3
    assert float(metric.compute()["map"]) == pytest.approx(1)


def test_coco_absent_category_makes_false_positives() -> None:
    box = torch.tensor([[0.0, 0, 50, 50]])
    hit = {"boxes": box, "scores": torch.tensor([0.4]), "labels": torch.tensor([7])}
    found = {"boxes": box, "labels": torch.tensor([7]), "image_id": "a", "query": 7}
    absent = {"boxes": box[:0], "labels": torch.zeros(0), "image_id": "b", "query": 7}
    metric = COCOMeanAveragePrecision()
    metric.update([hit], [found])
    assert float(metric.compute()["map"]) == pytest.approx(1)
    metric.update([{**hit, "scores": torch.tensor([0.9])}], [absent])
    assert float(metric.compute()["map"]) == pytest.approx(0.5)


def test_coco_nothing_found_and_nothing_seen() -> None:
    truth, _ = random_coco(0)
    result = COCOMeanAveragePrecision.from_coco_json(truth, []).compute()
    assert float(result["map"]) == 0.0
    assert float(result["mar_100"]) == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = COCOMeanAveragePrecision().compute()
    assert [float(empty[name]) for name in (*SUMMARY, *RECALLS)] == [-1.0] * 12
    assert len(empty["map_per_class"]) == len(empty["classes"]) == 0


def test_coco_only_crowds_and_no_objects_are_absent() -> None:
    box = torch.tensor([[0.0, 0, 50, 50]])
    pred = {"boxes": box, "scores": torch.tensor([0.4]), "labels": torch.tensor([1])}
    target = {"boxes": box, "labels": torch.tensor([1]), "iscrowd": torch.tensor([1]), "image_id": 1}
    metric = COCOMeanAveragePrecision()
    metric.update([pred], [target])
    assert float(metric.compute()["map"]) == -1.0


def test_coco_classes_of_the_file_and_the_argument() -> None:
    truth, results = random_coco(1)
    stranger = {"image_id": truth["images"][0]["id"], "category_id": 91, "bbox": [0, 0, 9, 9], "score": 1.0}
    truth["categories"].append({"id": 92, "name": "never seen"})
    result = COCOMeanAveragePrecision.from_coco_json(truth, [*results, stranger]).compute()
    assert result["classes"].tolist() == [category["id"] for category in truth["categories"]]
    assert float(result["map_per_class"][-1]) == -1
    assert_official(result, official(truth, results))
    chosen = [category["id"] for category in truth["categories"][:2]]
    some = COCOMeanAveragePrecision.from_coco_json(truth, results, classes=chosen).compute()
    torch.testing.assert_close(some["map_per_class"], result["map_per_class"][:2])


def test_coco_string_ids_and_missing_fields(tmp_path) -> None:
    truth, results = random_coco(2)
    for note in truth["annotations"]:
        note["area"] = note["bbox"][2] * note["bbox"][3]
    expected = COCOMeanAveragePrecision.from_coco_json(truth, results).compute()
    name = {image["id"]: f"image_{image['id']:020d}" for image in truth["images"]}
    text = json.dumps(truth["annotations"])
    notes = [{**note, "image_id": name[note["image_id"]]} for note in json.loads(text)]
    for note in notes:
        del note["area"]
        if not note["iscrowd"]:
            del note["iscrowd"]
    renamed = {**truth, "images": [{"id": name[image["id"]]} for image in truth["images"]], "annotations": notes}
    found = [{**result, "image_id": name[result["image_id"]]} for result in results]
    (tmp_path / "gt.json").write_text(json.dumps(renamed))
    (tmp_path / "results.json").write_text(json.dumps(found))
    result = COCOMeanAveragePrecision.from_coco_json(tmp_path / "gt.json", str(tmp_path / "results.json")).compute()
    assert_same(result, expected)


def test_coco_errors_say_what_is_wrong(tmp_path) -> None:
    truth, results = random_coco(0)
    with pytest.raises(AnnotationError, match="name 1 images"):
        COCOMeanAveragePrecision.from_coco_json(truth, [{**results[0], "image_id": -5}])
    with pytest.raises(AnnotationError, match="order of the two arguments"):
        COCOMeanAveragePrecision.from_coco_json(results, truth)
    with pytest.raises(DatasetNotFoundError, match="does not exist"):
        COCOMeanAveragePrecision.from_coco_json(tmp_path / "none.json", results)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(AnnotationError, match="no JSON"):
        COCOMeanAveragePrecision.from_coco_json(tmp_path / "bad.json", results)
    metric = COCOMeanAveragePrecision()
    boxes, labels = torch.zeros(1, 4), torch.zeros(1)
    with pytest.raises(ValueError, match="scores"):
        metric.update([{"boxes": boxes, "labels": labels}], [{"boxes": boxes, "labels": labels}])
    pred = {"boxes": boxes, "labels": labels[:0], "scores": labels}
    with pytest.raises(ValueError, match="expected labels of shape"):
        metric.update([pred], [{"boxes": boxes, "labels": labels}])
    with pytest.raises(ValueError, match="one target per prediction"):
        metric.update([pred], [])


def brute_force_matched(boxes: Tensor, truth: Tensor) -> float:
    iou = ops.box_iou(boxes, truth)
    pairs = sorted((-float(iou[i, j]), i, j) for i in range(len(boxes)) for j in range(len(truth)))
    used_boxes, used_truth, total = set(), set(), 0.0
    for negative, i, j in pairs:
        if i not in used_boxes and j not in used_truth:
            used_boxes.add(i)
            used_truth.add(j)
            total -= negative
    return total


def test_matched_iou_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    metric, total, count, parsed_total, parsed_count = MatchedIoU(), 0.0, 0, 0.0, 0
    for number in range(60):
        truth = xyxy(random_boxes(rng, int(rng.integers(0, 5))).tolist())
        boxes = xyxy(random_boxes(rng, int(rng.integers(0, 6))).tolist())
        answer = Answer(boxes=boxes, parsed=bool(rng.random() < 0.5))
        metric.update([answer], [DetectionTarget(boxes=truth)], [f"sample {number}"])
        if number % 7 == 0:
            metric.update([Answer()], [DetectionTarget(boxes=truth)], [f"sample {number}"])  # repeated: first counts
        value = brute_force_matched(boxes, truth)
        total, count = total + value, count + len(truth)
        if answer.parsed:
            parsed_total, parsed_count = parsed_total + value, parsed_count + len(truth)
    result = metric.compute()
    assert float(result["box_iou_mean"]) == pytest.approx(total / count, abs=1e-12)
    assert float(result["box_iou_mean_parsed"]) == pytest.approx(parsed_total / parsed_count, abs=1e-12)
    assert parsed_count < count == int(result["n_boxes"])


def test_matched_iou_takes_the_best_pair_first() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]], dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10]], dtype=torch.float64)
    metric = MatchedIoU()
    metric.update([{"boxes": boxes}], [{"boxes": truth}])
    assert float(metric.compute()["box_iou_mean"]) == pytest.approx(0.5)  # (1 + 0) / 2


def test_matched_iou_without_boxes_is_absent() -> None:
    metric = MatchedIoU()
    metric.update([Answer(no_objects=True)], [DetectionTarget(boxes=[])])
    result = metric.compute()
    assert [float(value) for value in result.values()] == [-1, -1, 0]


def test_matched_iou_takes_samples_without_boxes_beside_those_on_a_device() -> None:
    boxes = torch.zeros(2, 4, device="meta")
    metric = MatchedIoU().to("meta")
    metric.update([[], boxes, []], [[], boxes, boxes])
    assert (metric.values[-1].device.type, metric.values[-1].shape) == ("meta", (3, 3))


def test_box_iou_equals_torchvision() -> None:
    rng = np.random.default_rng(1)
    truth, boxes = xyxy(random_boxes(rng, 40).tolist()), xyxy(random_boxes(rng, 40).tolist())
    truth[0], boxes[0] = torch.tensor([0, 0, 2, 1]), torch.tensor([0, 0, 1, 1])  # an exact half
    answers = [Answer(boxes=box) for box in boxes] + [Answer()] * 10
    targets = [GroundingTarget(boxes=box) for box in [*truth, *truth[:10]]]
    ids = list(range(50))
    iou = torch.cat([ops.box_iou(boxes, truth).diag(), torch.zeros(10, dtype=torch.float64)])
    giou = torch.cat([ops.generalized_box_iou(boxes, truth).diag(), -torch.ones(10, dtype=torch.float64)])
    metric, strict = BoxIoU(), BoxIoU(strict=True)
    for chosen in (metric, strict):
        chosen.update(answers[30:], targets[30:], ids[30:])
        chosen.update(answers[:35], targets[:35], ids[:35])
    result = metric.compute()
    assert float(result["box_iou_mean"]) == pytest.approx(float(iou.mean()), abs=1e-12)
    assert float(result["box_giou_mean"]) == pytest.approx(float(giou.mean()), abs=1e-12)
    assert float(result["acc_50"]) == pytest.approx(float((iou >= 0.5).double().mean()))
    assert float(strict.compute()["acc_50"]) == pytest.approx(float((iou > 0.5).double().mean()))


def test_box_iou_needs_a_target_box() -> None:
    with pytest.raises(ValueError, match="found none"):
        BoxIoU().update([Answer()], [GroundingTarget(boxes=[])])


def test_box_iou_of_swapped_corners_is_no_answer() -> None:
    metric = BoxIoU()
    metric.update([Answer(boxes=[[9, 9, 5, 5]])], [GroundingTarget(boxes=[[5, 5, 9, 9]])])
    assert [float(value) for value in metric.compute().values()] == [0, 0, -1]


def test_box_iou_reads_the_first_boxes() -> None:
    metric = BoxIoU()
    metric.update([Answer(boxes=[[0, 0, 1, 1], [5, 5, 9, 9]])], [GroundingTarget(boxes=[[5, 5, 9, 9], [0, 0, 1, 1]])])
    assert float(metric.compute()["box_iou_mean"]) == 0.0


def test_classification_accuracy() -> None:
    cases = [  # said, right, strict, lenient
        ("Rose", "rose", 1, 1),
        ("rose", "primrose", 0, 1),
        ("a tulip", "tulip", 0, 1),
        ("daisy", "tulip", 0, 0),
        (None, "tulip", 0, 0),
        ("fire lily", "fire_lily", 1, 1),
    ]
    metric = ClassificationAccuracy()
    for number, (said, right, _, _) in enumerate(cases):
        metric.update([Answer(label=said)], [ClassTarget(label=right)], [number])
    metric.update([Answer(label="tulip")], [ClassTarget(label="tulip")], [3])  # repeated: the first answer counts
    metric.update([Answer(label="rose", answer_blocks=0)], [ClassTarget(label="rose")], [len(cases)])  # no tags
    result = metric.compute()
    assert float(result["accuracy"]) == pytest.approx(2 / 7)
    assert float(result["accuracy_lenient"]) == pytest.approx(4 / 7)
    assert result["classes"] == ["fire_lily", "primrose", "rose", "tulip"]
    assert result["accuracy_per_class"].tolist() == pytest.approx([1, 0, 0.5, 0])


def test_states_survive_reset_and_forward() -> None:
    metric = ClassificationAccuracy()
    metric(answers=[Answer(label="a")], targets=[ClassTarget(label="a")])
    metric(answers=[Answer(label="b")], targets=[ClassTarget(label="a")])
    assert float(metric.compute()["accuracy"]) == 0.5
    metric.reset()
    metric.update([], [])
    result = metric.compute()
    assert float(result["accuracy"]) == -1
    assert result["classes"] == []


def test_parse_rate_and_names() -> None:
    rate = ParseRate()
    rate.update([Answer(parsed=True), Answer(parsed=False), Answer(parsed=False)], ["a", "b", "b"])
    expected = {"parse_rate": 0.5, "n_samples": 2, "n_unasked": 0}
    assert {name: float(value) for name, value in rate.compute().items()} == expected
    rate.update([Answer(parsed=False), Answer(parsed=False)], ["c", "c"], unasked=[True, True])
    assert {name: float(value) for name, value in rate.compute().items()} == expected | {"n_unasked": 1}
    rate.reset()
    rate.update([Answer(parsed=False)], ["c"], unasked=[True])
    assert {name: float(value) for name, value in rate.compute().items()} == {
        "parse_rate": -1, "n_samples": 0, "n_unasked": 1,
    }  # fmt: skip
    names = ClassNames()
    names.update({2: "b\u00e9b\u00e9", 1: "z"})
    names.update({2: "b\u00e9b\u00e9", 3: ""})
    assert names.compute() == {3: "", 2: "b\u00e9b\u00e9", 1: "z"}
    assert list(names.compute()) == [3, 2, 1]


def test_names_that_are_no_utf8() -> None:
    odd = os.fsdecode(b"p\xff.jpg")
    rate, names = ParseRate(), ClassNames()
    rate.update([Answer(parsed=True)] * 3, [odd, odd, os.fsdecode(b"p\xfe.jpg")])
    assert float(rate.compute()["n_samples"]) == 2
    names.update({1: odd})
    assert names.compute() == {1: odd}


def test_stable_ids() -> None:
    assert stable_id(-3) == -3
    assert stable_id("000000391895") == 1105172994040823038  # the same on every machine


def test_ids_must_match_the_samples() -> None:
    with pytest.raises(ValueError, match="one id per sample"):
        ParseRate().update([Answer()], ["a", "b"])


def test_metrics_without_ids_may_be_merged() -> None:
    right, wrong = [torch.tensor([[0.0, 0, 10, 10]])], [torch.tensor([[0.0, 0, 10, 4]])]
    one, other = BoxIoU(), BoxIoU()
    one.update(right, right)
    other.update(wrong, right)
    copied = copy.deepcopy(one)
    copied.update(wrong, right)
    for added, expected in ((other, 0.7), (copied, 0.8)):
        whole = BoxIoU()
        whole.update(right, right)
        whole.merge_state(added)
        assert float(whole.compute()["box_iou_mean"]) == pytest.approx(expected)


@pytest.mark.parametrize("image", [1.5, torch.tensor([1, 2]), [3], 2**70])
def test_ids_that_are_none_are_refused(image: Any) -> None:
    item = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    with pytest.raises(ValueError, match="image_id"):
        COCOMeanAveragePrecision().update([{**item, "scores": torch.zeros(0)}], [{**item, "image_id": image}])


def test_labels_are_whole_numbers() -> None:
    item = {"boxes": torch.ones(1, 4), "labels": torch.tensor([1.7]), "scores": torch.ones(1), "image_id": 7}
    with pytest.raises(ValueError, match="Image 7: expected labels as whole numbers"):
        COCOMeanAveragePrecision().update([item], [item])


def test_protocols_of_mask_iou_stay_apart_in_a_collection() -> None:
    both = MetricCollection({"lisa": MaskIoU(), "published": MaskIoU(protocol="published_code")})
    alone = MaskIoU(protocol="published_code")
    said, truth = torch.ones(1, 2, 2, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.uint8)
    ignored = torch.tensor([[[1, 255], [0, 0]]], dtype=torch.uint8)
    for metric in (both, alone):
        metric.update(said, truth, ids=[1])
        metric.update(said, ignored, ids=[2])
    assert float(both["published"].compute()["mask_iou_mean"]) == float(alone.compute()["mask_iou_mean"])
    assert float(both["lisa"].compute()["mask_iou_mean"]) != float(alone.compute()["mask_iou_mean"])
