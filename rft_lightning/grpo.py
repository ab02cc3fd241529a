"""GRPOModule: group rollouts, verifiable rewards, and the GRPO update against a frozen reference.

Shape legend: B prompts, G completions per prompt, N = B*G, C completion tokens, K rewards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.advantages import group_advantages, informative_groups
from rft_lightning.collectives import gather_objects, rank
from rft_lightning.control import AdaptiveEntropy, AdaptiveKL
from rft_lightning.dynamic_sampling import roll_out_waves
from rft_lightning.errors import ConfigConflictError
from rft_lightning.kl import sequence_kl
from rft_lightning.objectives import GRPOObjective, entropy_threshold
from rft_lightning.policy.loading import evaluating, frozen_copy, load_policy
from rft_lightning.policy.prompt_inputs import (
    can_keep_graph,
    has_fixed_features,
    image_features,
)
from rft_lightning.policy.sampling import Sampling
from rft_lightning.policy.shared_prefix import (
    PLAIN,
    group_logprobs_and_entropies,
    never_share_keys,
    shares_keys,
)
from rft_lightning.policy_module import PolicyModule
from rft_lightning.rollout_batches import BatchCounts, MicroBatch, count_tokens, cut
from rft_lightning.run_statistics import Clock, Workload, is_count, length_statistics, rollout_sizes
from rft_lightning.sample import Features, PromptBatch, Rollouts
from rft_lightning.scoring import Scores, join_scores, score_rollouts, statistics

COEFFICIENTS = "coefficients"


class GRPOModule(PolicyModule):
    """Group relative policy optimisation with verifiable rewards (Visual-RFT).

    One training step is one rollout batch: sample G answers to each prompt, score them, then `num_iterations` passes
    over mini-batches, one optimiser step each. Every sum of the loss is divided by a count of the whole rollout batch
    on all processes, so that neither the size of micro-batches nor the number of processes changes a gradient.

    Args:
        policy: see :class:`PolicyModule`.
        group_size: G, answers per prompt; at least 2.
        objective: the loss; GRPOObjective() when None.
        num_iterations: passes over each rollout batch (mu).
        rollout_prompts: prompts whose answers grow at the same time; bounds the memory of the rollout. The next one
            begins when enough answers are finished. The whole batch when None.
        temperature: sampling temperature of the rollouts; log-probs are taken at the same one.
        top_k: sample among the k likeliest tokens; 0 for all.
        top_p: sample among the fewest tokens holding this probability; 1 for all.
        min_p: leave out tokens less likely than this share of the likeliest; 0 for none.
        min_completion_length: no rollout ends before it has so many tokens.
        scale_rewards: divide advantages by the standard deviation of the group or the batch, or not (none).
        baseline: subtract the mean reward of the group, of the others in it (leave_one_out), or of the batch.
        aggregation: sum_then_normalize, or normalize_then_sum (GDPO); see :func:`group_advantages`.
        mask_truncated_completions: learn nothing from completions that the length limit cut off.
        kl_controller: adapts the objective's beta to a target KL; fixed when None.
        entropy_controller: adapts the objective's entropy_coef to a target entropy; fixed when None.
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
        min_completion_length: int = 0,
        scale_rewards: str = "group",
        baseline: str = "group",
        aggregation: str = "sum_then_normalize",
        mask_truncated_completions: bool = False,
        kl_controller: AdaptiveKL | None = None,
        entropy_controller: AdaptiveEntropy | None = None,
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
        if not 0 <= min_completion_length <= self.max_completion_length:
            raise ConfigConflictError(
                f"Expected 0 <= min_completion_length <= max_completion_length ({self.max_completion_length}), found "
                f"{min_completion_length}."
            )
        self.sampling: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        self.sampling["min_completion_length"] = min_completion_length
        self.advantage_settings: dict[str, Any] = {
            "scale": scale_rewards,
            "baseline": baseline,
            "aggregation": aggregation,
        }
        group_advantages(torch.zeros(group_size), group_size, **self.advantage_settings)  # refuses what is unknown
        self.mask_truncated_completions = mask_truncated_completions
        # Copied, since it is told this module's length limit.
        self.objective = GRPOObjective() if objective is None else copy.deepcopy(objective)
        self._set_up_objective(kl_controller, entropy_controller)
        self._logged: set[str] = set()
        # Of the training batch at hand, with their graph, where rollout and update share one pass of the tower. They
        # are those of the policy as it is now, so no batch or rollout carries them out of a step.
        self._live_features: list[Features] | None = None
        # Of the last training batch, for callbacks.
        self.workload: Workload | None = None
        # Outside the module tree: no optimiser, checkpoint or train() reaches the reference model.
        self._reference: tuple[nn.Module, ...] = ()

    def _set_up_objective(self, kl: AdaptiveKL | None, entropy: AdaptiveEntropy | None) -> None:
        baseline, scale = self.advantage_settings["baseline"], self.advantage_settings["scale"]
        if self.objective.max_completion_length is None:
            self.objective.max_completion_length = self.max_completion_length
        if self.objective.kl_placement == "reward" and self.advantage_settings["aggregation"] != "sum_then_normalize":
            raise ConfigConflictError(
                "objective.kl_placement reward subtracts the KL from the sum of the rewards, but aggregation "
                "normalize_then_sum has no such sum. Set kl_placement: loss, or aggregation: sum_then_normalize."
            )
        if self.objective.sampler_correction is not None and self.rollout_engine != "native":
            raise ConfigConflictError(
                f"objective.sampler_correction needs the log-probs that the sampler saw, and rollout_engine "
                f"{self.rollout_engine} reports none. Set rollout_engine: native, or sampler_correction: null."
            )
        if (baseline, scale) == ("batch", "group"):
            raise ConfigConflictError(
                "baseline batch with scale_rewards group divides a reward's distance from the batch by the standard "
                "deviation of its group, which may be 0. Set scale_rewards to batch (REINFORCE++) or none."
            )
        self.controllers: dict[str, AdaptiveKL | AdaptiveEntropy] = {}
        if kl is not None:
            kl.start(self.objective.beta)
            self.controllers["beta"] = kl
        if entropy is not None:
            entropy.start(self.objective.entropy_coef)
            self.controllers["entropy_coef"] = entropy

    def configure_model(self) -> None:
        """Load the policy and, to train all its weights with beta > 0, keep a frozen copy of it as it starts."""
        loaded_before = self.policy is not None  # and perhaps a checkpoint into it
        super().configure_model()
        evaluating = self._trainer is not None and self._trainer.state.fn != "fit"
        if self.objective.beta > 0 and self.lora is None and not self._reference and not evaluating:
            assert self.policy is not None
            as_it_starts = self.device_mesh is None and not loaded_before  # sharded models cannot be copied
            load = self._load_reference
            self._reference = (frozen_copy(self.policy) if as_it_starts else self._sharded(load, of_policy=False),)

    def _load_reference(self, *, skeleton: bool = False) -> nn.Module:
        reference = load_policy(
            self.checkpoint, dtype=self.weight_dtype, attn_implementation=self.attn_implementation, skeleton=skeleton
        )
        return reference.eval().requires_grad_(False)

    def on_fit_start(self) -> None:
        """Move the reference model, which Lightning does not know."""
        super().on_fit_start()
        assert self.policy is not None
        for reference in self._reference:
            reference.to(self.device)
            if self.layout != PLAIN and not shares_keys(self.policy):
                never_share_keys(reference)  # what is wrong for the one is wrong for the other

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside what every policy saves, the coefficients that adapt."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[COEFFICIENTS] = {name: controller.state_dict() for name, controller in self.controllers.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the coefficients as they were; one that did not adapt then starts from the objective's."""
        super().on_load_checkpoint(checkpoint)
        for name, state in checkpoint.get(COEFFICIENTS, {}).items():
            if name in self.controllers:
                self.controllers[name].load_state_dict(state)

    # One rollout batch

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Roll out, score, update."""
        if batch.waves > 1 and self.advantage_settings["baseline"] == "batch":
            raise ConfigConflictError(
                f"data.oversample is {batch.waves}: dynamic sampling leaves out groups whose answers are rewarded "
                "alike, but with baseline batch they teach as well. Set oversample to 1, or another baseline."
            )
        clock = Clock()
        assert self.policy is not None
        self._live_features = None
        if self._keeps_graph(batch):
            with evaluating(self.policy):
                self._live_features = image_features(self.policy, batch)

        def sample(wave: PromptBatch) -> tuple[Rollouts, Scores]:
            rollouts = self.roll_out(wave)
            clock.lap("rollout")
            scores = self.score(rollouts)
            clock.lap("score")
            return rollouts, scores

        pad = self.processor.tokenizer.pad_token_id
        rollouts, scores, chosen, waves = roll_out_waves(batch, sample, self._informative, pad)
        everyone = join_scores(gather_objects(scores.to("cpu")))
        sizes = rollout_sizes(rollouts)
        rolled_out = sizes.cut(len(batch) // batch.waves, self.rollout_prompts)
        values = {**length_statistics(sizes), **statistics(everyone, self.group_size)}
        if batch.waves > 1:
            informative = float(self._informative(everyone).float().mean())
            values |= {"dynamic_sampling/waves": waves, "dynamic_sampling/informative": informative}
            rollouts, scores = rollouts.take(chosen), scores.take(self._rows(chosen))
            sizes = sizes.take(chosen)
        mini_batches = cut(
            rollouts,
            mini_batch_prompts=self.mini_batch_prompts,
            micro_batch_prompts=self.micro_batch_prompts,
            mask_truncated=self.mask_truncated_completions,
        )
        self._add_logprobs(mini_batches)
        advantages_N = self.advantages(scores, self.group_size, self._reward_penalty(mini_batches))
        clock.lap("logprobs")
        start = self.global_step
        values |= self.update(mini_batches, advantages_N)
        clock.lap("update")
        first = mini_batches[0][0]
        self.workload = Workload(
            seconds=clock.seconds,
            rolled_out=rolled_out,
            trained=sizes.cut(self.mini_batch_prompts, self.micro_batch_prompts),
            layout=self.layout,
            scoring_passes=sum(logp is not None for logp in (first.ref_logp, first.old_logp)),
            training_passes=(self.global_step - start) / len(mini_batches),
            one_tower_pass=self._live_features is not None,
        )
        self._live_features = None
        self._log_batch({**values, **clock.statistics()}, len(rollouts))

    def _with_live_features(self, batch: PromptBatch) -> PromptBatch:
        return batch if self._live_features is None else replace(batch, features=self._live_features)

    def _keeps_graph(self, batch: PromptBatch) -> bool:
        """Whether rollout and update share one pass of a trained vision tower, its graph included.

        There must be one backward, right after the rollout, and nobody who would rather save the memory.
        """
        size = len(batch)
        one_backward = self.num_iterations == 1 and batch.waves == 1
        one_backward &= min(self.mini_batch_prompts or size, self.micro_batch_prompts or size) >= size
        settings = one_backward and self.device_mesh is None and not self.gradient_checkpointing
        return settings and can_keep_graph(self.policy) and not has_fixed_features(self.policy)

    def roll_out(
        self, batch: PromptBatch, *, group_size: int | None = None, temperature: float | None = None
    ) -> Rollouts:
        """G sampled answers to each prompt, `rollout_prompts` prompts at a time."""
        rollouts = self.generate(
            self._with_live_features(batch),
            group_size or self.group_size,
            temperature=self.temperature if temperature is None else temperature,
            step=self.global_step,
            rollout_prompts=self.rollout_prompts,
            **self.sampling,
        )
        # As statistics tell it; a device without enough memory has lowered it.
        self.rollout_prompts = self._fitting.get(self.group_size, self.rollout_prompts)
        if self._live_features is not None:
            rollouts.prompts = replace(rollouts.prompts, features=None)
        return rollouts

    def score(self, rollouts: Rollouts) -> Scores:
        """Read and reward every completion."""
        return score_rollouts(rollouts, step=self.global_step, token_limit=self.max_completion_length)

    def _informative(self, scores: Scores) -> Tensor:
        aggregation = self.advantage_settings["aggregation"]
        return informative_groups(scores.rewards, self.group_size, weights=scores.weights, aggregation=aggregation)

    def _rows(self, groups: list[int]) -> Tensor:
        """The completions of some groups."""
        return (torch.tensor(groups)[:, None] * self.group_size + torch.arange(self.group_size)).flatten()

    def advantages(self, scores: Scores, group_size: int, penalty_N: Tensor | None = None) -> Tensor:
        """Advantages [N], relative to the group, or to the batch of all processes where the settings say so.

        Args:
            scores: of N completions.
            group_size: G.
            penalty_N: [N], subtracted from the sum of the rewards.
        """
        own, settings = slice(None), self.advantage_settings
        penalties = [] if penalty_N is None else [penalty_N]
        if "batch" in settings.values() or settings["aggregation"] == "normalize_then_sum":
            everyone = gather_objects((scores.to("cpu"), [penalty.cpu() for penalty in penalties]))
            start = sum(len(part.rewards) for part, _ in everyone[: rank()])
            own = slice(start, start + len(scores.rewards))
            scores = join_scores([part for part, _ in everyone])
            penalties = [penalty for _, parts in everyone for penalty in parts]
        rewards: Tensor = scores.rewards
        weights: Tensor | None = scores.weights
        if penalties:
            rewards, weights = scores.total - torch.cat(penalties).to(rewards), None
        return group_advantages(rewards, group_size, weights=weights, **settings)[own].to(self.device)

    def sample_and_score(
        self, batch: PromptBatch, *, group_size: int | None = None, temperature: float | None = None
    ) -> tuple[Rollouts, Scores, Tensor]:
        """Rollouts, their scores and advantages [N], without training."""
        rollouts = self.roll_out(batch, group_size=group_size, temperature=temperature)
        scores = self.score(rollouts)
        return rollouts, scores, self.advantages(scores, rollouts.completion_ids.shape[1])

    def _add_logprobs(self, mini_batches: list[list[MicroBatch]]) -> None:
        """What the update compares with: log-probs of the reference model, and of the policy before its first step."""
        micro_batches = [micro for mini in mini_batches for micro in mini]
        if self.objective.needs_reference:
            with self.reference_model() as reference:
                for micro in micro_batches:
                    micro.ref_logp = self._logprobs(reference, micro, of_policy=False)[0]
        # With a single step the policy is still the one that sampled, and its ratio is 1 without a second forward.
        steps = self.num_iterations * len(mini_batches)
        entropies = self.objective.top_entropy_quantile < 1
        from_sampler = all(micro.sampler_logp is not None for micro in micro_batches)
        if steps > 1 or entropies or (self.objective.kl_placement == "reward" and not from_sampler):
            assert self.policy is not None
            with evaluating(self.policy), torch.no_grad():  # dropout had no part in the sampling
                for micro in micro_batches:
                    micro.old_logp, micro.old_entropy = self._logprobs(self.policy, micro, with_entropy=entropies)

    def _reward_penalty(self, mini_batches: list[list[MicroBatch]]) -> Tensor | None:
        """[N] beta times the KL of each completion, where that is part of the reward."""
        if self.objective.kl_placement != "reward" or not self.objective.needs_reference:
            return None
        penalties = []
        for micro in (micro for mini in mini_batches for micro in mini):
            logp = micro.old_logp if micro.old_logp is not None else micro.sampler_logp
            assert logp is not None
            assert micro.ref_logp is not None
            penalties.append(sequence_kl(logp, micro.ref_logp, micro.mask, self.objective.kl_estimator))
        beta = self.controllers["beta"].value if "beta" in self.controllers else self.objective.beta
        return beta * torch.cat(penalties)

    def update(self, mini_batches: list[list[MicroBatch]], advantages_N: Tensor) -> dict[str, float]:
        """`num_iterations` passes of optimiser steps; returns statistics averaged over them."""
        counts = self._counts(mini_batches)
        totals: list[dict[str, Tensor]] = []
        skipped = 0
        for _ in range(self.num_iterations):
            for mini in mini_batches:
                if self.reached_max_steps():
                    break
                measured = self._mini_step(mini, advantages_N, counts)
                if measured is None:
                    skipped += 1
                else:
                    totals.append(measured)
        values = {name: float(torch.stack([t[name] for t in totals]).mean()) for name in totals[0]} if totals else {}
        return {**values, "skipped_steps": skipped} if self.on_nonfinite == "skip" else values

    def _counts(self, mini_batches: list[list[MicroBatch]]) -> BatchCounts:
        micro_batches = [micro for mini in mini_batches for micro in mini]
        masks, threshold = [micro.mask for micro in micro_batches], None
        acting = masks
        entropies = [micro.old_entropy for micro in micro_batches if micro.old_entropy is not None]
        if self.objective.top_entropy_quantile < 1:
            own = torch.cat([entropy[mask] for entropy, mask in zip(entropies, masks, strict=True)])
            everyone = torch.cat(gather_objects(own.cpu()))
            share = self.objective.top_entropy_quantile
            threshold = entropy_threshold(everyone, torch.ones_like(everyone), share).to(self.device)
            acting = [mask & (entropy >= threshold) for entropy, mask in zip(entropies, masks, strict=True)]
        local = torch.stack([count_tokens(masks), count_tokens(acting)]).float()
        tokens, acting_tokens = self.trainer.strategy.reduce(local, reduce_op="mean").tolist()
        return BatchCounts(sum(map(len, masks)), tokens, acting_tokens, threshold)

    def _mini_step(self, mini: list[MicroBatch], advantages_N: Tensor, counts: BatchCounts) -> dict[str, Tensor] | None:
        """One optimiser step and its statistics; None where it was skipped."""
        share = sum(len(micro.mask) for micro in mini) / counts.completions
        coefficients = {name: controller.value for name, controller in self.controllers.items()}
        collected: list[tuple[dict[str, Tensor], int, Tensor]] = []

        def loss_of(micro: MicroBatch) -> Tensor:
            logp, entropy = self._logprobs(
                self.policy,
                micro,
                with_entropy=True,
                entropy_gradient=self.objective.entropy_needs_gradient or "entropy_coef" in self.controllers,
            )
            loss, stats = self.objective(
                logp,
                micro.old_logp,
                micro.ref_logp,
                micro.of(advantages_N),
                micro.mask,
                entropy=entropy,
                sampler_logp=micro.sampler_logp,
                normalizer=self.objective.divisor(counts.completions * share, counts.tokens * share),
                token_count=counts.acting_tokens * share,
                entropy_threshold=counts.entropy_threshold,
                **coefficients,
            )
            collected.append((stats, len(micro.mask), count_tokens([micro.mask])))
            return loss

        names = [sample.id for micro in mini for sample in micro.rollouts.prompts.samples]
        loss = self.optimiser_step(mini, loss_of, names)
        if loss is None:
            return None
        everyone = gather_objects(_on_host(loss, collected))
        parts = [part for _, parts in everyone for part in parts]
        measured = self.objective.combine_statistics(parts)
        self._adapt(measured, sum(completions for _, completions, _ in parts), sum(tokens for *_, tokens in parts))
        return {"loss": torch.stack([loss for loss, _ in everyone]).mean(), **measured}

    def _adapt(self, measured: dict[str, Tensor], completions: int, tokens: int) -> None:
        """Tell the controllers what the step measured on all processes; without a token that counts, nothing."""
        if not tokens:
            return
        if "beta" in self.controllers:
            self.controllers["beta"].update(float(measured["kl"]), completions)
        if "entropy_coef" in self.controllers:
            entropy = measured.get("entropy_acting", measured["entropy"])
            self.controllers["entropy_coef"].update(float(entropy), completions)

    def _logprobs(
        self,
        model: nn.Module | None,
        micro: MicroBatch,
        *,
        of_policy: bool = True,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert model is not None
        prompts = self._with_live_features(micro.rollouts.prompts) if of_policy else micro.rollouts.prompts
        logp_BGC, entropy_BGC = group_logprobs_and_entropies(
            model,
            prompts,
            micro.rollouts.completion_ids,
            micro.rollouts.completion_mask,
            temperature=self.temperature,
            forward=self.layout,
            with_entropy=with_entropy,
            entropy_gradient=entropy_gradient,
            row=micro.row,
        )
        return logp_BGC.flatten(0, 1), None if entropy_BGC is None else entropy_BGC.flatten(0, 1)

    def _log_batch(self, values: dict[str, float], size: int) -> None:
        """One value per rollout batch; `values` are those of all processes."""
        shown = {"reward", "kl", "completions/mean_length", "time/rollout", "time/update"}
        # Lightning would repeat the last value of what occurs now and then.
        missing = {name: 0.0 if is_count(name) else math.nan for name in self._logged - values.keys()}
        self._logged |= values.keys()
        for name, value in {**values, **missing}.items():
            self.log(f"train/{name}", value, prog_bar=name in shown, batch_size=size)
        for name, controller in self.controllers.items():
            self.log(f"train/{name}", controller.value)
        self.log("train/learning_rate", self._scheduler().get_last_lr()[0])


def _on_host(
    loss: Tensor, collected: list[tuple[dict[str, Tensor], int, Tensor]]
) -> tuple[Tensor, list[tuple[dict[str, Tensor], int, int]]]:
    """The loss and the (statistics, completions, tokens) of micro-batches, in one transfer from the device."""
    tensors = [loss, *(tensor for stats, _, tokens in collected for tensor in (*stats.values(), tokens))]
    values = iter(torch.stack([tensor.detach().double() for tensor in tensors]).cpu())
    loss = next(values).float()
    return loss, [({name: next(values).float() for name in stats}, n, int(next(values))) for stats, n, _ in collected]
