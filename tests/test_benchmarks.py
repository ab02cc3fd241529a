"""The benchmarks run; what they measure is not tested."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.filterwarnings("ignore:Left out of training:UserWarning")
def test_data_loading(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("dataloading", BENCHMARKS / "dataloading.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dataloading", module)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    spec.loader.exec_module(module)
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
