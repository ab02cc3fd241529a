"""RolloutProgressBar: steps, reward, KL, completion length and seconds per phase on one line."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_SHOWN = {
    "loss": "train/loss",
    "reward": "train/reward",
    "kl": "train/kl",
    "length": "train/completions/mean_length",
    "rollout_s": "train/time/rollout",
    "score_s": "train/time/score",
    "update_s": "train/time/update",
}


class RolloutProgressBar(RichProgressBar):
    """Lightning's rich progress bar with the numbers one watches.

    The optimiser step out of `max_steps`; reward (in supervised runs the loss), KL, mean completion length in tokens
    and seconds per phase of the last rollout batch.
    """

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = {"step": f"{trainer.global_step}/{trainer.max_steps}"}
        for name, key in _SHOWN.items():
            value = trainer.callback_metrics.get(key)
            if value is not None and not (name == "loss" and "train/reward" in trainer.callback_metrics):
                metrics[name] = f"{float(value):.3g}"
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"
