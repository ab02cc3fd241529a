"""HFExport: the tuned policy as a Hugging Face folder at the end of fit."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rft_lightning.checkpointing import export_policy


class HFExport(Callback):
    """Writes policy and processor so that plain transformers load them from the folder.

    The processor is the one of the training prompts, its image size included.

    Args:
        output_dir: where to write; an earlier export there is replaced. None: ``policy`` in the first logger's folder.
    """

    def __init__(self, output_dir: str | Path | None = None) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "policy"
            data = getattr(trainer, "datamodule", None)
            processor = pl_module.processor if data is None else data.encoder.processor
            export_policy(pl_module.policy, processor, folder)  # type: ignore[arg-type]
            rank_zero_info(f"The tuned policy is in {folder}; use it as --model.policy {folder}")
