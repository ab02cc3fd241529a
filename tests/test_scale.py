"""Two processes against one with the same global batch, through the command line: completions, losses, updates, export.

Prompts and completions differ in length between the ranks, all three tasks take part, and beta > 0.
"""

import pytest
import torch

from rft_lightning.cli import main
from rft_lightning.policy.loading import load_policy
from tests.runs import POLICY, configuration, fit, flat, last, losses, rollouts, weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def fsdp2(**options):
    return {"class_path": "rft_lightning.sharding.FSDP2Strategy", "init_args": options}


STEPS = 5
LAYOUTS = {
    "one": {"processes": 1},
    "ddp": {"processes": 2, "strategy": "ddp"},
    "fsdp2": {"processes": 2, "strategy": "fsdp2"},
    "one file": {"processes": 2, "strategy": fsdp2(save_distributed_checkpoint=False)},
    "gradients summed once a step": {"processes": 2, "strategy": "fsdp2", "model": {"sync_gradients": "step"}},
    "gradient checkpointing": {"processes": 2, "strategy": "fsdp2", "model": {"gradient_checkpointing": True}},
    "gradient checkpointing, ddp": {"processes": 2, "strategy": "ddp", "model": {"gradient_checkpointing": True}},
    "rollouts by sharded weights": {"processes": 2, "strategy": fsdp2(gather_for_rollouts=False)},
    "hybrid, copies of one": {"processes": 2, "strategy": fsdp2(shard_size=1)},
    "hybrid, two copies of two": {"processes": 4, "strategy": fsdp2(shard_size=2)},
}
TUNINGS = {
    "full": {"lora": False},
    "lora": {"lora": True},
    "qlora": {"lora": True, "model": {"quantize": "nf4"}},
}
OPTIMIZERS = {"SGD": {"optimizer": "SGD", "lr": 0.3}, "AdamW": {"optimizer": "AdamW", "lr": 1e-3}}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """run_of(layout, tuning, optimizer) -> folder of a run of five steps, made once; `changes` make others."""
    root, done = tmp_path_factory.mktemp("scale"), {}

    def folder(layout, tuning, optimizer="SGD", **changes):
        key = repr((layout, tuning, optimizer, changes))
        if key not in done:
            options = {**LAYOUTS[layout], **TUNINGS[tuning], **OPTIMIZERS[optimizer], "steps": STEPS, **changes}
            done[key] = root / f"{len(done)}"
            fit(done[key], configuration(**options))
        return done[key]

    return folder


@pytest.fixture(scope="module")
def start_of(run_of):
    """start_of(tuning) -> the weights that a run of it starts from."""
    return lambda tuning: weights(last(run_of("one", tuning, lr=0.0, steps=1)))


def lengths(folder, rank, name):
    """Tokens of each prompt (name `prompt`) or completion (`lengths`) of each step on a rank."""
    found = [[] for _ in range(STEPS)]
    for (step, *_), line in rollouts(folder, rank).items():
        found[step].append(line[name])
    return found


def assert_equal_runs(folder, one, start, optimizer):
    """The same rollouts and losses in every step, and the same change of the weights."""
    assert rollouts(folder) == rollouts(one)
    assert losses(folder) == pytest.approx(losses(one), abs=1e-5)
    change, expected = flat(weights(last(folder)), start), flat(weights(last(one)), start)
    assert expected.abs().max() > 1e-3
    if optimizer == "SGD":
        assert (change - expected).norm() < 1e-3 * expected.norm()
    else:
        assert torch.cosine_similarity(change, expected, dim=0) > 0.999


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_processes_do_what_one_does(run_of, start_of, layout, tuning, optimizer):
    folder, one = run_of(layout, tuning, optimizer), run_of("one", tuning, optimizer)
    assert_equal_runs(folder, one, start_of(tuning), optimizer)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_runs_hold_what_makes_the_comparison_hard(run_of, tuning):
    """Ranks whose prompts and completions differ in length, rewards that differ, a policy that left its reference."""
    folder, one = run_of("ddp", tuning), run_of("one", tuning)
    for name in ("prompt", "lengths"):
        first, second = (lengths(folder, rank, name) for rank in range(2))
        assert sum(a != b for a, b in zip(first, second, strict=True)) >= STEPS - 1, name
    assert len(rollouts(one)) == STEPS * 4
    assert sum(len({tuple(reward) for reward in line["rewards"]}) > 1 for line in rollouts(one).values()) >= STEPS
    free = run_of("one", tuning, objective={"beta": 0.0})
    assert abs(losses(one)[STEPS] - losses(free)[STEPS]) > 1e-4


@pytest.mark.parametrize(
    ("layout", "tuning"),
    [
        ("one file", "full"),
        ("ddp", "qlora"),
        ("gradients summed once a step", "full"),
        ("gradient checkpointing", "lora"),
        ("gradient checkpointing, ddp", "full"),
        ("rollouts by sharded weights", "full"),
        ("rollouts by sharded weights", "lora"),
        ("hybrid, copies of one", "full"),
        ("hybrid, copies of one", "lora"),
        pytest.param("hybrid, two copies of two", "full", marks=pytest.mark.slow),
        pytest.param("hybrid, two copies of two", "lora", marks=pytest.mark.slow),
    ],
)
def test_options_of_the_layout_change_nothing(run_of, start_of, layout, tuning):
    folder, one = run_of(layout, tuning), run_of("one", tuning)
    assert_equal_runs(folder, one, start_of(tuning), "SGD")


@pytest.mark.parametrize(
    ("layout", "tuning"), [("ddp", "lora"), ("fsdp2", "full"), ("fsdp2", "lora"), ("one file", "full")]
)
def test_the_export_of_a_sharded_run_is_that_of_a_single_process(run_of, layout, tuning, tmp_path):
    exported = {}
    for name in ("one", layout):
        main(["export", str(last(run_of(name, tuning))), "--output_dir", str(tmp_path / name)])
        exported[name] = load_policy(str(tmp_path / name)).state_dict()
    start = load_policy(POLICY).state_dict()
    change, expected = flat(exported[layout], start), flat(exported["one"], start)
    assert expected.abs().max() > 1e-3
    assert (change - expected).norm() < 1e-3 * expected.norm()
