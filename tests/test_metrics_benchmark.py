"""benchmarks/metrics.py runs, on data as it should be; and what docs/metrics.md says of other evaluators is so."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.detection import IntersectionOverUnion, MeanAveragePrecision

from rft_lightning.lvis_api import load_lvis
from rft_lightning.metrics.coco_map import COCOMeanAveragePrecision
from rft_lightning.metrics.lvis_ap import LVISAveragePrecision

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
needs_faster = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed (extra bench)"
)


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("metrics_data", "metrics"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("metrics", BENCHMARKS / "metrics.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "metrics", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("metrics_data", None)


# The benchmark --------------------------------------------------------------------------------------------------------


def test_a_small_run(benchmark_module, tmp_path, capsys):
    small = ["--scale", "0.01", "--rounds", "2", "--orders", "3", "--memory"]
    benchmark_module.main([*small, "--presets", "coco100", "lvis", "--output", f"{tmp_path}/o"])
    results = json.loads((tmp_path / "o").read_text())
    for preset, reference in (("coco100", "pycocotools"), ("lvis", "lvis-api")):
        found = results["presets"][preset]
        assert {"rft_lightning", reference} <= set(found)
        assert found["rft_lightning"]["difference"] < 1e-9
        assert found["rft_lightning"]["this_to_ours"] == 1
        assert 0.05 < found["rft_lightning"]["numbers"][0] < 0.95
        assert all(row["ms"] >= row["evaluation_ms"] > 0 for row in found.values())
    ties = results["ties"]
    assert ties["as they are"]["lowest"] == ties["as they are"]["highest"]
    assert ties["all equal"]["lowest"] < ties["all equal"]["highest"]
    assert "rft_lightning" in capsys.readouterr().out


def test_slow_evaluators_can_be_left_out_and_one_process_measures_memory(benchmark_module, capsys):
    small = ["--scale", "0.01", "--rounds", "1", "--orders", "0", "--presets", "fewshot"]
    found = benchmark_module.main([*small, "--skip-slow", "--memory"])["presets"]["fewshot"]
    assert not any("pycocotools" in name for name in found)
    assert found["rft_lightning"]["difference"] is None
    benchmark_module.main(["--scale", "0.1", "--presets", "coco100", "--memory-of", "pycocotools"])
    assert 1 < float(capsys.readouterr().out.splitlines()[-1]) < 1000


@pytest.mark.parametrize("name", ["coco500", "coco100", "few-answers", "fewshot", "dense", "lvis"])
def test_the_generated_data(name, benchmark_module):
    preset = benchmark_module.PRESETS[name].scaled(0.05)
    data, again = benchmark_module.generate(preset), benchmark_module.generate(preset)
    assert np.array_equal(data.det_boxes, again.det_boxes)
    assert len(data.gt_boxes) == preset.objects
    assert len(data.det_boxes) == len(data.det_scores) == preset.detections
    assert (np.diff(data.gt_image) >= 0).all()
    assert (np.diff(data.det_image) >= 0).all()
    for boxes in (data.gt_boxes, data.det_boxes):
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert set(data.det_class.tolist()) <= set(range(1, preset.classes + 1))
    # Tensors and file contents are the same data.
    truth, results = benchmark_module.annotations(data)
    preds = [pred for batch, _ in benchmark_module.batches(data, 8, "cpu") for pred in batch]
    assert len(preds) == len(truth["images"]) == preset.images
    assert torch.cat([pred["labels"] for pred in preds]).tolist() == [entry["category_id"] for entry in results]
    crowded = np.bincount(data.det_image).max()
    assert (crowded > 300) == (name == "lvis"), "only LVIS limits the detections of a picture over all classes"


# Other evaluators -----------------------------------------------------------------------------------------------------


def boxes_in_a_row(count):
    """[K, 4] xyxy, apart from each other."""
    left = 30.0 * torch.arange(count)
    return torch.stack([left, torch.zeros(count), left + 20, torch.full((count,), 20.0)], 1)


def test_torchmetrics_misses_recall_points_that_are_hit_exactly():
    """Its recall points are of float32: some lie above the hundredth that they stand for."""
    points = torch.linspace(0, 1, 101).tolist()
    hits = next(hits for hits in range(1, 21) if points[5 * hits] > hits / 20)
    truth, ones = boxes_in_a_row(20), torch.ones(20, dtype=torch.long)
    preds = [{"boxes": truth[:hits], "scores": torch.ones(hits), "labels": ones[:hits]}]
    ours, theirs = COCOMeanAveragePrecision(), MeanAveragePrecision()
    for metric in (ours, theirs):
        metric.update(preds, [{"boxes": truth, "labels": ones}])
    assert float(ours.compute()["map"]) == pytest.approx((5 * hits + 1) / 101, abs=1e-12)
    found = theirs.compute()["map"]
    assert float(found) == pytest.approx(5 * hits / 101, abs=1e-6)
    assert found.dtype == torch.float32


def test_torchmetrics_iou_averages_all_pairs():
    boxes, ones = boxes_in_a_row(2), torch.ones(2, dtype=torch.long)
    metric = IntersectionOverUnion()
    metric.update([{"boxes": boxes, "labels": ones}], [{"boxes": boxes, "labels": ones}])
    assert float(metric.compute()["iou"]) == pytest.approx(0.5)


@pytest.mark.parametrize(("number", "right"), [(1, 1.0), (0, 0.0)])
def test_pycocotools_takes_id_0_for_unmatched(number, right, benchmark_module):
    truth, results = federated([(1, [0, 0, 9, 9], 0.9)], [(1, [0, 0, 9, 9])])
    truth["annotations"][0] |= {"id": number, "iscrowd": 0}
    assert float(COCOMeanAveragePrecision.from_coco_json(truth, results).compute()["map"]) == pytest.approx(1.0)
    with benchmark_module.quiet():
        numbers = benchmark_module.run_pycocotools((truth, results), benchmark_module.Clock("cpu"))
    assert numbers[0] == pytest.approx(right)


def federated(found, objects):
    """One picture of LVIS: (class, xywh, score) that were found, (class, xywh) that are there."""
    truth = {
        "images": [{"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []}],
        "categories": [{"id": number, "name": str(number), "frequency": "rcf"[number - 1]} for number in (1, 2, 3)],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": label, "bbox": box, "area": box[2] * box[3]}
            for n, (label, box) in enumerate(objects, start=1)
        ],
    }
    results = [{"image_id": 1, "category_id": label, "bbox": box, "score": score} for label, box, score in found]
    return truth, results


@needs_faster
@pytest.mark.parametrize(
    ("found", "objects", "right", "theirs"),
    [
        pytest.param(
            [(1, [50, 50, 9, 9], 0.9)] * 300 + [(2, [0, 0, 9, 9], 0.5)],
            [(1, [0, 0, 9, 9]), (2, [0, 0, 9, 9])],
            0.0, 0.5, id="300 detections are the limit of a picture, not of each of its categories",
        ),
        pytest.param(
            [(1, [0, 0, 9, 0], 0.9), (1, [0, 0, 9, 9], 0.5)], [(1, [0, 0, 9, 9])], 1.0, 0.5, id="a box without area",
        ),
    ],
)  # fmt: skip
def test_faster_coco_eval_lacks_two_rules_of_lvis(found, objects, right, theirs, benchmark_module, tmp_path):
    truth, results = federated(found, objects)
    ours = LVISAveragePrecision.from_lvis_json(truth, results).compute()["map"]
    assert float(ours) == pytest.approx(right, abs=1e-9)
    file = tmp_path / "gt.json"
    file.write_text(json.dumps(truth))
    api = load_lvis()
    reference = api.LVISEval(
        api.LVIS(str(file)), api.LVISResults(str(file), [dict(entry) for entry in results]), "bbox"
    )
    reference.run()
    assert reference.get_results()["AP"] == pytest.approx(right, abs=1e-9)
    with benchmark_module.quiet():
        numbers = benchmark_module.run_faster((truth, results), benchmark_module.Clock("cpu"), lvis=True)
    assert numbers[0] == pytest.approx(theirs, abs=1e-9)
