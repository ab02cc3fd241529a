"""RolloutCheckpoint: checkpoints at rollout boundaries, which a crash cannot harm, and runs that stop when asked to."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import CheckpointException

from rft_lightning.collectives import gather_objects
from rft_lightning.errors import CheckpointError, CheckpointSaveError, ConfigConflictError
from rft_lightning.failures import end_with_parent
from rft_lightning.interruption import EXIT_STATUS, Interrupted, StopRequest
from rft_lightning.placing import check_place, claimed, partial_of, place, remove, remove_leftovers, size

_log = logging.getLogger(__name__)
# What writing raises where a disk is full, a quota is reached or memory runs out: torch's zip writer turns an OSError
# into a RuntimeError, and distributed checkpoints wrap it in what is no Exception.
_FAILURES = (OSError, RuntimeError, MemoryError, CheckpointException)
_GB = 1e9


class RolloutCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt`` to resume from, and the best checkpoints by a validation metric; save and stop on a signal.

    Lightning's ModelCheckpoint tests ``global_step % N == 0`` once per batch, which skips when one rollout batch makes
    several optimiser steps. This one saves at the first rollout boundary at or after every N optimiser steps, before
    each validation, and always at the end of fit. A checkpoint, file or folder, is written under another name and put
    in its place by one rename: whenever a run is killed, ``last.ckpt`` is the old one or the new one, whole. (A folder
    is kept beside it, and ``last.ckpt`` is a link to it.)

    On SIGTERM or SIGUSR1 to any process, or after `wall_time`, all processes finish their rollout batch (or
    validation), save, and stop with :class:`rft_lightning.interruption.Interrupted`, exit status 75: the same command
    with ``--ckpt_path .../last.ckpt`` ends with the weights of a run that was never interrupted. A second signal stops
    at once.

    Args:
        every_n_steps: optimiser steps between two ``last.ckpt``.
        monitor: name of a validation metric; None keeps no best checkpoints.
        mode: ``max`` or ``min``: which values of `monitor` are better.
        keep: how many best checkpoints are kept.
        dirpath: folder; the first logger's own folder when None. ``--ckpt_path last`` resumes from the ``last.ckpt`` in
            it, if there is one.
        wall_time: how long this process may run before it saves and stops: seconds, or HH:MM:SS, or DAYS-HH:MM:SS.
            Less than the limit of the cluster by a rollout batch, a validation and a save.
        on_failed_save: ``warn``: a run whose checkpoint cannot be written (a full disk) says so, keeps the one before,
            goes on, and tries again after `every_n_steps`; only its last save must succeed. ``stop``: it ends there.

    Raises:
        ConfigConflictError: an argument is out of its range; or (after the sanity check of fit) validation gives no
            metric `monitor`.
        CheckpointSaveError: (in fit, on all processes) a checkpoint could not be written, see `on_failed_save`.
        CheckpointError: (at the start of fit) a folder is where ``last.ckpt`` should be, or another run that still goes
            on keeps its checkpoints there.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        monitor: str | None = None,
        mode: str = "max",
        keep: int = 1,
        dirpath: str | None = None,
        wall_time: float | str | None = None,
        on_failed_save: str = "warn",
    ) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ConfigConflictError(f"Expected every_n_steps >= 1 and keep >= 1, found {every_n_steps} and {keep}.")
        if on_failed_save not in ("warn", "stop"):
            raise ConfigConflictError(f"Expected on_failed_save warn or stop, found {on_failed_save!r}.")
        super().__init__(
            dirpath=dirpath,
            filename="best-{step}",
            monitor=monitor,
            mode=mode,
            save_top_k=keep if monitor is not None else 0,
            save_last=True,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_n_steps, self.on_failed_save = every_n_steps, on_failed_save
        self._wall_time, self._stop_request = wall_time, StopRequest(wall_time)
        # Why the run stops, once the processes have agreed to.
        self._stopping: str | None = None
        self._saved_step = self._tried_step = 0
        self._claimed = ExitStack()

    # When

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._stop_request, self._stopping = StopRequest(self._wall_time), None
            if _started_by_lightning(trainer):
                end_with_parent()
            directory = Path(str(self.dirpath))
            check_place(directory / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
            self._claim(trainer, directory)
            if trainer.is_global_zero:
                remove_leftovers(directory, keep=trainer.ckpt_path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._claimed.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._claimed.close()

    def _claim(self, trainer: Trainer, directory: Path) -> None:
        """Keep the folder to this run: another one's clearing up would take what this one is about to put in place."""
        taken = False
        if trainer.is_global_zero:
            taken = not self._claimed.enter_context(claimed(directory))
        if trainer.strategy.broadcast(taken):
            raise CheckpointError(
                f"Another run that still goes on keeps its checkpoints in {directory}. Wait until it has ended, or end "
                "it, or give this one another dirpath."
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A name that no validation gives would otherwise be found at the first one, hours later."""
        known = sorted(name for name in trainer.callback_metrics if not name.startswith("train/"))
        if self.monitor is not None and self.monitor not in known:
            raise ConfigConflictError(
                f"monitor is {self.monitor!r}, which validation does not give: there are {', '.join(known) or 'none'}."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._listen(trainer)
        self._saved_step = self._tried_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._ask_to_stop(trainer)
        due = step // self.every_n_steps > self._tried_step // self.every_n_steps
        if due or self._stopping or 0 <= trainer.max_steps <= step:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch's end is no special place."""
        self._stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation may take longer than a stopping run is given, so what was learnt is saved before it."""
        if _in_fit(trainer):
            self._stop(trainer)
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _in_fit(trainer):
            return
        if self.monitor is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_best(trainer)
        self._ask_to_stop(trainer)
        if self._stopping:
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)
        self._save_last(trainer, final=True)

    # Stopping

    def _listen(self, trainer: Trainer) -> None:
        launcher: Any = trainer.strategy.launcher
        self._stop_request.listen(loud=trainer.is_global_zero, end_others=getattr(launcher, "kill", None))

    def _ask_to_stop(self, trainer: Trainer) -> None:
        """Agree with the other processes: a signal may have reached one of them only."""
        reasons = [reason for reason in gather_objects(self._stop_request.reason) if reason]
        self._stopping = self._stopping or next(iter(reasons), None)

    def _stop(self, trainer: Trainer) -> None:
        """End the run if that was agreed: not at the boundary itself, after which Lightning still logs its metrics."""
        if not self._stopping:
            return
        self._save_last(trainer, final=True)
        saved = f"saved in {self.last_model_path}. Go on with the same command and --ckpt_path {self.last_model_path}"
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            saved = "nothing saved (fast_dev_run)"
        # Lightning kills the first process of a node as soon as one that it started there ends with another status.
        status = 0 if _started_by_lightning(trainer) else EXIT_STATUS
        raise Interrupted(f"Stopped at step {trainer.global_step} ({self._stopping}), {saved}", status)

    # Saving

    def _save_last(self, trainer: Trainer, *, final: bool = False) -> None:
        step = trainer.global_step
        if trainer.fast_dev_run or self._saved_step == step or (self._tried_step == step and not final):  # type: ignore[attr-defined]
            return
        self._tried_step = step
        if self._try(lambda: self._save_last_checkpoint(trainer, self._monitor_candidates(trainer)), final=final):
            self._saved_step = step

    def _save_best(self, trainer: Trainer) -> None:
        best = {name: getattr(self, name) for name in self.state_dict() if name not in ("monitor", "dirpath")}
        best["best_k_models"] = dict(self.best_k_models)
        if not self._try(lambda: self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))):
            vars(self).update(best)

    def _try(self, save: Callable[[], None], *, final: bool = False) -> bool:
        """Save; whether it went well, where a failure may wait for the next time."""
        try:
            save()
        except CheckpointSaveError as error:
            if final or self.on_failed_save == "stop":
                raise
            _log.error("%s The run goes on, and tries again after %d steps.", error, self.every_n_steps)
            return False
        return True

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        path = Path(filepath)
        partial = partial_of(path)
        try:
            self._together(lambda: self._write(trainer, partial))
            self._together(lambda: place(partial, path) if trainer.is_global_zero else None)
        except CheckpointSaveError as error:
            message = _what_to_do(error, partial, path) if trainer.is_global_zero else ""
            raise CheckpointSaveError(trainer.strategy.broadcast(message)) from error
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _write(self, trainer: Trainer, partial: Path) -> None:
        try:
            trainer.save_checkpoint(partial, self.save_weights_only)
        except _FAILURES:
            trainer.strategy.barrier()  # with which saving ends, and where processes that did not fail wait
            raise

    def _together(self, action: Callable[[], None]) -> None:
        """Do something that may fail on some processes, and then fails on all: none may go on to wait for another."""
        failure: BaseException | None = None
        try:
            action()
        except _FAILURES as error:
            failure = error
        reasons = gather_objects(None if failure is None else _reason(failure))
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise CheckpointSaveError(f"process {rank}: {reason}") from failure

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Lightning's cannot remove a link to a folder."""
        if trainer.is_global_zero:
            remove(Path(filepath))

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """For ``--ckpt_path last``."""
        if self.dirpath is None:
            raise ConfigConflictError(
                "ckpt_path is last, but each run gets a new folder of its own, in which there is none yet, and would "
                "begin anew. Give the path of the last.ckpt, or the RolloutCheckpoint a dirpath that all runs share."
            )
        last = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        if last.is_symlink() and not last.exists():
            raise CheckpointError(
                f"{last} is a link to {os.readlink(last)}, which is not there: a copy without the folder, or it "
                "was removed by hand. Put the folder back, or remove the link to begin anew."
            )
        return super()._find_last_checkpoints(trainer)


def _in_fit(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _started_by_lightning(trainer: Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


def _reason(failure: BaseException) -> str:
    """One line on what went wrong, from the error of the system where there is one behind it."""
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return f"{type(cause or failure).__name__}: {cause or failure}".splitlines()[0]


def _what_to_do(error: CheckpointSaveError, partial: Path, path: Path) -> str:
    """The message of a failed save; what was written of it is removed."""
    written, earlier = size(partial), size(path)
    free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
    try:
        remove(partial)
    except OSError as left:
        _log.warning("%s could not be removed: %s", partial, left)
    before = f"The one before it, {earlier / _GB:.2f} GB, is whole." if earlier else "There is none before it."
    return (
        f"The checkpoint {path} could not be written ({error}): {written / _GB:.2f} GB were written, and "
        f"{free / _GB:.2f} GB are free on that file system. {before} Free space there (a quota may be lower than what "
        "is free), or set another dirpath of the RolloutCheckpoint."
    )
