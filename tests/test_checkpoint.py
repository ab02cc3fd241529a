"""RolloutCheckpoint: when it saves, that saving is atomic, and that a resumed run ends like an uninterrupted one."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rft_lightning import GRPOModule, SFTModule
from rft_lightning.callbacks import RolloutCheckpoint
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.placing import claimed
from rft_lightning.tasks import DetectionTask


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def length_reward(answer, target, *, rules, step):
    """A reward that a random policy varies in; without one nothing would move."""
    return (len(answer.text) % 17) / 17


def data(tiny_policy, **kwargs):
    settings = {"batch_size": 2, "train_size": 6, "val_size": 4}
    settings["task"] = DetectionTask(rewards={"length": length_reward})
    return ShapesDataModule(processor=tiny_policy, **{**settings, **kwargs})


def grpo(tiny_policy, **kwargs):
    settings = {"group_size": 2, "max_completion_length": 5, "optimizer": adamw, "schedule": "linear"}
    return GRPOModule(tiny_policy, **{**settings, **kwargs})


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.policy.named_parameters()}


class Stop(Exception):
    pass


class StopAfter(RolloutCheckpoint):
    """A RolloutCheckpoint and a crash right after the rollout batch that reaches `step`."""

    def __init__(self, step, **kwargs):
        super().__init__(**kwargs)
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step >= self.step:
            raise Stop


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_policy, make_trainer, tmp_path, stop, workers
):
    """Stops inside an epoch, at its end (3 batches) and after it; 7 steps in all."""
    whole = grpo(tiny_policy)
    make_trainer(7).fit(whole, datamodule=data(tiny_policy, num_workers=workers))
    interrupted = grpo(tiny_policy)
    callback = StopAfter(stop, every_n_steps=1, dirpath=str(tmp_path / "ckpt"))
    with pytest.raises(Stop):
        make_trainer(7, callbacks=[callback]).fit(interrupted, datamodule=data(tiny_policy, num_workers=workers))
    start = weights(interrupted)
    resumed = grpo(tiny_policy)
    trainer = make_trainer(7)
    trainer.fit(
        resumed, datamodule=data(tiny_policy, num_workers=workers), ckpt_path=str(tmp_path / "ckpt" / "last.ckpt")
    )
    assert trainer.global_step == 7
    ours, theirs = weights(resumed), weights(whole)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) == 0
    assert max((ours[name] - start[name]).abs().max().item() for name in ours) > 1e-4


def test_the_checkpoint_at_the_end_of_fit_continues_with_more_steps(tiny_policy, make_trainer, tmp_path):
    def constant(**kwargs):
        return grpo(tiny_policy, schedule="constant", **kwargs)

    whole = constant()
    make_trainer(6).fit(whole, datamodule=data(tiny_policy))
    first = constant()
    make_trainer(4, callbacks=[RolloutCheckpoint(every_n_steps=100, dirpath=str(tmp_path))]).fit(
        first, datamodule=data(tiny_policy)
    )
    second = constant()
    make_trainer(6).fit(second, datamodule=data(tiny_policy), ckpt_path=str(tmp_path / "last.ckpt"))
    for (name, a), b in zip(weights(second).items(), weights(whole).values(), strict=True):
        assert torch.equal(a, b), name


def test_saves_at_the_first_boundary_at_or_after_n_steps(tiny_policy, make_trainer, tmp_path):
    """Two optimiser steps per rollout batch and N = 3: Lightning's own test would save at step 6 only."""
    saved = []

    class Spy(RolloutCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            saved.append((trainer.global_step, Path(filepath).name))
            super()._save_checkpoint(trainer, filepath)

    callback = Spy(every_n_steps=3, dirpath=str(tmp_path))
    make_trainer(10, callbacks=[callback]).fit(grpo(tiny_policy, num_iterations=2), datamodule=data(tiny_policy))
    assert saved == [(4, "last.ckpt"), (6, "last.ckpt"), (10, "last.ckpt")]
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Scores(Callback):
    """Logs a given score at each validation."""

    def __init__(self, scores):
        self.scores = iter(scores)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/score", next(self.scores))


@pytest.mark.parametrize(("mode", "kept"), [("max", [2, 3]), ("min", [1, 4])])
def test_keeps_the_best_by_a_validation_metric(tiny_policy, make_trainer, tmp_path, mode, kept):
    callback = RolloutCheckpoint(every_n_steps=1, monitor="val/score", mode=mode, keep=2, dirpath=str(tmp_path))
    trainer = make_trainer(
        4,
        callbacks=[Scores([0.1, 0.9, 0.5, 0.3]), callback],
        limit_val_batches=1.0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [*(f"best-step={step}.ckpt" for step in kept), "last.ckpt"]
    assert Path(callback.best_model_path).name == f"best-step={2 if mode == 'max' else 1}.ckpt"


def test_a_metric_that_validation_does_not_give_is_refused_before_training(tiny_policy, make_trainer, tmp_path):
    callback = RolloutCheckpoint(monitor="val/scor", dirpath=str(tmp_path))
    trainer = make_trainer(2, callbacks=[Scores([0.1]), callback], limit_val_batches=1.0, num_sanity_val_steps=1)
    with pytest.raises(ConfigConflictError, match=r"monitor is 'val/scor', which validation .* there are val/score\."):
        trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    assert trainer.global_step == 0


def test_sft_resumes_exactly_too(tiny_policy, make_trainer, tmp_path):
    def sft():
        return SFTModule(tiny_policy, optimizer=adamw, schedule="linear")

    whole = sft()
    make_trainer(5).fit(whole, datamodule=data(tiny_policy))
    with pytest.raises(Stop):
        make_trainer(5, callbacks=[StopAfter(2, every_n_steps=1, dirpath=str(tmp_path))]).fit(
            sft(), datamodule=data(tiny_policy)
        )
    resumed = sft()
    make_trainer(5).fit(resumed, datamodule=data(tiny_policy), ckpt_path=str(tmp_path / "last.ckpt"))
    for (name, a), b in zip(weights(resumed).items(), weights(whole).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_second_run_may_not_keep_its_checkpoints_in_the_same_folder(tiny_policy, make_trainer, tmp_path):
    def run():
        return make_trainer(1, callbacks=[RolloutCheckpoint(dirpath=str(tmp_path))])

    with claimed(tmp_path) as ours, claimed(tmp_path) as theirs:
        assert (ours, theirs) == (True, False)
        with pytest.raises(
            CheckpointError, match=f"Another run that still goes on keeps its checkpoints in {tmp_path}"
        ):
            run().fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    run().fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    with claimed(tmp_path) as free:  # given up with the end of fit
        assert free


def test_processes_that_load_data_do_not_keep_the_folder(tmp_path):
    """They outlive a run that is killed by some seconds, in which it may be started again."""
    begun, tell = os.pipe()
    with claimed(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(tell, b"1")
            time.sleep(60)
            os._exit(0)
        os.read(begun, 1)
    try:
        with claimed(tmp_path) as free:
            assert free
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_last_is_refused_where_its_folder_is_gone(tiny_policy, make_trainer, tmp_path):
    (tmp_path / "last.ckpt").symlink_to("last.ckpt.01234567")
    trainer = make_trainer(1, callbacks=[RolloutCheckpoint(dirpath=str(tmp_path))])
    with pytest.raises(CheckpointError, match=r"last\.ckpt\.01234567, which is not there"):
        trainer.fit(grpo(tiny_policy), datamodule=data(tiny_policy), ckpt_path="last")


def test_errors():
    with pytest.raises(ConfigConflictError, match="every_n_steps >= 1"):
        RolloutCheckpoint(every_n_steps=0)
