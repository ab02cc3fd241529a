"""The main job on real COCO pictures: fit, then validate and predict from its checkpoint."""

import csv
import json
from pathlib import Path

import pytest

from rft_lightning.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.sample_data
def test_fit_validate_and_predict_on_the_sample_tree(sample_data, tiny_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--config", str(CONFIGS / "coco.yaml"), "--model.policy", tiny_policy,
        "--data.root", str(sample_data / "coco2017_mini" / "coco"), "--data.train_split", "val2017",
        "--data.classes", "[person,bottle,bus]", "--data.num_workers", "0", "--data.eval_batch_size", "5",
        "--data.min_pixels", "784", "--data.max_pixels", "3136", "--model.max_completion_length", "8",
        "--model.group_size", "2", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true",
    ]  # fmt: skip
    main(["fit", *arguments, "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    # The exported processor resizes as in training.
    (processor,) = tmp_path.rglob("policy/processor_config.json")
    assert json.loads(processor.read_text())["image_processor"]["size"]["longest_edge"] == 3136
    main(["validate", *arguments, "--ckpt_path", str(checkpoint)])
    rows = [row for file in tmp_path.rglob("metrics.csv") for row in csv.DictReader(file.open())]
    assert sum(bool(row.get("val/map")) for row in rows) == 2
    main(["predict", *arguments, "--ckpt_path", str(checkpoint)])
    (file,) = tmp_path.rglob("predictions.jsonl")
    predictions = [json.loads(line) for line in file.read_text().splitlines()]
    annotations = json.loads((sample_data / "coco2017_mini/coco/annotations/instances_val2017.json").read_text())
    # Every category is asked of every picture, those without boxes and those with crowds included.
    assert {row["image_id"] for row in predictions} == {image["id"] for image in annotations["images"]}
    assert len(predictions) == 3 * len(annotations["images"])
