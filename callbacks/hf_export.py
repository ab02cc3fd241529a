"""HFExport: the tuned policy as a Hugging Face folder at the end of fit."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rft_lightning.checkpointing import export_policy


class HFExport(Callback):
    """Writes policy and processor so that plain transformers load them from the folder.

    Args:
        output_dir: where to write; an earlier export there is replaced.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            export_policy(pl_module.policy, pl_module.processor, self.output_dir)  # type: ignore[arg-type]
            rank_zero_info(f"The tuned policy is in {self.output_dir}; use it as --model.policy {self.output_dir}")
