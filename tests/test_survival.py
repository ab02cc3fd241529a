"""Runs that are killed with SIGKILL, which nothing can catch, end like runs that were left alone.

The comparison is bitwise, of the weights and of the optimiser's state in the last checkpoint.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.runs import (
    configuration,
    fit,
    flat,
    free_port,
    last,
    losses,
    resuming,
    rollouts,
    saved,
    started,
    step_of,
    steps,
    weights,
    words,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = 7
LORA = {"lora": {"r": 4, "lora_dropout": 0.1}}
# One epoch is two batches (five rows, two prompts), so that runs cross the ends of three.
KINDS = {
    "one process, full": {"processes": 1},
    "one process, full, workers": {"processes": 1, "data": {"num_workers": 2}},
    "one process, lora": {"processes": 1, "model": LORA},
    "one process, lora, workers": {"processes": 1, "model": LORA, "data": {"num_workers": 2}},
    "ddp, full": {"processes": 2, "strategy": "ddp"},
    "ddp, lora, workers": {"processes": 2, "strategy": "ddp", "model": LORA, "data": {"num_workers": 2}},
    "fsdp2, full": {"processes": 2, "strategy": "fsdp2"},
    "fsdp2, lora, workers": {"processes": 2, "strategy": "fsdp2", "model": LORA, "data": {"num_workers": 2}},
}
STRATEGIES = {"auto": {"processes": 1}, "ddp": {"processes": 2, "strategy": "ddp"},
              "fsdp2": {"processes": 2, "strategy": "fsdp2"}}  # fmt: skip


def settings(*, processes, data=None, model=None, optimizer="AdamW", lr=1e-3, **changes):
    """AdamW with a decaying learning rate, validation in between."""
    return configuration(
        **{"prompts": 2, "steps": STEPS, "save_every": 1, **changes},
        processes=processes,
        optimizer=optimizer,
        lr=lr,
        data={"train_size": 5, **(data or {})},
        model={"schedule": "linear", "max_completion_length": 20, **(model or {})},
        trainer={"limit_val_batches": 1.0, "val_check_interval": 3},
    )


def killed(folder, changes, step, delay=0.0, more=()):
    """Start a run, kill it `delay` seconds after `step`; returns its last whole step, which it may not have saved."""
    with started(folder, changes, *more) as run:
        run.wait_for(step)
        time.sleep(delay)
        run.kill()
        assert {process.exitcode for process in run.processes} <= {-signal.SIGKILL}, run.log()
    return max(losses(folder))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """left_alone(kind) -> folder of an uninterrupted run without workers, which change nothing; made once."""
    root, done = tmp_path_factory.mktemp("left-alone"), {}

    def folder(kind):
        name = kind.removesuffix(", workers")
        if name not in done:
            done[name] = root / str(len(done))
            fit(done[name], settings(**{**KINDS[kind], "data": {}}))
        return done[name]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_weights_of_one_left_alone(tmp_path, left_alone, kind):
    chance, changes = random.Random(kind), settings(**KINDS[kind])
    reached = killed(tmp_path / "killed", changes, chance.randint(2, STEPS - 2), chance.uniform(0, 0.2))
    ends = fit(tmp_path / "resumed", changes, *resuming(last(tmp_path / "killed")))
    whole, resumed = losses(left_alone(kind)), losses(tmp_path / "resumed")
    assert min(resumed) in (reached, reached + 1)
    assert resumed == {step: whole[step] for step in range(min(resumed), STEPS + 1)}
    assert_same(saved(ends), saved(last(left_alone(kind))))


@pytest.mark.parametrize("kind", ["one process, full", "one process, lora"])
def test_the_runs_move(tmp_path, left_alone, kind):
    """Else all of the above would hold by itself."""
    start = weights(fit(tmp_path, settings(**{**KINDS[kind], "lr": 0.0, "steps": 1})))
    assert flat(weights(last(left_alone(kind))), start).abs().max() > 1e-3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """SGD on one process, which two equal up to rounding."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(folder, settings(processes=1, optimizer="SGD", lr=0.3))
    return folder


@pytest.mark.parametrize(
    ("first", "second"), [("auto", "ddp"), ("auto", "fsdp2"), ("ddp", "auto"), ("fsdp2", "auto"), ("fsdp2", "ddp")]
)
def test_a_killed_run_goes_on_with_other_processes(tmp_path, uninterrupted, first, second):
    """The global batch stays, so the same prompts come in the same order; a checkpoint every second step."""
    options = {"optimizer": "SGD", "lr": 0.3, "save_every": 2}
    reached = killed(tmp_path / "killed", settings(**STRATEGIES[first], **options), 4)
    fit(tmp_path / "resumed", settings(**STRATEGIES[second], **options), *resuming(last(tmp_path / "killed")))
    start = step_of(last(tmp_path / "killed"))
    assert reached - 2 <= start <= reached
    expected = {step: loss for step, loss in losses(uninterrupted).items() if step > start}
    assert losses(tmp_path / "resumed") == pytest.approx(expected, rel=1e-5, abs=1e-6)
    expected = {key: line for key, line in rollouts(uninterrupted).items() if key[0] >= start}
    assert rollouts(tmp_path / "resumed") == expected


def names_beside(checkpoint):
    """What lies beside a checkpoint, and beside the folder that it is a link to: a save that has not ended."""
    return set(os.listdir(checkpoint.parent)) - {checkpoint.name, os.path.basename(os.path.realpath(checkpoint))}


class Killer:
    """Kills runs at random moments of their first steps, every other time while something is being written."""

    def __init__(self, seed):
        self.chance, self.while_saving = random.Random(seed), 0

    def __call__(self, run, start):
        checkpoint = last(run.folder)
        run.wait_for(start + self.chance.randint(1, 4))
        if self.chance.random() < 0.5:
            time.sleep(self.chance.uniform(0, 0.4))
        else:
            while run.running and not names_beside(checkpoint):
                time.sleep(0.0005)
            time.sleep(self.chance.uniform(0, 0.05))
        run.kill()
        self.while_saving += bool(names_beside(checkpoint))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "kind", ["one process, full, workers", "ddp, lora, workers", "fsdp2, full", "fsdp2, lora, workers"]
)
def test_twenty_kills_at_any_moment(tmp_path, kind):
    """Also while a checkpoint is written: last.ckpt can always be loaded, and what a save left behind is removed."""
    changes = settings(**{**KINDS[kind], "steps": 150})
    expected = saved(fit(tmp_path / "whole", changes, timeout=900))
    killer, checkpoint = Killer(kind), last(tmp_path / "killed")
    checkpoint.parent.mkdir(parents=True)
    for number in range(20):
        there = checkpoint.exists()
        more = resuming(checkpoint) if there else ()
        (tmp_path / "killed" / "steps.jsonl").unlink(missing_ok=True)
        with started(tmp_path / "killed", changes, *more) as run:
            killer(run, step_of(checkpoint) if there else 0)
            statuses = {process.exitcode for process in run.processes}
            assert statuses == {-signal.SIGKILL}, f"life {number}: exit statuses {statuses}\n{run.log()}"
        if there or checkpoint.exists():
            saved(checkpoint)
    print(f"{kind}: {killer.while_saving} of 20 kills while a checkpoint was written, {step_of(checkpoint)} steps done")
    assert killer.while_saving
    assert_same(saved(fit(tmp_path / "killed", changes, *resuming(checkpoint), timeout=900)), expected)
    assert not names_beside(checkpoint)


# Two nodes


def descendants(pid):
    """A process and all that it started, itself or through others."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in descendants(int(child)))]


@contextmanager
def nodes(folder, changes):
    """Two torchrun agents on loopback, each with one process of a run over two nodes."""
    command, port = words(folder, changes), str(free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    agents = []
    for rank in range(2):
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank),
            "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port, "-m", "rft_lightning",
        ]  # fmt: skip
        with open(folder / f"agent-{rank}.txt", "w") as log:
            agents.append(subprocess.Popen([*launcher, *command], cwd=folder, env=environment, stdout=log, stderr=log))
    try:
        yield agents
    finally:
        for agent in agents:
            kill_node(agent)


def kill_node(agent):
    if agent.poll() is None:
        for pid in descendants(agent.pid):
            os.kill(pid, signal.SIGKILL)
        agent.wait()


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_node_that_dies_ends_the_others_and_the_run_resumes(tmp_path, strategy):
    changes = settings(**STRATEGIES[strategy], steps=15)
    expected = saved(fit(tmp_path / "whole", changes))
    folder = tmp_path / "nodes"
    over_nodes = json.loads(json.dumps(changes))
    over_nodes["trainer"] |= {"num_nodes": 2, "devices": 1}
    with nodes(folder, over_nodes) as (first, second):
        end = time.monotonic() + 200
        while len(steps(folder)) < 3:
            assert time.monotonic() < end, (folder / "agent-0.txt").read_text()[-3000:]
            assert first.poll() is None, (folder / "agent-0.txt").read_text()[-3000:]
            time.sleep(0.01)
        kill_node(second)
        assert first.wait(timeout=60) != 0
    assert len(steps(folder)) < 15
    assert_same(saved(fit(tmp_path / "resumed", changes, *resuming(last(folder)))), expected)
