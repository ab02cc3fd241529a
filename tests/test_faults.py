"""Faults that a run survives, or ends by with an error that says what to do."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback

import rft_lightning.optimiser_steps
from rft_lightning import GRPOModule, SFTModule
from rft_lightning.callbacks import RolloutCheckpoint
from rft_lightning.device_memory import halving
from rft_lightning.errors import (
    CheckpointError,
    CheckpointSaveError,
    ConfigConflictError,
    DeviceMemoryError,
    NonFiniteError,
)
from rft_lightning.failures import remedy
from rft_lightning.placing import partial_of, place, remove, remove_leftovers
from tests.test_checkpoint import Scores, adamw, data, grpo, weights
from tests.test_interruption import ended, last_of, process_of, start, wait_for_end

POLICY = "asset:tiny-qwen2-vl"

# Placing checkpoints


class Killed(BaseException):
    """As good as kill -9: nothing of ours catches it."""


def made(path, kind, text):
    if kind == "file":
        path.write_text(text)
    else:
        path.mkdir()
        (path / "a").write_text(text)
        (path / "b").write_text(text)


def read(path):
    return {file.read_text() for file in path.iterdir()} if path.is_dir() else {path.read_text()}


def killing(function, calls, most):
    """A function that is killed at the call after so many of it and the others that share `calls`."""

    def counted(*args, **kwargs):
        calls.append(function)
        if len(calls) > most:
            raise Killed
        return function(*args, **kwargs)

    return counted


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", [None, "file", "folder"])
def test_a_checkpoint_is_whole_whenever_the_run_is_killed(tmp_path, monkeypatch, old, new):
    """Killed before each call into the system that placing makes, and never: the old one or the new one is there."""
    calls = [(os, "replace"), (os, "fsync"), (Path, "symlink_to"), (Path, "unlink"), (os, "rmdir"), (os, "unlink")]
    seen = set()
    for kill_at in range(30):
        folder = tmp_path / f"{kill_at}"
        folder.mkdir()
        path = folder / "last.ckpt"
        if old:
            made(partial_of(path), old, "old")
            place(partial_of(path), path)
        made(partial_of(path), new, "new")
        made_so_far = []
        with monkeypatch.context() as patch:
            for owner, name in calls:
                patch.setattr(owner, name, killing(getattr(owner, name), made_so_far, kill_at))
            try:
                place(partial_of(path), path)
                finished = True
            except Killed:
                finished = False
        assert old is None or path.exists()
        if path.exists():
            (content,) = read(path)
            seen.add(content)
            if finished:
                assert content == "new"
        remove_leftovers(folder)
        if path.exists():
            assert read(path) == {content}
            assert len(list(folder.iterdir())) == (2 if path.is_symlink() else 1)
        else:
            assert list(folder.iterdir()) == []
        # And the next save goes as ever.
        made(partial_of(path), new, "next")
        place(partial_of(path), path)
        assert read(path) == {"next"}
        assert len(list(folder.iterdir())) == (2 if new == "folder" else 1)
        remove(path)
        assert list(folder.iterdir()) == []
        if finished:
            break
    else:
        raise AssertionError("placing makes more calls than this test kills it at")
    assert kill_at >= (2 if new == "file" else 5)
    assert seen == ({"new"} if old is None else {"old", "new"})


def test_links_are_relative_so_that_the_folder_can_be_moved(tmp_path):
    path = tmp_path / "here" / "last.ckpt"
    path.parent.mkdir()
    made(partial_of(path), "folder", "new")
    place(partial_of(path), path)
    (tmp_path / "here").rename(tmp_path / "there")
    assert read(tmp_path / "there" / "last.ckpt") == {"new"}


def test_leftovers_are_what_no_checkpoint_needs(tmp_path):
    for name in ("last.ckpt", "best-step=2.ckpt"):
        made(partial_of(tmp_path / name), "folder", "whole")
        place(partial_of(tmp_path / name), tmp_path / name)
    kept = {path.name for path in tmp_path.iterdir()}
    for name in (".best-step=4.ckpt.partial", "last.ckpt.0123abcd", "last.ckpt.11111111"):
        made(tmp_path / name, "folder", "left")
    made(tmp_path / ".last.ckpt.partial", "file", "left")
    foreign = {"last.ckpt.old", "notes", ".last.ckpt"}
    for name in foreign:
        made(tmp_path / name, "folder", "mine")
    remove_leftovers(tmp_path, keep=tmp_path / "last.ckpt.11111111")
    assert {path.name for path in tmp_path.iterdir()} == kept | foreign | {"last.ckpt.11111111"}
    remove_leftovers(tmp_path / "nowhere")


def test_a_killed_save_is_cleared_away_at_the_next_start(tiny_policy, make_trainer, tmp_path):
    (tmp_path / ".last.ckpt.partial").write_bytes(b"half")
    (tmp_path / "last.ckpt.0123abcd").mkdir()
    callback = RolloutCheckpoint(every_n_steps=1, dirpath=str(tmp_path))
    make_trainer(1, callbacks=[callback]).fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_in_the_place_of_last_is_refused_before_training(tiny_policy, make_trainer, tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="Rename it"):
        make_trainer(1, callbacks=[RolloutCheckpoint(dirpath=str(tmp_path))]).fit(
            grpo(tiny_policy), datamodule=data(tiny_policy)
        )


# Full disks


class FullDisk(Callback):
    """Writing fails, half-way, in some rollout batches."""

    def __init__(self, steps, error=NO_SPACE):
        self.steps, self.error = steps, error

    def setup(self, trainer, pl_module, stage):
        save = trainer.strategy.save_checkpoint

        def limited(checkpoint, path, **kwargs):
            save(checkpoint, path, **kwargs)
            if trainer.global_step in self.steps:
                Path(path).write_bytes(Path(path).read_bytes()[:1000])
                raise self.error

        trainer.strategy.save_checkpoint = limited


@pytest.mark.parametrize("error", [NO_SPACE, RuntimeError("PytorchStreamWriter failed"), MemoryError()])
def test_a_failed_save_stops_the_run_if_told_so_and_keeps_the_checkpoint(tiny_policy, make_trainer, tmp_path, error):
    callback = RolloutCheckpoint(every_n_steps=1, dirpath=str(tmp_path), on_failed_save="stop")
    trainer = make_trainer(3, callbacks=[callback, FullDisk([2], error)])
    words = r"last\.ckpt could not be written .* GB are free .* is whole"
    with pytest.raises(CheckpointSaveError, match=words) as raised:
        trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    assert str(error) in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_failed_save_is_told_and_tried_again(tiny_policy, make_trainer, tmp_path, caplog):
    callback = RolloutCheckpoint(every_n_steps=2, dirpath=str(tmp_path))
    trainer = make_trainer(5, callbacks=[callback, FullDisk([2, 3])])
    trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    (message,) = [record.message for record in caplog.records if "could not be written" in record.message]
    assert "There is none before it" in message
    assert "goes on" in message
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5


def test_the_last_save_of_a_run_must_not_fail(tiny_policy, make_trainer, tmp_path):
    callback = RolloutCheckpoint(every_n_steps=2, dirpath=str(tmp_path))
    trainer = make_trainer(3, callbacks=[callback, FullDisk([3])])
    with pytest.raises(CheckpointSaveError, match="No space left on device"):
        trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_best_checkpoint_that_could_not_be_written_is_no_best(tiny_policy, make_trainer, tmp_path):
    """Steps 1 to 4 score 0.1, 0.9, 0.5, 0.3, and the disk is full at step 2: of those written, step 3 is best."""
    callback = RolloutCheckpoint(every_n_steps=10, monitor="val/score", keep=1, dirpath=str(tmp_path))
    trainer = make_trainer(
        4, callbacks=[Scores([0.1, 0.9, 0.5, 0.3]), callback, FullDisk([2])],
        limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best-step=3.ckpt", "last.ckpt"]
    assert Path(callback.best_model_path).name == "best-step=3.ckpt"


LIMITED = """
import resource, signal, sys
from rft_lightning.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, writing fails; it does not kill
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
main()
"""


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_the_command_line_says_what_to_do_about_a_full_disk(tmp_path):
    (tmp_path / "limited.py").write_text(LIMITED)
    run = start(tmp_path, POLICY, "--trainer.max_steps", "1", launcher=["limited.py"])
    status, output = ended(run)
    assert status == 2, output[-3000:]
    last = output.strip().splitlines()[-1]
    assert last.startswith("rft: CheckpointSaveError: The checkpoint ")
    assert "[Errno 27] File too large" in last
    assert "There is none before it" in last
    (folder,) = tmp_path.rglob("checkpoints")
    assert list(folder.iterdir()) == []


def test_what_to_do_with_failed_saves_is_checked():
    with pytest.raises(ConfigConflictError, match="on_failed_save warn or stop, found 'ignore'"):
        RolloutCheckpoint(on_failed_save="ignore")


# Loss and gradients that are not finite


def broken(kind, steps, **kwargs):
    """A module of a kind whose loss is NaN in some optimiser steps."""

    class Broken(kind):
        def optimiser_step(self, pieces, loss_of, names):
            factor = float("nan") if self.global_step in steps else 1.0
            return super().optimiser_step(pieces, lambda piece: loss_of(piece) * factor, names)

    return lambda policy: Broken(policy, optimizer=adamw, **kwargs)


class Logged(Callback):
    def __init__(self):
        self.values, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.weights.append(weights(pl_module))


@pytest.mark.parametrize("kind", [GRPOModule, SFTModule])
def test_a_step_that_is_not_finite_is_left_out_and_counted(tiny_policy, make_trainer, kind, caplog):
    """The weights stay, the learning rate goes on, and the run makes its number of steps."""
    settings = {"group_size": 2, "max_completion_length": 5} if kind is GRPOModule else {}
    module = broken(kind, {1}, on_nonfinite="skip", **settings)(tiny_policy)
    log = Logged()
    trainer = make_trainer(4, callbacks=[log])
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, datamodule=data(tiny_policy))
    assert trainer.global_step == 4
    assert [values["train/skipped_steps"] for values in log.values] == [0, 1, 0, 0]
    assert torch.tensor([values["train/loss"] for values in log.values]).isnan().tolist() == [False, True, False, False]
    (warning,) = [record.message for record in caplog.records if "is skipped" in record.message]
    assert "Step 1: the loss is nan" in warning
    assert "shapes/" in warning
    first, second, third, fourth = log.weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert max((third[name] - second[name]).abs().max().item() for name in first) > 1e-4
    assert all(value.isfinite().all() for value in fourth.values())
    state = module.optimizers().optimizer.state
    assert {float(entry["step"]) for entry in state.values()} == {3.0}
    assert module.lr_schedulers().last_epoch == 4


def test_a_run_with_a_skipped_step_resumes_exactly(tiny_policy, make_trainer, tmp_path):
    make = broken(GRPOModule, {1, 3}, on_nonfinite="skip", group_size=2, max_completion_length=5, num_iterations=2)
    whole, resumed = make(tiny_policy), make(tiny_policy)
    make_trainer(8).fit(whole, datamodule=data(tiny_policy))

    class Stop(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 4:
                raise Killed

    with pytest.raises(Killed):
        make_trainer(8, callbacks=[RolloutCheckpoint(every_n_steps=1, dirpath=str(tmp_path)), Stop()]).fit(
            make(tiny_policy), datamodule=data(tiny_policy)
        )
    make_trainer(8).fit(resumed, datamodule=data(tiny_policy), ckpt_path=str(tmp_path / "last.ckpt"))
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(whole)[name]), name


def test_too_many_skipped_steps_in_a_row_stop_the_run(tiny_policy, make_trainer, monkeypatch):
    monkeypatch.setattr(rft_lightning.optimiser_steps, "MAX_SKIPPED", 3)
    make = broken(SFTModule, {1, 2, 4, 5, 6, 7}, on_nonfinite="skip")
    with pytest.raises(NonFiniteError, match=r"Step 6: .* step 3 in a row"):
        make_trainer(9).fit(make(tiny_policy), datamodule=data(tiny_policy))


def test_the_default_names_the_option(tiny_policy, make_trainer):
    with pytest.raises(NonFiniteError, match=r"Step 0: .* model\.on_nonfinite skip"):
        make_trainer(2).fit(broken(SFTModule, {0})(tiny_policy), datamodule=data(tiny_policy))
    with pytest.raises(ConfigConflictError, match="on_nonfinite stop or skip, found 'warn'"):
        SFTModule(tiny_policy, on_nonfinite="warn")


def test_a_skipped_step_teaches_the_controllers_nothing(tiny_policy, make_trainer):
    from rft_lightning.control import AdaptiveKL

    module = broken(
        GRPOModule, {0, 1}, on_nonfinite="skip", group_size=2, max_completion_length=5,
        kl_controller=AdaptiveKL(target=0.05, horizon=1000),
    )(tiny_policy)  # fmt: skip
    make_trainer(2).fit(module, datamodule=data(tiny_policy))
    assert module.controllers["beta"].value == module.objective.beta


# Devices without enough memory


@settings(max_examples=50)
@given(prompts=st.integers(1, 64), room=st.integers(1, 64))
def test_halving_ends_at_what_fits(prompts, room):
    tried = []

    def attempt(at_once):
        tried.append(at_once)
        if at_once > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return f"done {at_once}"

    result, found = halving(attempt, prompts, option="o", remedies="r")
    assert result == f"done {found}"
    assert found <= room
    assert len(tried) <= 7
    assert found == prompts or 2 * found + 1 > room


def test_the_memory_of_a_failed_attempt_is_free_for_the_next():
    """An exception holds its frames, and they what they were computing."""
    import weakref

    class Large:
        pass

    held = []

    def attempt(at_once):
        assert all(reference() is None for reference in held)
        large = Large()
        held.append(weakref.ref(large))
        if at_once > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    halving(attempt, 8, option="o", remedies="r")
    assert len(held) == 4


class SmallDevice:
    """A device with room for some rows of a rollout."""

    def __init__(self, monkeypatch, rows):
        from rft_lightning.policy.decoding import CacheDecoder, SharedDecoder

        self.tried = []
        for decoder in (CacheDecoder, SharedDecoder):
            admit = decoder.admit

            def limited(this, admit=admit):
                found = admit(this)
                self.tried.append(len(this.rows) if hasattr(this, "rows") else len(found))
                if self.tried[-1] > rows:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return found

            monkeypatch.setattr(decoder, "admit", limited)


def rolled_out(tiny_policy, make_trainer, rollout_prompts):
    """(texts of each batch, final weights, module) of a run of two batches of four prompts."""
    texts = []

    class Recorder(GRPOModule):
        def roll_out(self, *args, **kwargs):
            rollouts = super().roll_out(*args, **kwargs)
            texts.append(rollouts.texts)
            return rollouts

    module = Recorder(
        tiny_policy, group_size=2, max_completion_length=5, optimizer=adamw, rollout_prompts=rollout_prompts
    )
    make_trainer(2).fit(module, datamodule=data(tiny_policy, batch_size=4, train_size=8))
    return texts, weights(module), module


def test_a_rollout_out_of_memory_goes_on_with_fewer_prompts(tiny_policy, make_trainer, monkeypatch, caplog):
    """The run is the one that began with so few; it is told once."""
    expected, theirs, _ = rolled_out(tiny_policy, make_trainer, 1)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        SmallDevice(patch, rows=2)
        texts, ours, module = rolled_out(tiny_policy, make_trainer, None)
    assert texts == expected
    assert module.rollout_prompts == 1
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    warnings = [record.message for record in caplog.records if "Out of memory" in record.message]
    assert len(warnings) == 2
    assert "with 4 prompts" in warnings[0]
    assert "Set model.rollout_prompts to 2" in warnings[0]
    assert "Set model.rollout_prompts to 1" in warnings[1]


def test_a_rollout_of_one_prompt_out_of_memory_says_what_to_do(tiny_policy, make_trainer, monkeypatch):
    SmallDevice(monkeypatch, rows=1)
    with pytest.raises(DeviceMemoryError, match=r"one prompt .*model\.group_size \(2\).*Tried to allocate 2\.00 GiB"):
        rolled_out(tiny_policy, make_trainer, None)


def test_evaluation_out_of_memory_goes_on_with_fewer_prompts(tiny_policy, make_trainer, monkeypatch, caplog):
    def predicted():
        module = grpo(tiny_policy)
        found = make_trainer(1).predict(module, datamodule=data(tiny_policy, eval_batch_size=4))
        return [prediction.text for batch in found for prediction in batch], module

    expected, _ = predicted()
    SmallDevice(monkeypatch, rows=1)
    with caplog.at_level(logging.WARNING):
        texts, module = predicted()
    assert texts == expected
    assert module.rollout_prompts is None
    assert any("Set data.eval_batch_size to 1" in record.message for record in caplog.records)


def test_an_update_out_of_memory_says_what_to_do(tiny_policy, make_trainer):
    class Small(SFTModule):
        def manual_backward(self, loss, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(DeviceMemoryError, match=r"the update.*model\.micro_batch_prompts \(the whole batch\) lower"):
        make_trainer(1).fit(Small(tiny_policy), datamodule=data(tiny_policy))
    with pytest.raises(DeviceMemoryError, match=r"One prompt is the least.*gradient_checkpointing"):
        make_trainer(1).fit(Small(tiny_policy, micro_batch_prompts=1), datamodule=data(tiny_policy))


# Processes that end, or hang


def children_of(process):
    tasks = Path(f"/proc/{process}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_loader_process_that_is_killed_ends_the_run_with_a_remedy(tmp_path):
    run = start(tmp_path, POLICY, "--trainer.max_steps", "50", "--data.num_workers", "1", pause=0.3)
    process = process_of(tmp_path, 0, 1, run)
    for child in children_of(process):
        if b"rft_lightning" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    status, output = ended(run, timeout=60)
    assert status == 1
    assert "DataLoader worker" in output
    assert "lower data.num_workers" in output.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("DataLoader worker (pid(s) 12) exited unexpectedly", "data.num_workers 0"),
        ("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:34514.", "Another process"),
        ("Timed out waiting 1800000ms for recv operation to complete", "init_args.timeout"),
        ("NCCL communicator was aborted on rank 3.", "Another process"),
    ],
)
def test_failures_of_other_processes_have_a_remedy(message, words):
    assert words in remedy(RuntimeError(message))
    assert "--ckpt_path" in remedy(RuntimeError(message))


def test_other_errors_speak_for_themselves():
    assert remedy(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


HOGGING = """
import re
from rft_lightning.rewards import time_limit
time_limit._GRACE = 1.0
time_limit.call_within(10.0, lambda: None)  # ends in time, and nothing is left over of its watch
def hogs():
    return re.match(r"(a+)+$", "a" * 60 + "b")
time_limit.call_within(0.5, hogs)
"""


@pytest.mark.timeout(120)
def test_a_reward_that_lets_no_python_run_ends_the_process():
    result = subprocess.run([sys.executable, "-c", HOGGING], capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 1
    assert "Timeout" in result.stderr
    assert "hogs" in result.stderr


ORPHAN = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", '''
import os, time
from rft_lightning import failures
failures._LOOK = failures._PATIENCE = 0.1
failures.end_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
'''])
time.sleep(60)
"""


@pytest.mark.distributed
@pytest.mark.timeout(100)
def test_a_process_ends_after_the_one_that_started_it():
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        assert Path(f"/proc/{child}").exists()
        parent.kill()
        wait_for_end(child)


OWN = ("-m", "rft_lightning")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", *OWN)


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("rank", "launcher"), [(0, OWN), (1, OWN), (1, TORCHRUN)])
def test_a_killed_process_ends_the_run_which_can_be_resumed(tmp_path, rank, launcher):
    keep = ("--config", "keep.yaml")
    (tmp_path / "keep.yaml").write_text(
        "trainer: {callbacks+: [{class_path: rft_lightning.callbacks.RolloutCheckpoint, init_args: "
        "{every_n_steps: 1, dirpath: kept, monitor: null}}]}\n"
    )
    run = start(tmp_path, POLICY, "--trainer.max_steps", "50", *keep, processes=2, launcher=launcher, pause=0.5)
    other = process_of(tmp_path, 1 - rank, 2, run)
    os.kill(process_of(tmp_path, rank, 2, run), signal.SIGKILL)
    status, output = ended(run, timeout=60)
    assert status != 0
    wait_for_end(other, timeout=60)
    assert "Another process of this run has ended" in output or "terminated with code -9" in output
    if rank == 0:
        resumed = start(tmp_path, POLICY, "--trainer.max_steps", "5", *keep, "--ckpt_path", str(last_of(tmp_path)))
        status, output = ended(resumed)
        assert status == 0, output[-3000:]


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_save_that_fails_on_one_process_fails_on_both(tmp_path):
    """Rank 0 alone writes; the other would wait for it at the end of the save."""
    (tmp_path / "full.py").write_text(
        "import errno\n"
        "from lightning.pytorch import Callback\n"
        "class Full(Callback):\n"
        "    def setup(self, trainer, *args, **kwargs):\n"
        "        def write(*args, **kwargs):\n"
        "            raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "        trainer.strategy.checkpoint_io.save_checkpoint = write\n"
    )
    (tmp_path / "full.yaml").write_text("trainer: {callbacks+: [{class_path: full.Full}]}\n")
    run = start(tmp_path, POLICY, "--trainer.max_steps", "2", "--config", "full.yaml", processes=2)
    status, output = ended(run)
    assert status != 0
    assert output.count("rft: CheckpointSaveError") >= 1
    assert "process 0: OSError: [Errno 28] No space left on device" in output


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_both(tmp_path):
    (tmp_path / "broken.py").write_text(
        "import torch\n"
        "from lightning.pytorch import Callback\n"
        "from rft_lightning import GRPOModule\n"
        "class Broken(GRPOModule):\n"
        "    def advantages(self, *args):\n"
        "        bad = self.global_rank == 1 and self.global_step == 1\n"
        "        return super().advantages(*args) + (float('nan') if bad else 0.0)\n"
        "class Alike(Callback):\n"
        "    def on_train_end(self, trainer, module):\n"
        "        flat = torch.cat([p.detach().flatten() for p in module.policy.parameters()])\n"
        "        both = module.all_gather(flat)\n"
        "        assert torch.equal(both[0], both[1]) and flat.isfinite().all()\n"
        "        print('ranks agree')\n"
    )
    (tmp_path / "broken.yaml").write_text(
        "trainer: {callbacks+: [{class_path: broken.Alike}]}\n"
        "model: {class_path: broken.Broken, init_args: {on_nonfinite: skip}}\n"
    )
    run = start(tmp_path, POLICY, "--config", "broken.yaml", "--trainer.max_steps", "3", processes=2)
    status, output = ended(run)
    assert status == 0, output[-3000:]
    assert output.count("The step is skipped") == 1
    assert "ranks agree" in output
    rows = (next(iter(tmp_path.rglob("metrics.csv")))).read_text()
    assert "train/skipped_steps" in rows
