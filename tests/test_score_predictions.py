"""Scores of predictions: ties, caps and chosen classes as pycocotools and lvis-api have them; what nobody asked."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rft_lightning.callbacks import DetectionMAP
from rft_lightning.cli import main
from rft_lightning.errors import AnnotationError, ConfigConflictError
from rft_lightning.evaluation.results import coco_results
from rft_lightning.evaluation.rows import line_of, read_predictions, row_of
from rft_lightning.lvis_api import load_lvis
from rft_lightning.metrics import COCOMeanAveragePrecision, LVISAveragePrecision
from rft_lightning.sample import Answer, DetectionTarget, Prediction, Sample, unasked
from rft_lightning.tasks import DetectionTask

KEYS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
NAMES = {1: "cat", 2: "dog", 3: "bus"}


def xyxy(boxes) -> list[list[float]]:
    return [[x, y, x + w, y + h] for x, y, w, h in boxes]


def make(images, seed: int = 0, scores=(1.0,), strays: int = 2) -> tuple[dict, list[Prediction]]:
    """Ground truth, and what is answered about every class of every picture."""
    rng, notes, predictions = np.random.default_rng(seed), [], []
    for image in images:
        for category, name in NAMES.items():
            true = [rng.uniform(0, 90, 4).round() + 5.0 for _ in range(rng.integers(0, 3))]
            extent = [{"bbox": box.tolist(), "area": float(box[2] * box[3])} for box in true]
            ids = ({"id": len(notes) + k, "image_id": image, "category_id": category} for k in range(1, 3))
            notes += [{**one, **other, "iscrowd": 0} for one, other in zip(ids, extent, strict=False)]
            said = [box + rng.normal(0, 2, 4).round() for box in true]
            said += [rng.uniform(5, 90, 4).round() for _ in range(strays)]
            answer = Answer(boxes=xyxy(said), confidences=rng.choice(scores, len(said)))
            target = DetectionTarget(xyxy(true), category=name, category_id=category, frequency="rcf"[category % 3])
            sample = Sample(f"{image}/{category}", Path("x.jpg"), target, DetectionTask(), (200, 200), image_id=image)
            predictions.append(Prediction(sample, "", answer))
    pictures = [
        {"id": image, "width": 200, "height": 200, "neg_category_ids": [1, 2, 3], "not_exhaustive_category_ids": []}
        for image in images
    ]
    categories = [{"id": key, "name": name, "frequency": "rcf"[key % 3]} for key, name in NAMES.items()]
    return {"images": pictures, "annotations": notes, "categories": categories}, predictions


def pycocotools(truth: dict, results: list[dict]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        own = COCO()
        own.dataset = copy.deepcopy(truth)
        own.createIndex()
        evaluation = COCOeval(own, own.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(KEYS, evaluation.stats, strict=False))


def write(tmp_path: Path, predictions: list[Prediction]) -> str:
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(line_of(row_of(prediction)) for prediction in predictions))
    return str(file)


def score(*words) -> dict:
    output = Path(words[0]).parent / "scored.json"
    main(["score", *map(str, words), "--output", str(output)])
    return json.loads(output.read_text())


@pytest.mark.parametrize("scores", [(1.0,), (0.5, 1.0)])
@pytest.mark.parametrize(
    "images", [[f"im/g {n}" for n in range(12)], [f"{n:04}" for n in range(9)], [7, 100, 20, 2**53]]
)
def test_ties_go_by_the_ids_as_they_are(images, scores, tmp_path):
    truth, predictions = make(images, scores=scores)
    results = coco_results(predictions, "confidence")
    wanted = pycocotools(truth, results)
    order = np.random.default_rng(1).permutation(len(predictions))
    found, _ = DetectionMAP().score([predictions[place] for place in order])
    assert {key: found[key] for key in KEYS} == pytest.approx(wanted, abs=1e-12)
    for name, content in (("gt.json", truth), ("results.json", results)):
        (tmp_path / name).write_text(json.dumps(content))
    of_file = score(tmp_path / "gt.json", tmp_path / "results.json")
    assert {key: of_file[key] for key in KEYS} == pytest.approx(wanted, abs=1e-12)
    # The ties decide: in another order the number is another.
    names = {image: f"{place}" for place, image in enumerate(reversed(images))}
    for prediction in predictions:
        prediction.sample.image_id = names[prediction.sample.image_id]
    assert DetectionMAP().score(predictions)[0]["map"] != pytest.approx(wanted["map"], abs=1e-3)


def test_numbers_and_strings_together():
    _, predictions = make([3, "3", "b"])
    found, _ = DetectionMAP().score(predictions)
    _, others = make([3, 4, 5])
    assert found["map"] == DetectionMAP().score(others)[0]["map"] > 0


def test_the_places_of_one_file_are_not_those_of_the_next():
    callback = DetectionMAP()
    for images in (["b", "a", "c"], ["a", "b", "z"], [5, 1]):
        truth, predictions = make(images)
        found, _ = callback.score(predictions)
        assert found["map"] == pytest.approx(pycocotools(truth, coco_results(predictions, "confidence"))["map"])


def test_lvis_caps_a_picture_before_classes_are_chosen(tmp_path):
    truth, predictions = make([1, 2, 3], seed=3, scores=np.linspace(0.01, 1, 97), strays=140)
    results = coco_results(predictions, "confidence")
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    api = load_lvis()
    own = api.LVIS(str(tmp_path / "gt.json"))
    evaluation = api.LVISEval(own, api.LVISResults(own, copy.deepcopy(results)), "bbox")
    evaluation.params.cat_ids = [1, 3]
    evaluation.run()
    wanted = evaluation.get_results()
    file = write(tmp_path, predictions)
    record = score(file, "--lvis", "--classes", "cat", "bus")
    found = record["metrics"]
    assert {key: found[key] for key in ("map", "map_50", "mar_300")} == pytest.approx(
        {"map": wanted["AP"], "map_50": wanted["AP50"], "mar_300": wanted["AR@300"]}, abs=1e-12
    )
    chosen = [prediction for prediction in read_predictions(file) if prediction.target.category != "dog"]
    callback = DetectionMAP(protocol="lvis")
    alone, _ = callback.score(chosen)
    assert alone["map"] != found["map"]  # 280 boxes a picture then, all of which take part
    assert alone["box_iou_mean"] == found["box_iou_mean"]  # of each question alone
    callback.choose_from(read_predictions(file))
    assert callback.score(chosen)[0]["map"] == found["map"]
    assert callback.score(chosen)[0] == alone


def test_classes_that_nobody_was_asked_about_are_missed(tmp_path):
    _, predictions = make([1, 2, 3, 4])
    predictions = [
        unasked(prediction.sample) if prediction.target.category == "cat" else prediction for prediction in predictions
    ]
    file = write(tmp_path, predictions)
    whole, cats = score(file), score(file, "--classes", "cat")
    assert whole["per_class"]["cat"] == 0
    assert cats["per_class"] == {"cat": 0.0}
    assert cats["samples"] == 0
    assert cats["metrics"]["map"] == cats["metrics"]["box_iou_mean"] == 0
    both = score(file, "--classes", "cat", "dog")
    assert both["metrics"]["map"] == pytest.approx(whole["per_class"]["dog"] / 2)
    with pytest.raises(ConfigConflictError, match="asks for no class '1'"):
        score(file, "--classes", "1")


def test_pictures_whose_names_are_no_utf8():
    names = [os.fsdecode(b"p\xff%d.jpg" % number) for number in range(6)]
    _, predictions = make(names)
    found, _ = DetectionMAP().score(predictions)
    for prediction in predictions:
        prediction.sample.image_id = names.index(prediction.sample.image_id)
    assert found == DetectionMAP().score(predictions)[0]


@pytest.mark.parametrize("metric", [COCOMeanAveragePrecision, LVISAveragePrecision])
@pytest.mark.parametrize("label", [2**53, 2**53 + 1, -(2**53)])
def test_class_ids_that_float64_does_not_hold_are_refused(metric, label):
    boxes, labels = torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([label])
    filled = metric()
    filled.update([{"boxes": boxes, "scores": torch.ones(1), "labels": labels}], [{"boxes": boxes, "labels": labels}])
    with pytest.raises(AnnotationError, match=r"class ids \(category_id\) below 2\*\*53, found"):
        filled.compute()
    with pytest.raises(AnnotationError, match=r"below 2\*\*53"):
        metric(classes=[1, label])
    held = torch.tensor([2**53 - 1])
    filled = metric()
    filled.update([{"boxes": boxes, "scores": torch.ones(1), "labels": held}], [{"boxes": boxes, "labels": held}])
    assert float(filled.compute()["map"]) == pytest.approx(1)
