"""RolloutCheckpoint: checkpoints at rollout boundaries, written so that a crash leaves the old one whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rft_lightning.errors import ConfigConflictError


class RolloutCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt`` to resume from, and the best checkpoints by a validation metric.

    Lightning's ModelCheckpoint tests ``global_step % N == 0`` once per batch, which skips when one rollout batch makes
    several optimiser steps. This one saves at the first rollout boundary at or after every N optimiser steps, and
    always at the end of fit. A file is written under another name and renamed, so that a run killed while writing
    keeps the previous checkpoint.

    Args:
        every_n_steps: optimiser steps between two ``last.ckpt``.
        monitor: name of a validation metric; None keeps no best checkpoints.
        mode: ``max`` or ``min``: which values of `monitor` are better.
        keep: how many best checkpoints are kept.
        dirpath: folder; the first logger's own folder when None.

    Raises:
        ConfigConflictError: every_n_steps or keep is below 1.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        monitor: str | None = None,
        mode: str = "max",
        keep: int = 1,
        dirpath: str | None = None,
    ) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ConfigConflictError(f"Expected every_n_steps >= 1 and keep >= 1, found {every_n_steps} and {keep}.")
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
        self.every_n_steps = every_n_steps
        self._step_of_last = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step_of_last = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step // self.every_n_steps > self._step_of_last // self.every_n_steps
        if due or 0 <= trainer.max_steps <= step:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: an epoch's end is no special place."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if fitting and self.monitor is not None:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or self._step_of_last == trainer.global_step:  # type: ignore[attr-defined]
            return
        self._step_of_last = trainer.global_step
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        path = Path(filepath)
        partial = path.with_name(f".{path.name}.partial")
        try:
            super()._save_checkpoint(trainer, str(partial))
            if trainer.is_global_zero:
                os.replace(partial, path)
        except OSError:
            if trainer.is_global_zero:
                partial.unlink(missing_ok=True)
            raise
        self._last_checkpoint_saved = filepath
        trainer.strategy.barrier()
