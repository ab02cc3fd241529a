"""SFTModule: supervised fine-tuning on the same samples, prompts and evaluation as reinforcement fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.shared_prefix import group_logprobs
from rft_lightning.policy_module import PolicyModule
from rft_lightning.run_statistics import Clock, GroupSizes, Workload, group_sizes
from rft_lightning.sample import PromptBatch


class SFTModule(PolicyModule):
    """Cross-entropy of the solution text, mean over its tokens.

    Args:
        policy: see :class:`PolicyModule`.
        with_thought: put the task's minimal thought before the answer, so that the format of the question is kept; the
            published data sets hold answers without thoughts.
        **kwargs: see :class:`PolicyModule`.
    """

    def __init__(self, policy: str, *, with_thought: bool = True, **kwargs: Any) -> None:
        super().__init__(policy, **kwargs)
        self.with_thought = with_thought
        # Of the last training batch, for callbacks.
        self.workload: Workload | None = None

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One optimiser step per mini-batch."""
        if batch.waves > 1:
            raise ConfigConflictError(
                f"data.oversample is {batch.waves}, but supervised fine-tuning learns from every row: set it to 1."
            )
        clock = Clock()
        losses, trained = [], []
        for mini in batch.chunks(self.mini_batch_prompts or len(batch)):
            if self.reached_max_steps():
                break
            loss, sizes = self._step(mini)
            losses.append(loss)
            trained += sizes
        done = [loss for loss in losses if loss is not None]
        if losses:
            # Lightning would repeat the last value, were there none.
            mean = torch.stack(done).mean() if done else torch.full((), torch.nan, device=self.device)
            self.log("train/loss", mean, prog_bar=True, batch_size=len(batch), sync_dist=True)
        if self.on_nonfinite == "skip":
            self.log("train/skipped_steps", float(len(losses) - len(done)), batch_size=len(batch))
        clock.lap("update")
        self.workload = Workload(clock.seconds, [], trained, self.layout, scoring_passes=0, training_passes=1)
        for name, value in clock.statistics().items():
            self.log(f"train/{name}", value, batch_size=len(batch))

    def _step(self, mini: PromptBatch) -> tuple[Tensor | None, list[GroupSizes]]:
        micro_batches = mini.chunks(self.micro_batch_prompts or len(mini))
        encoded = [(micro, *self.solutions(micro)) for micro in micro_batches]
        # Gradients are averaged over processes, so the loss is divided by the mean token count of a process.
        tokens = torch.stack([mask.sum() for _, _, mask in encoded]).sum().float()
        tokens = self.trainer.strategy.reduce(tokens, reduce_op="mean")

        def loss_of(piece: tuple[PromptBatch, Tensor, Tensor]) -> Tensor:
            prompt, ids_BC, mask_BC = piece
            assert self.policy is not None
            logp_B1C = group_logprobs(self.policy, prompt, ids_BC[:, None], mask_BC[:, None], forward=self.layout)
            return -logp_B1C.sum() / tokens

        loss = self.optimiser_step(encoded, loss_of, [sample.id for sample in mini.samples])
        lengths_B1 = torch.cat([mask_BC.sum(1, keepdim=True) for _, _, mask_BC in encoded]).cpu()
        return loss, group_sizes(mini, lengths_B1).cut(self.micro_batch_prompts)

    def solutions(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Token ids [B, C] of the solution texts with their end of sequence, and their mask [B, C].

        Raises:
            ConfigConflictError: a sample has no target.
        """
        tokenizer = self.processor.tokenizer
        texts = []
        for sample in batch.samples:
            if sample.target is None:
                raise ConfigConflictError(
                    f"Sample {sample.id!r} has no target, so there is no solution to learn; train on labelled samples."
                )
            text = sample.target.solution_text or ""
            if self.with_thought:
                text = f"<think>{sample.task.thought(sample.target)}</think> {text}"
            texts.append(text + tokenizer.eos_token)
        encoded = tokenizer(
            texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
        ).to(self.device)
        return encoded["input_ids"], encoded["attention_mask"].bool()
