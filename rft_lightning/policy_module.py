"""PolicyModule: what reinforcement and supervised fine-tuning share: the policy, evaluation and the optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from rft_lightning.checkpointing import RECORD, check_names, load_weights, policy_record, saved_names
from rft_lightning.collectives import anywhere
from rft_lightning.device_memory import halving, out_of_memory_as
from rft_lightning.errors import ConfigConflictError
from rft_lightning.evaluation.voting import Voting
from rft_lightning.model_card import configuration, run_facts, runs_of
from rft_lightning.optimiser_steps import OptimiserSteps
from rft_lightning.policy.loading import load_policy, load_processor
from rft_lightning.policy.rollout import ENGINES, sample_groups
from rft_lightning.policy.sampling import Sampling
from rft_lightning.policy.shared_prefix import FORWARDS
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import NOT_COUNTED, Prediction, PromptBatch, Rollouts
from rft_lightning.seeding import derived_seed, run_seed
from rft_lightning.self_check import probe, settle_layout
from rft_lightning.sharding import (
    FSDP2Strategy,
    gather_weights,
    shard,
    share_weights,
    unsharded,
)
from rft_lightning.trainer import check_trainer, equip_trainer


class PolicyModule(OptimiserSteps):
    """A vision-language policy with its optimiser step, validation, test and prediction.

    Optimisation is manual: one training batch may hold several optimiser steps, each in micro-batches.

    Args:
        policy: hub id, folder or ``asset:NAME`` of the checkpoint to start from.
        optimizer: builds the optimiser from the trainable parameters; AdamW(lr=1e-6, weight_decay=0) when None.
        schedule: learning-rate schedule over `trainer.max_steps`: linear (decay to 0), cosine or constant.
        warmup_steps: optimiser steps of linear warm-up before `schedule`.
        lr_scheduler: builds another scheduler, stepped once per optimiser step; replaces `schedule`.
        dtype: dtype of the weights in memory: float32 (with `trainer.precision: bf16-mixed` on GPU) or bfloat16, in
            which an update of 1e-6 to a weight above 3e-4 is rounded away: raise the learning rate.
        attn_implementation: attention kernel, as transformers names it.
        lora: train LoRA adapters instead of the weights: fields of ``peft.LoraConfig``, such as {r: 16, lora_alpha:
            32}; on all linear layers but the output head unless `target_modules` says otherwise.
        freeze: parts that are not trained and get no adapters: vision_tower, projector, language_model.
        quantize: ``nf4`` keeps the frozen weights under LoRA in 4 bits (QLoRA); the output head and embeddings stay in
            `dtype`. The reference model is the quantised one, and an exported policy the trained one, dequantised.
        gradient_checkpointing: recompute activations in backward: less memory, more time.
        forward: how log-probs are computed: ``prefix_cache`` or ``packed`` (the prompt and its image once per group),
            ``plain`` (once per completion), or ``auto``: the fastest that is exact for the family, attention and
            gradient checkpointing at hand, checked against ``plain`` at the start of fit.
        rollout_engine: ``native`` (prompts computed once per group, noise that does not depend on the batch) or ``hf``
            (the model's own ``generate``).
        cuda_graphs: on CUDA, the native engine replays decode steps as graphs instead of launching kernel by kernel.
        mini_batch_prompts: prompts per optimiser step and process; the whole batch when None.
        micro_batch_prompts: prompts per forward and backward pass; bounds the memory. The mini-batch when None.
        sync_gradients: under `fsdp2`, when gradients are summed over the processes: ``micro_batch`` (each process keeps
            its part alone) or ``step`` (once per optimiser step, at the cost of memory for whole gradients).
        max_grad_norm: global norm to which gradients are clipped; None does not clip.
        on_nonfinite: what an optimiser step does whose loss or gradients are NaN or infinite: ``stop`` the run with an
            error that names the samples, or ``skip`` itself on all processes: weights and optimiser state stay as they
            are, the step counts, and ten in a row stop the run.
        max_completion_length: most tokens of a completion, in rollouts and in evaluation.
        eval_temperature: temperature in validation, test and prediction; 0 is greedy.
        seed: seed of the sampling noise; the run's `seed_everything` when None.
    """

    def __init__(
        self,
        policy: str,
        *,
        optimizer: OptimizerCallable | None = None,
        schedule: str = "linear",
        warmup_steps: int = 0,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: str = "float32",
        attn_implementation: str = "sdpa",
        lora: dict[str, Any] | None = None,
        freeze: Sequence[str] = (),
        quantize: str | None = None,
        gradient_checkpointing: bool = False,
        forward: str = "auto",
        rollout_engine: str = "native",
        cuda_graphs: bool = True,
        mini_batch_prompts: int | None = None,
        micro_batch_prompts: int | None = None,
        sync_gradients: str = "micro_batch",
        max_grad_norm: float | None = 1.0,
        on_nonfinite: str = "stop",
        max_completion_length: int = 256,
        eval_temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            optimizer=optimizer,
            schedule=schedule,
            warmup_steps=warmup_steps,
            lr_scheduler=lr_scheduler,
            mini_batch_prompts=mini_batch_prompts,
            micro_batch_prompts=micro_batch_prompts,
            sync_gradients=sync_gradients,
            max_grad_norm=max_grad_norm,
            on_nonfinite=on_nonfinite,
        )
        for name, value, known in (("forward", forward, FORWARDS), ("rollout_engine", rollout_engine, ENGINES)):
            if value not in known:
                raise ConfigConflictError(f"Expected {name} to be one of {', '.join(known)}, found {value!r}.")
        if max_completion_length < 1:
            raise ConfigConflictError(f"Expected max_completion_length >= 1, found {max_completion_length}.")
        Sampling(eval_temperature)  # refuses what is out of range
        self.strict_loading = lora is None  # checkpoints of adapted policies lack what is not trained
        self.checkpoint = policy
        self.dtype_name, self.attn_implementation = dtype, attn_implementation
        self.lora, self.freeze_parts, self.quantize = lora, list(freeze), quantize
        self.gradient_checkpointing = gradient_checkpointing
        # `layout` is what `forward` means for the policy, once the start of fit has chosen and checked it.
        self.forward_option, self.layout = forward, forward
        self.rollout_engine, self.cuda_graphs = rollout_engine, cuda_graphs
        self.max_completion_length, self.eval_temperature = max_completion_length, eval_temperature
        # How questions are answered in evaluation; `rft evaluate` sets it.
        self.voting = Voting()
        # Whether the weights may be others than those of `checkpoint`, or of the last one that was loaded.
        self.trained_here = False
        # What made the policy that training started from.
        self.runs_before: list[dict[str, Any]] = []
        # Completions per prompt -> prompts at a time for which the device's memory was enough, once it was not.
        self._fitting: dict[int, int] = {}
        self.seed = run_seed(seed)
        self.processor: Any = None
        self._evaluation = ExitStack()

    # Set-up

    def on_fit_start(self) -> None:
        """Settle the layout of the forward, and refuse a `max_steps` at which the run could not be resumed."""
        self._settle_layout()
        self._check_max_steps()
        self.trained_here = True
        # Once, and before anything is trained: the folder may be gone, or another one, when a checkpoint is saved.
        self.runs_before = runs_of(self.checkpoint)

    def _settle_layout(self) -> None:
        """Before any log-prob is used: see :func:`settle_layout`."""
        assert self.policy is not None
        # A sharded policy computes in the Trainer's precision; any other is compared in that of its weights, where the
        # difference of an exact layout is smallest.
        mixed = self.device_mesh is not None and self.trainer.precision == "bf16-mixed"
        context = self.trainer.precision_plugin.forward_context() if mixed else nullcontext()
        with self._gathered(), context:
            self.layout = settle_layout(
                self.policy, self.forward_option, self._encoder, device=self.device, mixed=mixed
            )

    def _check_max_steps(self) -> None:
        """A run stopped inside a training batch could not be resumed exactly, so `max_steps` must not fall there."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None or self.trainer.max_steps < 0:
            return
        steps, wanted = self.steps_per_batch(data.batch_size), self.trainer.max_steps
        if wanted % steps:
            raise ConfigConflictError(
                f"trainer.max_steps is {wanted}, but each training batch makes {steps} optimiser steps (mini-batches "
                "times iterations). A run stopped inside a batch cannot be resumed exactly: use a multiple of "
                f"{steps}, such as {-(-wanted // steps) * steps}."
            )

    def configure_callbacks(self) -> list:
        """Refuse trainer settings that contradict this module.

        The earliest hook that sees the trainer: Lightning's own check of manual optimisation comes right after it, with
        an error that does not name our settings.
        """
        check_trainer(self.trainer, quantize=self.quantize)
        equip_trainer(self.trainer)
        if not self._gathers and self.rollout_engine != "native":
            raise ConfigConflictError(
                f"rollout_engine is {self.rollout_engine}, but with gather_for_rollouts false all processes must "
                "decode in step, which the model's own generate does not. Set model.rollout_engine to native."
            )
        return []

    def configure_model(self) -> None:
        """Load the policy, and shard it under `fsdp2`; Lightning may call this more than once."""
        if self.policy is None:
            self.policy = self._sharded(self._load)
            self.processor = load_processor(self.checkpoint)

    def _load(self, *, skeleton: bool = False) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # new adapters start alike on every process and in every run of a seed
            return load_policy(
                self.checkpoint,
                dtype=self.weight_dtype,
                attn_implementation=self.attn_implementation,
                lora=self.lora,
                freeze=self.freeze_parts,
                quantize=self.quantize,
                gradient_checkpointing=self.gradient_checkpointing,
                skeleton=skeleton,
            )

    @property
    def weight_dtype(self) -> str:
        """Dtype of the weights in memory: `dtype`, or bfloat16 where the Trainer's precision is bf16-true."""
        true_bfloat16 = self._trainer is not None and self._trainer.precision == "bf16-true"
        return "bfloat16" if true_bfloat16 else self.dtype_name

    def _sharded(self, load: Callable[..., nn.Module], *, of_policy: bool = True) -> nn.Module:
        """A loaded model; under `fsdp2` its parts, after rank 0 alone has read it."""
        if self.device_mesh is None:
            return load()
        strategy = cast(FSDP2Strategy, self.trainer.strategy)
        model = load(skeleton=self.global_rank > 0)
        whole = model.state_dict() if self.global_rank == 0 else {}
        # Autocast alone would keep a bfloat16 copy of every gathered weight until backward, as large as the model, and
        # gather twice the bytes.
        shard(
            model,
            strategy.shard_mesh,
            param_dtype=torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None,
            offload=strategy.offload_policy if of_policy else strategy.offload_reference,
        )
        share_weights(model, whole)
        return model

    def load_for_sampling(self, ckpt_path: str | None = None) -> None:
        """Load the policy without a Trainer, from its start or from a checkpoint of `fit`.

        Raises:
            CheckpointError: there is no such checkpoint, or it holds another model.
        """
        PolicyModule.configure_model(self)  # a reference model would be of no use
        if ckpt_path is not None:
            load_weights(self, ckpt_path, adapters_only=self.lora is not None)

    # The checkpoint

    @property
    def _encoder(self) -> PromptEncoder:
        """The datamodule's, or one for the policy without a datamodule."""
        data = getattr(self.trainer, "datamodule", None)
        return PromptEncoder(self.checkpoint, max_prompt_length=None) if data is None else data.encoder

    @property
    def prompt_processor(self) -> Any:
        """The processor of the prompts: the datamodule's, with its image size, or the policy's own without one."""
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        return self.processor if data is None else data.encoder.processor

    def whole_policy(self) -> nn.Module | None:
        """The policy on one process: itself, or of a sharded one a copy on the CPU of rank 0, None elsewhere.

        All processes must call it.
        """
        assert self.policy is not None
        if self.device_mesh is None:
            return self.policy
        whole = self._load() if self.global_rank == 0 else None
        gather_weights(self.policy, whole)
        return whole

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep adapters alone of an adapted policy; say what the weights belong to, so that `rft export` can tell."""
        if self.lora is not None:
            names = saved_names(self, adapters_only=True)
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: weight for name, weight in weights.items() if name in names}
        checkpoint[RECORD] = self.record()

    def record(self) -> dict[str, Any]:
        """What the policy is and what there is to say of the run, as plain data."""
        settings = {
            "dtype": self.weight_dtype,
            "lora": self.lora,
            "freeze": self.freeze_parts,
            "quantize": self.quantize,
        }
        return policy_record(self.checkpoint, settings, self.prompt_processor, run_facts(self))

    @cached_property
    def run_configuration(self) -> str | None:
        """The whole configuration of the run as YAML, None where it has none; written out once, not in every save."""
        return configuration(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another policy, by name."""
        check_names(self, checkpoint["state_dict"], adapters_only=self.lora is not None)

    # Training

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """What a step draws from torch's global state (dropout) follows from seed, step and process alone."""
        torch.manual_seed(derived_seed(self.seed, self.global_step, self.global_rank))

    # Evaluation

    def generate(self, batch: PromptBatch, group_size: int = 1, **settings: Any) -> Rollouts:
        """Completions by the policy as it is; see :func:`sample_groups` for the settings.

        Where the device's memory runs out, the same batch is answered anew with half as many prompts at a time, and so
        are those that follow.

        Raises:
            DeviceMemoryError: there is not enough memory for one prompt, or the processes decode together, where none
                can begin anew by itself.
        """
        assert self.policy is not None
        option = "model.rollout_prompts" if "rollout_prompts" in settings else "data.eval_batch_size"
        most = min(settings.pop("rollout_prompts", None) or len(batch), self._fitting.get(group_size, len(batch)))
        remedies = "Set model.max_completion_length or data.max_pixels lower, or shard the policy (docs/scaling.md)."
        if group_size > 1:
            remedies = f"Set model.group_size ({group_size}), {remedies.removeprefix('Set ')}"
        settings = {
            "tokenizer": self.processor.tokenizer,
            "max_completion_length": self.max_completion_length,
            "engine": self.rollout_engine,
            "cuda_graphs": self.cuda_graphs,
            "seed": self.seed,
            "anyone": None if self._gathers else anywhere,
            **settings,
        }

        def sample(at_once: int) -> Rollouts:
            return sample_groups(self.policy, batch, group_size, rollout_prompts=at_once, **settings)

        with self._gathered():
            if not self._gathers:
                with out_of_memory_as("a rollout of processes together", f"Set {option} lower ({most}). {remedies}"):
                    return sample(most)
            rollouts, fitted = halving(sample, most, option=option, remedies=remedies)
        if fitted < most:
            self._fitting[group_size] = fitted
        return rollouts

    @property
    def _gathers(self) -> bool:
        """Whether each process has the whole policy during a rollout; otherwise they decode together."""
        return self._trainer is None or getattr(self._trainer.strategy, "gather_for_rollouts", True)

    def _gathered(self) -> Any:
        assert self.policy is not None
        return unsharded(self.policy) if self._gathers else nullcontext()

    def on_validation_epoch_start(self) -> None:
        """Gather a sharded policy for the whole epoch: processes may have different numbers of batches."""
        self._evaluation.enter_context(self._gathered())

    def on_validation_epoch_end(self) -> None:
        """Shard it again; where it was not gathered, help the processes that have batches left to compute them."""
        if not self._gathers:
            while anywhere(False):
                self.generate(self._blank_prompt(), temperature=self.eval_temperature)
        self._evaluation.close()

    def _blank_prompt(self) -> PromptBatch:
        return probe(self._encoder)[0].to(self.device)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        """Greedy (or sampled) completions as Predictions; callbacks turn them into metrics."""
        return {"predictions": self.predict_step(batch, batch_idx)}

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        """As in validation."""
        return {"predictions": self.predict_step(batch, batch_idx)}

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Prediction]:
        """One Prediction per sample."""
        if not self._gathers:
            anywhere(True)  # see on_validation_epoch_end
        voting = self.voting
        rollouts = self.generate(batch, voting.answers, temperature=voting.heat(self.eval_temperature))
        counted = (i for i, sample in enumerate(rollouts.prompts.samples) if sample.occurrence != NOT_COUNTED)
        return [self._prediction(rollouts, number) for number in counted]

    def _prediction(self, rollouts: Rollouts, number: int) -> Prediction:
        """The answer that counts of those to one prompt."""
        sample, texts = rollouts.prompts.samples[number], rollouts.texts[number]
        answers = [sample.task.read(text, rollouts.prompts.frame, sample.image_size) for text in texts]
        for answer, tokens, cut in zip(
            answers, rollouts.lengths[number], rollouts.truncated[number].tolist(), strict=True
        ):
            answer.num_tokens, answer.token_limit, answer.truncated = tokens, self.max_completion_length, cut
        chosen = self.voting.choice(sample, answers)
        several = tuple(texts) if len(texts) > 1 else ()
        return Prediction(sample, texts[chosen], answers[chosen], texts=several)
