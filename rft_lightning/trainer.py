"""The Trainer of the command line, Lightning's with one more thing to do, and what no Trainer may be set to."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from rft_lightning.checkpointing import PolicyCheckpointIO
from rft_lightning.errors import ConfigConflictError
from rft_lightning.sharding import FSDP2Strategy

FSDP_MESSAGE = (
    "The strategy fsdp (FSDP1) cannot run manual optimisation, which these modules use. Shard with "
    "--trainer.strategy fsdp2, or use ddp where the policy fits on each device."
)
FSDP2_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class RFTTrainer(Trainer):
    """Lightning's Trainer with the commands `rollout` and `evaluate`."""

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

    def evaluate(
        self,
        model: LightningModule,
        datamodule: Any,
        split: str = "test",
        ckpt_path: str | None = None,
        output_dir: str | None = None,
        answers: int = 1,
        choose: str = "majority",
        temperature: float | None = None,
        limit: int | None = None,
    ) -> None:
        """Ask all questions of a split, write the answers to a folder, and score them.

        Stopped at any time, the same command goes on where it was. Several processes share the questions.

        Args:
            model: a PolicyModule, or a comparison system of rft_lightning.baselines.
            datamodule: where the questions come from.
            split: test, val or train.
            ckpt_path: a checkpoint of `fit` whose policy answers; the policy as it starts when None.
            output_dir: folder of the evaluation; one beside the checkpoint, or below trainer.default_root_dir, when
                None.
            answers: answers per question, of which one is chosen.
            choose: majority (the answer that agrees most with the others), or best (the one with the highest rewards,
                for which the right answer is looked at: an upper bound).
            temperature: of the sampling; None is model.eval_temperature (greedy) for one answer, 1 for several.
            limit: ask only the first questions, so many.
        """
        from rft_lightning.evaluation.run import evaluate
        from rft_lightning.evaluation.voting import Voting

        evaluate(
            self,
            model,
            datamodule,
            split=split,
            ckpt_path=ckpt_path,
            output_dir=output_dir,
            voting=Voting(answers, choose, temperature),
            limit=limit,
        )


def check_trainer(trainer: Any, *, quantize: str | None = None) -> None:
    """Refuse trainer settings that manual optimisation cannot honour.

    Args:
        trainer: the Trainer.
        quantize: the policy's `model.quantize`.

    Raises:
        ConfigConflictError: names our setting for the refused one.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ConfigConflictError(FSDP_MESSAGE)
    if isinstance(trainer.strategy, ModelParallelStrategy) and not isinstance(trainer.strategy, FSDP2Strategy):
        raise ConfigConflictError(
            f"trainer.strategy is {type(trainer.strategy).__name__}, whose tensor-parallel processes would train on "
            "the same batches. Use --trainer.strategy fsdp2."
        )
    if trainer.precision in ("16-mixed", "16-true"):
        raise ConfigConflictError(
            f"trainer.precision is {trainer.precision}: float16 needs loss scaling, which manual steps do not do. Use "
            "bf16-mixed, bf16-true or 32-true; model.dtype sets the dtype of the weights."
        )
    if isinstance(trainer.strategy, FSDP2Strategy) and quantize is not None:
        raise ConfigConflictError(
            f"model.quantize is {quantize}, but fsdp2 cannot shard 4-bit weights: their scales are no part of the "
            "parameters and would be lost. Use --trainer.strategy ddp, which holds the 4-bit policy on each device, or "
            "shard an unquantised one: model.quantize null."
        )
    # Lightning's own check misses a strategy that is chosen by name.
    if isinstance(trainer.strategy, FSDP2Strategy) and trainer.precision not in FSDP2_PRECISIONS:
        raise ConfigConflictError(
            f"fsdp2 runs in precision {', '.join(FSDP2_PRECISIONS)}, found {trainer.precision}. Set trainer.precision "
            "to one of these."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigConflictError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}. One batch is already split into "
            "optimiser steps and micro-batches here: set data.batch_size, model.mini_batch_prompts (prompts per "
            "optimiser step) and model.micro_batch_prompts (prompts per forward) instead."
        )
    if trainer.gradient_clip_val is not None:
        raise ConfigConflictError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}. Clipping is done at the optimiser step: set "
            "model.max_grad_norm instead."
        )


class TrueBFloat16(Precision):
    """Weights, gradients and optimiser state in bfloat16, as the policy is loaded; nothing else.

    Lightning's own plugin casts every batch, boxes of targets included, and makes bfloat16 the default dtype, in which
    rewards and advantages would be rounded.
    """

    precision = "bf16-true"


def equip_trainer(trainer: Any) -> None:
    """Give any Trainer what these modules need: checkpoint folders are read, and bf16-true is for weights alone."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = PolicyCheckpointIO()
    if isinstance(strategy.precision_plugin, HalfPrecision) and trainer.precision == "bf16-true":
        strategy.precision_plugin = TrueBFloat16()
