"""Runs that are asked to stop: by a signal or their time; what they save, their exit status, and how they go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rft_lightning.callbacks import HFExport, RolloutCheckpoint
from rft_lightning.errors import ConfigConflictError
from rft_lightning.interruption import Interrupted, StopRequest, seconds_of
from tests.test_checkpoint import data, grpo, weights

CONFIGS = Path(__file__).parent.parent / "configs"


class Signal(Callback):
    """Sends a signal to this process in the rollout batch that follows `step`, or in the validation there."""

    def __init__(self, step, number=signal.SIGTERM, *, where="on_train_batch_start", times=1):
        self.step, self.number, self.times = step, number, times
        setattr(self, where, self.send)

    def send(self, trainer, *args):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class Rows(Callback):
    """Steps whose metrics were logged, and validations that ended."""

    def __init__(self):
        self.steps, self.validations = [], []

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step:
            self.steps.append((trainer.global_step, "train/reward" in trainer.logged_metrics))

    def on_validation_end(self, trainer, *args):
        self.validations.append(trainer.global_step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_signal_ends_at_the_boundary_and_the_run_goes_on_exactly(tiny_policy, make_trainer, tmp_path, number, step):
    """In the first batch, in the last batch of an epoch (of three), and in the first one of the next."""
    whole = grpo(tiny_policy)
    make_trainer(6).fit(whole, datamodule=data(tiny_policy))
    export = HFExport(tmp_path / "policy")
    stopped = grpo(tiny_policy)
    checkpoint = RolloutCheckpoint(every_n_steps=100, dirpath=str(tmp_path / "ckpt"))
    rows = Rows()
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"step {step + 1} .*{number.name}.*--ckpt_path .*last.ckpt") as ended:
        make_trainer(6, callbacks=[Signal(step, number, times=2), checkpoint, export, rows]).fit(
            stopped, datamodule=data(tiny_policy)
        )
    assert ended.value.code == 75
    assert signal.getsignal(number) == before
    assert not (tmp_path / "policy").exists()
    if step != 2:  # at the end of an epoch no further batch begins
        assert rows.steps[-1] == (step + 1, True)
    last = tmp_path / "ckpt" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step + 1
    resumed = grpo(tiny_policy)
    trainer = make_trainer(6, callbacks=[RolloutCheckpoint(every_n_steps=100, dirpath=str(tmp_path / "ckpt")), export])
    trainer.fit(resumed, datamodule=data(tiny_policy), ckpt_path="last")
    assert trainer.global_step == 6
    assert (tmp_path / "policy").exists()
    ours, theirs, then = weights(resumed), weights(whole), weights(stopped)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert max((ours[name] - then[name]).abs().max().item() for name in ours) > 1e-4


VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.mark.parametrize(
    ("where", "step", "validations"),
    [("on_train_batch_start", 1, []), ("on_validation_batch_start", 2, [2]), ("on_train_batch_start", 5, [2, 4])],
)
def test_a_stopping_run_starts_no_validation_and_ends_one(
    tiny_policy, make_trainer, tmp_path, where, step, validations
):
    """The last case is the batch that reaches the end: only the last validation is missing from such a run."""

    def settings(**kwargs):
        return data(tiny_policy, train_size=20, **kwargs)

    whole = grpo(tiny_policy)
    make_trainer(6, **VALIDATING).fit(whole, datamodule=settings())
    rows = Rows()
    checkpoint = RolloutCheckpoint(every_n_steps=100, dirpath=str(tmp_path))
    with pytest.raises(Interrupted):
        make_trainer(6, callbacks=[Signal(step, where=where), checkpoint, rows], **VALIDATING).fit(
            grpo(tiny_policy), datamodule=settings()
        )
    assert rows.validations == validations
    resumed = grpo(tiny_policy)
    trainer = make_trainer(6, callbacks=[rows], **VALIDATING)
    trainer.fit(resumed, datamodule=settings(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert trainer.global_step == 6
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(whole)[name]), name


def test_what_was_learnt_is_saved_before_a_validation(tiny_policy, make_trainer, tmp_path):
    class Killed(Exception):
        pass

    class Kill(Callback):
        def on_validation_batch_start(self, trainer, *args):
            raise Killed

    trainer = make_trainer(
        6, callbacks=[Kill(), RolloutCheckpoint(every_n_steps=100, dirpath=str(tmp_path))], **VALIDATING
    )
    with pytest.raises(Killed):
        trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy, train_size=20))
    whole, resumed = grpo(tiny_policy), grpo(tiny_policy)
    make_trainer(6, **VALIDATING).fit(whole, datamodule=data(tiny_policy, train_size=20))
    rows = Rows()
    make_trainer(6, callbacks=[rows], **VALIDATING).fit(
        resumed, datamodule=data(tiny_policy, train_size=20), ckpt_path=str(tmp_path / "last.ckpt")
    )
    assert rows.steps[0] == (2, False)
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(whole)[name]), name


def test_wall_time_stops_the_run_at_the_next_boundary(tiny_policy, make_trainer, tmp_path, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr("rft_lightning.interruption._START", now - 3600)
    callbacks = [RolloutCheckpoint(every_n_steps=100, dirpath=str(tmp_path / name), wall_time=limit)
                 for name, limit in (("over", "01:00:00"), ("left", "1-00:00:00"))]  # fmt: skip
    with pytest.raises(Interrupted, match=r"step 1 .*wall_time 01:00:00"):
        make_trainer(3, callbacks=callbacks[:1]).fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    assert (tmp_path / "over" / "last.ckpt").exists()
    trainer = make_trainer(3, callbacks=callbacks[1:])
    trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    assert trainer.global_step == 3


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [(90, 90), (0.5, 0.5), ("01:30", 90), ("12:00:00", 43200), ("2-01:00:01", 176401), (" 00:00:05 ", 5)],
)
def test_durations(duration, seconds):
    assert seconds_of(duration) == seconds


@pytest.mark.parametrize("duration", ["", "12", "1:2:3:4", "-1:00", 0, -5, "00:00", float("nan")])
def test_what_is_no_duration_is_refused(duration):
    with pytest.raises(ConfigConflictError, match="wall_time"):
        StopRequest(duration)


def test_last_without_a_folder_that_runs_share_is_refused(tiny_policy, make_trainer, tmp_path):
    """It would quietly begin anew: each run of a logger has a folder of its own."""
    trainer = make_trainer(1, callbacks=[RolloutCheckpoint()])
    with pytest.raises(ConfigConflictError, match="dirpath"):
        trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy), ckpt_path="last")
    # The command of a job that is started again and again: there is none the first time.
    trainer = make_trainer(1, callbacks=[RolloutCheckpoint(dirpath=str(tmp_path / "ckpt"))])
    with pytest.warns(UserWarning, match="no last checkpoint"):
        trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy), ckpt_path="last")
    assert trainer.global_step == 1


# Through the command line

HELPERS = """
import os, signal, time
from pathlib import Path
from lightning.pytorch import Callback

def length_reward(answer, target, *, rules, step):
    return (len(answer.text) % 17) / 17

class Steps(Callback):
    '''Writes down the process and its step; a run that is to be interrupted must not be over too soon.'''

    def on_train_batch_end(self, trainer, *args):
        Path(f"step-{trainer.global_rank}").write_text(f"{os.getpid()} {trainer.global_step}")
        time.sleep(float(os.environ.get("TEST_PAUSE", "0")))
"""
MORE = """
trainer: {callbacks+: [{class_path: helpers.Steps}]}
data: {init_args: {task: {class_path: rft_lightning.tasks.DetectionTask, init_args:
  {rewards: {length: helpers.length_reward}, reward_weights: {length: 1.0}}}}}
"""


def start(folder, policy, *arguments, processes=1, launcher=("-m", "rft_lightning"), pause=0.0):
    """A run through the command line, in a process group of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "helpers.py").write_text(HELPERS)
    (folder / "more.yaml").write_text(MORE)
    command = [
        sys.executable, *launcher, "fit", "--config", str(CONFIGS / "quickstart.yaml"),
        "--config", "more.yaml", "--model.policy", policy, "--model.max_completion_length", "6",
        "--model.group_size", "2", "--model.optimizer.lr", "1e-3", "--data.batch_size", str(2 // processes),
        "--data.shots", "2", "--data.val_size", "2", "--trainer.val_check_interval", "5",
        "--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "TEST_PAUSE": str(pause)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def process_of(folder, rank, step, run, timeout=120):
    """The process id of a rank, once it has reached a step."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and run.poll() is None:
        words = (folder / f"step-{rank}").read_text().split() if (folder / f"step-{rank}").exists() else ()
        if words and int(words[1]) >= step:
            return int(words[0])
        time.sleep(0.02)
    raise AssertionError(f"rank {rank} did not reach step {step}: {run.poll()}")


def ended(run, timeout=120):
    """(exit status, output) of a run; what does not end in time is killed and fails the test."""
    try:
        output, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise AssertionError(f"hangs: {run.communicate()[0][-4000:]}") from None
    return run.returncode, output


def wait_for_end(process, timeout=15):
    """Until a process that is no child of this one is over."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {process} goes on")


def last_of(folder):
    return max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)


def state_of(folder):
    return torch.load(last_of(folder), weights_only=True)["state_dict"]


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_the_command_line_ends_with_status_75_and_says_how_to_go_on(tmp_path, tiny_policy):
    arguments = ("--trainer.max_steps", "6")
    whole = start(tmp_path / "whole", tiny_policy, *arguments)
    folder = tmp_path / "stopped"
    run = start(folder, tiny_policy, *arguments, pause=0.3)
    os.kill(process_of(folder, 0, 2, run), signal.SIGTERM)
    status, output = ended(run)
    assert status == 75, output[-3000:]
    last = output.strip().splitlines()[-1]
    assert last.startswith("rft: Stopped at step")
    assert "SIGTERM: saving and stopping" in output
    path = last.split()[-1]
    assert "Traceback" not in output
    resumed = start(folder, tiny_policy, *arguments, "--ckpt_path", path)
    assert ended(resumed)[0] == 0
    assert ended(whole)[0] == 0
    ours, theirs = state_of(folder), state_of(tmp_path / "whole")
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_leaves_those_that_load_data(tmp_path, tiny_policy, number):
    """As torchrun and schedulers send it."""
    run = start(tmp_path, tiny_policy, "--trainer.max_steps", "8", "--data.num_workers", "2", pause=0.5)
    process_of(tmp_path, 0, 1, run)
    os.killpg(run.pid, number)
    status, output = ended(run)
    assert status == 75, output[-3000:]
    assert torch.load(last_of(tmp_path), weights_only=True)["global_step"] < 8


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_second_signal_stops_at_once(tmp_path, tiny_policy):
    run = start(tmp_path, tiny_policy, "--trainer.max_steps", "6", pause=30)
    process = process_of(tmp_path, 0, 1, run)
    os.kill(process, signal.SIGTERM)
    time.sleep(1.5)
    os.kill(process, signal.SIGTERM)
    status, output = ended(run, timeout=10)
    assert status == -signal.SIGTERM
    assert "SIGTERM again: stopping at once" in output


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path, tiny_policy):
    arguments = ("--trainer.max_steps", "5", "--trainer.val_check_interval", "3")
    folder = tmp_path / "stopped"
    path = None
    for rank, step in ((0, 1), (1, 3)):
        resume = () if path is None else ("--ckpt_path", path)
        run = start(folder, tiny_policy, *arguments, *resume, processes=2, pause=0.5)
        os.kill(process_of(folder, rank, step, run), signal.SIGUSR1)
        status, output = ended(run)
        assert status == 75, output[-3000:]
        assert output.count("rft: Stopped at step") == 1
        wait_for_end(int((folder / f"step-{1 - rank}").read_text().split()[0]))
        path = output.strip().splitlines()[-1].split()[-1]
    for where, more in ((folder, ("--ckpt_path", path)), (tmp_path / "whole", ())):
        status, output = ended(start(where, tiny_policy, *arguments, *more, processes=2))
        assert status == 0, output[-3000:]
    theirs = state_of(tmp_path / "whole")
    for name, value in state_of(folder).items():
        assert torch.equal(value, theirs[name]), name
