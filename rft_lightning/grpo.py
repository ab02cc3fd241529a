"""GRPOModule: group rollouts, verifiable rewards, and the GRPO update against a frozen reference."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.advantages import group_advantages, total_rewards
from rft_lightning.errors import ConfigConflictError
from rft_lightning.objectives import GRPOObjective
from rft_lightning.policy.loading import evaluating, frozen_copy, load_policy
from rft_lightning.policy.sampling import Sampling
from rft_lightning.policy.shared_prefix import group_logprobs_and_entropies
from rft_lightning.policy_module import PolicyModule
from rft_lightning.sample import PromptBatch, Rollouts


@dataclass
class MicroBatch:
    """A few groups of one optimiser step: rollouts of b prompts, and per completion [b*G] or token [b*G, C] data."""

    rollouts: Rollouts
    advantages: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None


@dataclass
class Scores:
    """Rewards of N completions.

    Attributes:
        names: K reward names, the union over the tasks of the batch.
        rewards: [N, K] unweighted; NaN where a reward does not apply.
        weighted: [N, K] times the weights of each sample's task.
        parse_rate: share of completions that could be read as an answer of their kind.
    """

    names: list[str]
    rewards: Tensor
    weighted: Tensor
    parse_rate: float


class Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End the phase that is running."""
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now


class GRPOModule(PolicyModule):
    """Group relative policy optimisation with verifiable rewards (Visual-RFT).

    One training step is one rollout batch: sample G answers to each prompt, score them, then `num_iterations` passes
    over mini-batches, one optimiser step each.

    Args:
        policy: see :class:`PolicyModule`.
        group_size: G, answers per prompt; at least 2.
        objective: the loss; GRPOObjective() when None.
        num_iterations: passes over each rollout batch (mu).
        rollout_prompts: prompts decoded at once; bounds the memory of the rollout. The whole batch when None.
        temperature: sampling temperature of the rollouts; log-probs are taken at the same one.
        top_k: sample among the k likeliest tokens; 0 for all.
        top_p: sample among the fewest tokens holding this probability; 1 for all.
        min_p: leave out tokens less likely than this share of the likeliest; 0 for none.
        scale_rewards: divide advantages by the standard deviation of the group or the batch, or not (none).
        **kwargs: see :class:`PolicyModule`.

    Raises:
        ConfigConflictError: a setting is out of its range.
    """

    def __init__(
        self,
        policy: str,
        *,
        group_size: int = 8,
        objective: GRPOObjective | None = None,
        num_iterations: int = 1,
        rollout_prompts: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        scale_rewards: str = "group",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        if group_size < 2:
            raise ConfigConflictError(
                f"model.group_size is {group_size}, expected at least 2: an answer's advantage is its reward relative "
                "to the others of its group."
            )
        if num_iterations < 1 or temperature <= 0:
            raise ConfigConflictError(
                f"Expected num_iterations >= 1 and temperature > 0, found {num_iterations} and {temperature}."
            )
        if rollout_prompts is not None and rollout_prompts < 1:
            raise ConfigConflictError(f"Expected rollout_prompts >= 1 or null, found {rollout_prompts}.")
        Sampling(temperature, top_k, top_p, min_p)  # refuses what is out of range
        self.group_size, self.num_iterations, self.rollout_prompts = group_size, num_iterations, rollout_prompts
        self.temperature = temperature
        self.sampling = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        self.scale_rewards = scale_rewards
        self.objective = objective if objective is not None else GRPOObjective()
        # Outside the module tree: no optimiser, checkpoint or train() reaches the reference model.
        self._reference: tuple[nn.Module, ...] = ()

    def configure_model(self) -> None:
        """Load the policy and, to train all its weights with beta > 0, keep a frozen copy of it as it starts."""
        super().configure_model()
        evaluating = self._trainer is not None and self._trainer.state.fn != "fit"
        if self.objective.beta > 0 and self.lora is None and not self._reference and not evaluating:
            assert self.policy is not None
            self._reference = (frozen_copy(self.policy) if self.device_mesh is None else self._sharded_reference(),)

    def _sharded_reference(self) -> nn.Module:
        """Loaded anew: sharded models cannot be copied."""
        reference = load_policy(self.checkpoint, dtype=self.dtype_name, attn_implementation=self.attn_implementation)
        self._shard(reference.eval().requires_grad_(False))
        return reference

    def on_fit_start(self) -> None:
        """Move the reference model, which Lightning does not know."""
        super().on_fit_start()
        for reference in self._reference:
            reference.to(self.device)

    @contextmanager
    def reference_model(self) -> Iterator[nn.Module]:
        """The policy as it started, to score with: the frozen copy, or the policy with its adapters off."""
        if self.lora is None:
            with torch.no_grad():
                yield self._reference[0]
            return
        policy: Any = self.policy
        with evaluating(policy), torch.no_grad(), policy.disable_adapter():
            yield policy

    def steps_per_batch(self, batch_size: int) -> int:
        """Optimiser steps that a rollout batch of `batch_size` prompts makes."""
        return self.num_iterations * super().steps_per_batch(batch_size)

    # One rollout batch

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Roll out, score, update."""
        clock = Clock()
        rollouts = self.roll_out(batch)
        clock.lap("rollout")
        scores = self.score(rollouts)
        advantages_N = self.advantages(scores, self.group_size)
        clock.lap("score")
        statistics = self.update(rollouts, advantages_N)
        clock.lap("update")
        self._log_batch(rollouts, scores, statistics, clock.seconds)

    def roll_out(
        self, batch: PromptBatch, *, group_size: int | None = None, temperature: float | None = None
    ) -> Rollouts:
        """G sampled answers to each prompt, `rollout_prompts` prompts at a time."""
        chunks = batch.chunks(self.rollout_prompts or len(batch))
        parts = [
            self.generate(
                chunk,
                group_size or self.group_size,
                temperature=self.temperature if temperature is None else temperature,
                step=self.global_step,
                **self.sampling,
            )
            for chunk in chunks
        ]
        return join_rollouts(batch, parts, self.processor.tokenizer.pad_token_id)

    def score(self, rollouts: Rollouts) -> Scores:
        """Read and reward every completion.

        Raises:
            ConfigConflictError: a sample has no target.
        """
        names = list(dict.fromkeys(name for s in rollouts.prompts.samples for name in s.task.rewards))
        rewards_NK = torch.full((sum(map(len, rollouts.texts)), len(names)), torch.nan)
        weights_NK = torch.zeros_like(rewards_NK)
        parsed: list[bool] = []
        for sample, texts in zip(rollouts.prompts.samples, rollouts.texts, strict=True):
            if sample.target is None:
                raise ConfigConflictError(
                    f"Sample {sample.id!r} has no target, so it cannot be rewarded; train on labelled samples."
                )
            columns = [names.index(name) for name in sample.task.rewards]
            weights = torch.tensor(list(sample.task.reward_weights.values()))
            for text in texts:
                row = len(parsed)
                answer = sample.task.read(text, rollouts.prompts.frame, sample.image_size)
                rewards_NK[row, columns] = sample.task.score(
                    answer, sample.target, step=self.global_step, sample_id=sample.id
                )
                weights_NK[row, columns] = weights
                parsed.append(bool(answer.parsed))
        device = rollouts.completion_ids.device
        return Scores(names, rewards_NK.to(device), (rewards_NK * weights_NK).to(device), sum(parsed) / len(parsed))

    def advantages(self, scores: Scores, group_size: int) -> Tensor:
        """Group-relative advantages [N]."""
        return group_advantages(scores.weighted, group_size, scale=self.scale_rewards)

    def sample_and_score(
        self, batch: PromptBatch, *, group_size: int | None = None, temperature: float | None = None
    ) -> tuple[Rollouts, Scores, Tensor]:
        """Rollouts, their scores and advantages [N], without training."""
        rollouts = self.roll_out(batch, group_size=group_size, temperature=temperature)
        scores = self.score(rollouts)
        return rollouts, scores, self.advantages(scores, rollouts.completion_ids.shape[1])

    def update(self, rollouts: Rollouts, advantages_N: Tensor) -> dict[str, Tensor]:
        """`num_iterations` passes of optimiser steps; returns statistics averaged over them."""
        mini_batches = self._mini_batches(rollouts, advantages_N)
        if self.num_iterations * len(mini_batches) > 1:
            # With a single step the policy is still the one that sampled, and its ratio is 1 without a second forward.
            assert self.policy is not None
            with evaluating(self.policy), torch.no_grad():  # dropout had no part in the sampling
                for micro in (micro for mini in mini_batches for micro in mini):
                    micro.old_logp = self._logprobs(self.policy, micro.rollouts)[0]
        totals: list[dict[str, Tensor]] = []
        for _ in range(self.num_iterations):
            for mini in mini_batches:
                if self.reached_max_steps():
                    break
                totals.append(self._mini_step(mini))
        return {name: torch.stack([t[name] for t in totals]).mean() for name in totals[0]} if totals else {}

    def _mini_batches(self, rollouts: Rollouts, advantages_N: Tensor) -> list[list[MicroBatch]]:
        """The batch cut into mini-batches of micro-batches, with the reference model's log-probs."""
        group_size = rollouts.completion_ids.shape[1]
        mini_size = self.mini_batch_prompts or len(rollouts)
        micro_size = min(self.micro_batch_prompts or mini_size, mini_size)
        mini_batches = []
        for start in range(0, len(rollouts), mini_size):
            stop = min(start + mini_size, len(rollouts))
            mini = []
            for first in range(start, stop, micro_size):
                last = min(first + micro_size, stop)
                part = rollouts.select(first, last)
                micro = MicroBatch(part, advantages_N[first * group_size : last * group_size])
                if self.objective.beta > 0:
                    with self.reference_model() as reference:
                        micro.ref_logp = self._logprobs(reference, part)[0]
                mini.append(micro)
            mini_batches.append(mini)
        return mini_batches

    def _mini_step(self, mini: list[MicroBatch]) -> dict[str, Tensor]:
        completions = sum(len(micro.advantages) for micro in mini)
        tokens = sum(int(micro.rollouts.completion_mask.sum()) for micro in mini)
        collected: list[tuple[float, float, dict[str, Tensor]]] = []

        def loss_of(micro: MicroBatch) -> Tensor:
            logp, entropy = self._logprobs(self.policy, micro.rollouts, with_entropy=True)
            mask = micro.rollouts.completion_mask.flatten(0, 1)
            loss, stats = self.objective(
                logp,
                micro.old_logp,
                micro.ref_logp,
                micro.advantages,
                mask,
                entropy=entropy,
                normalizer=completions,
            )
            collected.append((len(micro.advantages) / completions, int(mask.sum()) / tokens, stats))
            return loss

        names = [sample.id for micro in mini for sample in micro.rollouts.prompts.samples]
        loss = self.optimiser_step(mini, loss_of, names)
        # kl_sequence is a mean over completions, all other statistics are means over tokens.
        averaged = {
            name: torch.stack(
                [stats[name] * (rows if name == "kl_sequence" else part) for rows, part, stats in collected]
            ).sum()
            for name in collected[0][2]
        }
        return {"loss": loss, **averaged}

    def _logprobs(
        self, model: nn.Module | None, rollouts: Rollouts, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        assert model is not None
        logp_BGC, entropy_BGC = group_logprobs_and_entropies(
            model,
            rollouts.prompts,
            rollouts.completion_ids,
            rollouts.completion_mask,
            temperature=self.temperature,
            forward=self.layout,
            with_entropy=with_entropy,
        )
        return logp_BGC.flatten(0, 1), None if entropy_BGC is None else entropy_BGC.flatten(0, 1)

    # Bookkeeping

    def _log_batch(
        self, rollouts: Rollouts, scores: Scores, statistics: dict[str, Tensor], seconds: dict[str, float]
    ) -> None:
        """TRL's names where TRL has the number; one value per rollout batch, averaged over processes."""
        total_BG = total_rewards(scores.weighted).view(-1, self.group_size)
        std_B = total_BG.std(1)
        values: dict[str, Any] = {
            "reward": total_BG.nanmean(),
            "reward_std": std_B.nanmean(),
            "frac_reward_zero_std": (std_B < 1e-6).float().mean(),
            "completions/mean_length": rollouts.completion_mask.sum(-1).float().mean(),
            "completions/clipped_ratio": rollouts.truncated.float().mean(),
            "parse_rate": scores.parse_rate,
            "step_time": sum(seconds.values()),
            **{f"time/{phase}": value for phase, value in seconds.items()},
            **statistics,
        }
        for name, column in zip(scores.names, scores.rewards.T, strict=True):
            values[f"rewards/{name}/mean"] = column.nanmean()
        shown = {"reward", "kl", "completions/mean_length", "time/rollout", "time/update"}
        for name, value in self._averaged({name: float(value) for name, value in values.items()}).items():
            self.log(f"train/{name}", value, prog_bar=name in shown, batch_size=len(rollouts))
        self.log("train/learning_rate", self._scheduler().get_last_lr()[0])

    def _averaged(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the processes that have a number: ranks of a mixture may hold different rewards."""
        gathered: list[dict[str, float]] = [values]
        if self.trainer.world_size > 1:
            gathered = [{} for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, values)
        means = {}
        for name in dict.fromkeys(name for local in gathered for name in local):
            numbers = [local[name] for local in gathered if not math.isnan(local.get(name, math.nan))]
            means[name] = sum(numbers) / len(numbers) if numbers else math.nan
        return means


def join_rollouts(batch: PromptBatch, parts: list[Rollouts], pad: int) -> Rollouts:
    """Rollouts of consecutive chunks of `batch` as one, padded to the longest completion."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.completion_ids.shape[-1] for part in parts)

    def widen(tensor: Tensor, value: int) -> Tensor:
        return nn.functional.pad(tensor, (0, width - tensor.shape[-1]), value=value)

    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return Rollouts(
        prompts=batch,
        completion_ids=torch.cat([widen(part.completion_ids, pad) for part in parts]),
        completion_mask=torch.cat([widen(part.completion_mask, False) for part in parts]),
        texts=[texts for part in parts for texts in part.texts],
        truncated=torch.cat([part.truncated for part in parts]),
        logprobs=torch.cat([widen(logp, 0) for logp in logprobs]) if len(logprobs) == len(parts) else None,
    )
