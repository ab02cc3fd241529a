"""The benchmarks run; what they measure is not tested."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

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


# Speed: the update, the rollout and the step --------------------------------------------------------------------------


@pytest.fixture
def load_beside(monkeypatch):
    """Loads a benchmark that imports another file of its folder."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return lambda name: load(name, monkeypatch)


def all_finite(figures):
    """Every number in nested dicts and lists."""
    if isinstance(figures, dict | list):
        return all(map(all_finite, figures.values() if isinstance(figures, dict) else figures))
    return not isinstance(figures, float) or math.isfinite(figures)


def test_routes_of_logprobs_agree(load_beside, tmp_path):
    module = load_beside("logprobs")
    model = module.load("cpu", module.build("cpu", tmp_path))
    prompt = module.prompts_of(tmp_path, 1, side=56)
    ids = module.random_completions("cpu", model, 3, 5)
    found = {}
    for route in module.ROUTES:
        logp, entropy = getattr(module, route)(model, prompt, ids, True)
        model.zero_grad()
        logp.mean().backward()
        found[route] = logp.detach(), entropy, model.get_input_embeddings().weight.grad.clone()
    for theirs, mine in zip(*found.values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert found["ours"][2].abs().max() > 1e-3
    assert found["ours"][1].shape == (1, 3, 5)


def test_peak_counts_what_is_gone_again(load_beside):
    module = load_beside("logprobs")
    torch.ones(2**26)  # 256 MiB that are none of its business
    peak = module.Peak()
    torch.ones(2**24)  # 64 MiB
    assert 60 < peak.mib() < 90


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_logprobs(load_beside, tmp_path, capsys):
    load_beside("logprobs").main(["--rounds", "1", "--output", f"{tmp_path}/o"])
    results = json.loads((tmp_path / "o").read_text())
    for name in ("log-probs", "log-probs and entropies"):
        found = results[name]
        assert all_finite(found)
        assert found["largest_difference"] < 1e-4
        assert found["gradient_norm_ratio"] == pytest.approx(1, abs=1e-4)
        assert found["memory_ratio"] > 4
    assert "vocabulary of 151936, 8 completions of 256 tokens" in capsys.readouterr().out


def test_rollout(load_beside, tmp_path, monkeypatch, capsys):
    module = load_beside("rollout")
    drawn = {name: [] for name in module.ENGINES}

    def recorded(name, engine):
        return lambda *arguments: drawn[name].append(engine(*arguments)) or drawn[name][-1]

    for name in module.ENGINES:
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    monkeypatch.setattr(module, "COPIED", 2**20)
    sizes = {"prompts": 2, "group-size": 3, "length": 4, "image-side": 56, "vocabulary": 1000, "rounds": 1}
    module.main([*[f"--{name}={value}" for name, value in sizes.items()], "--output", f"{tmp_path}/o"])
    results = json.loads((tmp_path / "o").read_text())
    assert all_finite(results)
    for name in module.ENGINES:
        times = {phase: results[phase][name] for phase in module.PHASES}
        assert times["rollout"] == pytest.approx(times["prefill"] + 3 * times["decode_step"])
        assert min(times.values()) > 0
        assert [ids.shape for ids in drawn[name]] == [(6, 4), (6, 4)]
        assert len(drawn[name][0].unique(dim=0)) == 6  # drawn, row by row
        assert not drawn[name][0].equal(drawn[name][1])
    # Float32 in 4 layers: 2 x 4 heads x 32 numbers per token of the cache.
    cached = 4 * 2 * 4 * 32 * 4
    reads = results["floor"]["bytes"]
    assert reads["prompt_cache"] == 2 * results["prompt_tokens"] * cached
    assert reads["completion_cache"] == 6 * 2 * cached
    assert "draw, vocabulary of 1000" in capsys.readouterr().out


def test_questions(load_beside, tmp_path, capsys):
    options = {"questions": [1, 3], "length": [4], "rounds": [1], "image-side": [56]}
    words = [word for name, values in options.items() for word in (f"--{name}", *map(str, values))]
    results = load_beside("questions").main([*words, "--output", f"{tmp_path}/o"])
    assert json.loads((tmp_path / "o").read_text()).keys() == results.keys()
    assert all_finite(results)
    for row in results["questions"].values():
        assert row["same_answers"] == 1
        assert min(row["seconds"].values()) > 0
    assert "generate / together" in capsys.readouterr().out


def test_sharing(load_beside, tmp_path, capsys):
    module = load_beside("sharing")
    options = {"group-sizes": [1, 3], "prompt-tokens": [90, 120], "length": [4], "rounds": [1], "cap": [300]}
    words = [word for name, values in options.items() for word in (f"--{name}", *map(str, values))]
    module.main([*words, "--output", f"{tmp_path}/o"])
    results = json.loads((tmp_path / "o").read_text())
    assert all_finite(results)
    assert [row["prompt_tokens"] for row in results["text"]["rows"]] == [90, 90, 120, 120]
    for kind in ("image", "text"):
        for row in results[kind]["rows"]:
            assert row["largest_difference"] < 1e-4
            assert row["shared_tokens"] == row["prompt_tokens"] + 4 * row["group_size"]
            assert (row["plain"] is None) == (row["repeated_tokens"] > 300)
            assert min(row[route] for route in module.SHARED) > 0
        assert set(results[kind]["lines"]) == set(module.SHARED)
    assert results["text"]["rows"][-1]["plain"] is None
    assert capsys.readouterr().out.splitlines()[5].endswith("-")


def test_the_line_of_sharing(load_beside):
    rows = [{"shared_tokens": count, "packed": 0.5 + 0.01 * count} for count in (100, 150, 400)]
    found = load_beside("sharing").line_through(rows, "packed")
    assert (found["start"], found["slope"], found["r2"]) == pytest.approx((0.5, 0.01, 1))
    assert found["spread"] == pytest.approx(0.015 / 0.01125)


@pytest.mark.slow
def test_step(load_beside, tmp_path, capsys):
    module = load_beside("step")
    module.main(["--group-sizes", "2", "--rounds", "1", "--length", "4", "--output", f"{tmp_path}/o"])
    results = json.loads((tmp_path / "o").read_text())
    found = results["group_sizes"]["2"]
    assert all_finite(found)
    for name in module.TRAINERS:
        assert found[name]["memory_mib"] > 100
        assert found[name]["prompts_per_second"] == pytest.approx(1 / found[name]["seconds"])
    assert found["ratio"]["median"] == pytest.approx(found["trl"]["seconds"] / found["ours"]["seconds"])
    assert "TRL time / ours" in capsys.readouterr().out
