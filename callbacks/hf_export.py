"""HFExport: the tuned policy as a Hugging Face folder at the end of fit."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rft_lightning.checkpointing import check_export_folder, export_policy


class HFExport(Callback):
    """Writes policy and processor so that plain transformers load them from the folder.

    The processor is the one of the training prompts, its image size included. A model card tells what the policy was
    made of, on which rows, with which configuration, and what the last validation measured.

    Args:
        output_dir: where to write; an earlier export there is replaced. None: ``policy`` in the first logger's folder.

    Raises:
        ConfigConflictError: (at the start of fit) something is there that is no earlier export.
    """

    def __init__(self, output_dir: str | Path | None = None) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._folder = Path()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # log_dir is a broadcast, so every process asks for it.
        self._folder = self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "policy"
        if trainer.is_global_zero:
            check_export_folder(self._folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        policy, record = pl_module.whole_policy(), pl_module.record()  # type: ignore[operator]
        if trainer.is_global_zero:
            export_policy(policy, pl_module.prompt_processor, self._folder, record=record)
            rank_zero_info(f"The tuned policy is in {self._folder}; use it as --model.policy {self._folder}")
