"""Two thousand steps with validations and checkpoints in between: nothing that the process holds grows.

Run with `make test-slow ARGS="tests/test_soak.py -s"`; it prints what was measured.
"""

import json

import numpy as np
import pytest

from tests.runs import configuration, fit, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STEPS, EVERY = 2000, 20


@pytest.fixture(scope="module", params=["full", "lora"])
def usage(request, tmp_path_factory):
    """Of one process, every twenty steps: name -> numbers; the first half is left out, as caches fill up then."""
    folder = tmp_path_factory.mktemp("soak")
    settings = configuration(
        steps=STEPS,
        prompts=2,
        lr=1e-4,
        optimizer="AdamW",
        lora=request.param == "lora",
        save_every=100,
        callbacks=[
            {"class_path": "probes.Usage", "init_args": {"every": EVERY}},
            {"class_path": "rft_lightning.callbacks.DetectionMAP"},
            {"class_path": "rft_lightning.callbacks.Throughput"},
        ],
        trainer={"limit_val_batches": 1.0, "val_check_interval": 100},
        model={"group_size": 2, "max_completion_length": 4, "micro_batch_prompts": None},
        data={"train_size": 50},
    )
    fit(folder, settings, timeout=3000)
    assert len(steps(folder)) == STEPS
    lines = [json.loads(line) for line in (folder / "usage.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS // EVERY
    return {name: np.array([line[name] for line in lines[len(lines) // 2 :]]) for name in lines[0]}


def growth(usage, name):
    """Of the line through the measurements, from the first to the last of them."""
    slope, _ = np.polyfit(usage["step"], usage[name], 1)
    return slope * (usage["step"][-1] - usage["step"][0])


def test_memory_stays(usage):
    """Within 2 MB in a thousand steps, 2 KB a step.

    One tensor kept from each rollout batch (its pictures alone are 0.6 MB) would be hundreds of times as much. What was
    measured is 0.00 MB, for both kinds of tuning; the bound leaves room for allocators that keep freed pages otherwise.
    """
    memory = usage["memory"] / 1e6
    print(f"\nresident {memory.min():.1f} to {memory.max():.1f} MB, growth {growth(usage, 'memory') / 1e6:+.2f} MB")
    assert growth(usage, "memory") < 2e6


def test_objects_stay(usage):
    """Python keeps no more objects; one a step would be a thousand."""
    print(f"\nobjects {usage['objects'].min()} to {usage['objects'].max()}, growth {growth(usage, 'objects'):+.0f}")
    assert growth(usage, "objects") < 300


@pytest.mark.parametrize("name", ["files", "threads"])
def test_files_and_threads_stay(usage, name):
    print(f"\n{name} {usage[name].min()} to {usage[name].max()}")
    assert usage[name].max() <= usage[name][0]
