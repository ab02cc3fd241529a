"""The benchmarks run; what they measure is not tested."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from rft_lightning.rewards import detection_iou_reward

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:Left out of training:UserWarning")
def test_data_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    module = load("dataloading", monkeypatch)
    sizes = {"pictures": 24, "batch-size": 2, "batches": 1, "rounds": 1, "large": 300, "start-rounds": 1}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    module.main(
        [*arguments, "--size", "64", "48", "--max-pixels", "3136", "--min-pixels", "784", "--output", f"{tmp_path}/o"]
    )
    results = json.loads((tmp_path / "o").read_text())
    for kind in ("detection", "classification"):
        assert set(results[kind]) == {"rft_lightning", "datasets", "torchvision"}
        assert all(math.isfinite(found["ours_to_this"]) for found in results[kind].values())
    assert "rft_lightning, second" in capsys.readouterr().out


def test_rewards(tmp_path, monkeypatch, capsys):
    module = load("rewards", monkeypatch)
    sizes = ["--boxes", "1", "3", "--completions", "2", "--rounds", "1", "--step-seconds", "4"]
    module.main([*sizes, "--output", f"{tmp_path}/o"])
    results = json.loads((tmp_path / "o").read_text())
    assert results["rewards"] == ["format", "iou", "confidence"]
    for kind in ("spread", "heaped"):
        for row in results[kind].values():
            assert row["share_of_step"] == pytest.approx((row["parse_ms"] + row["score_ms"]) / 4000)
    assert "a step takes 4 s" in capsys.readouterr().out
    # What is timed is what a good answer needs: it is read and earns.
    texts, target = module.make_batch("spread", 3, 2)
    for answer in module.read(texts, module.DetectionTask()):
        assert detection_iou_reward(answer, target) > 0.5


@pytest.mark.slow
def test_the_step_of_the_quickstart_is_measured(monkeypatch):
    module = load("rewards", monkeypatch)
    monkeypatch.setattr(module, "QUICKSTART_STEPS", 3)
    assert 0.01 < module.quickstart_step() < 100
