"""The Trainer of the command line: Lightning's, with one more thing to do, `rollout`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer


class RFTTrainer(Trainer):
    """Lightning's Trainer with a `rollout` command."""

    def rollout(
        self,
        model: LightningModule,
        datamodule: Any,
        num_samples: int = 4,
        split: str = "train",
        group_size: int | None = None,
        temperature: float | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Draw a group of answers for a few samples and print questions, answers, rewards and advantages.

        Nothing is trained. Shows at a glance whether prompts, parsing, coordinates and rewards fit together.

        Args:
            model: a GRPOModule.
            datamodule: where the samples come from.
            num_samples: how many samples, from the start of the split.
            split: train, val or test.
            group_size: answers per sample; the model's own when None.
            temperature: sampling temperature; the model's own when None.
            ckpt_path: a checkpoint of `fit` whose policy answers; the policy as it starts when None.
        """
        from rft_lightning.report.rollout import print_rollouts

        print_rollouts(
            model,
            datamodule,
            num_samples=num_samples,
            split=split,
            group_size=group_size,
            temperature=temperature,
            ckpt_path=ckpt_path,
            trainer=self,
        )
