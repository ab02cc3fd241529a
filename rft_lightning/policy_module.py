"""PolicyModule: what reinforcement and supervised fine-tuning share: the policy, evaluation and the optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rft_lightning.checkpointing import RECORD, policy_record
from rft_lightning.errors import CheckpointError, ConfigConflictError, NonFiniteError
from rft_lightning.policy.loading import load_policy, load_processor
from rft_lightning.policy.rollout import ENGINES, sample_groups
from rft_lightning.policy.sampling import Sampling
from rft_lightning.policy.shared_prefix import FORWARDS
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import Prediction, PromptBatch, Rollouts
from rft_lightning.seeding import derived_seed, run_seed
from rft_lightning.self_check import settle_layout
from rft_lightning.sharding import full_state, local, set_gradient_sync, shard, unsharded
from rft_lightning.trainer import check_trainer

T = TypeVar("T")


class PolicyModule(LightningModule):
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
        gradient_checkpointing: bool = False,
        forward: str = "auto",
        rollout_engine: str = "native",
        cuda_graphs: bool = True,
        mini_batch_prompts: int | None = None,
        micro_batch_prompts: int | None = None,
        sync_gradients: str = "micro_batch",
        max_grad_norm: float | None = 1.0,
        max_completion_length: int = 256,
        eval_temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if schedule not in ("linear", "cosine", "constant"):
            raise ConfigConflictError(f"Expected schedule linear, cosine or constant, found {schedule!r}.")
        for name, value, known in (("forward", forward, FORWARDS), ("rollout_engine", rollout_engine, ENGINES)):
            if value not in known:
                raise ConfigConflictError(f"Expected {name} to be one of {', '.join(known)}, found {value!r}.")
        if max_completion_length < 1:
            raise ConfigConflictError(f"Expected max_completion_length >= 1, found {max_completion_length}.")
        Sampling(eval_temperature)  # refuses what is out of range
        if sync_gradients not in ("micro_batch", "step"):
            raise ConfigConflictError(f"Expected sync_gradients micro_batch or step, found {sync_gradients!r}.")
        for name, size in (("mini_batch_prompts", mini_batch_prompts), ("micro_batch_prompts", micro_batch_prompts)):
            if size is not None and size < 1:
                raise ConfigConflictError(f"Expected {name} >= 1 or null, found {size}.")
        self.automatic_optimization = False
        self.checkpoint = policy
        self.optimizer_callable, self.lr_scheduler_callable = optimizer, lr_scheduler
        self.schedule, self.warmup_steps = schedule, warmup_steps
        self.dtype_name, self.attn_implementation = dtype, attn_implementation
        self.lora, self.freeze_parts = lora, list(freeze)
        self.gradient_checkpointing = gradient_checkpointing
        self.mini_batch_prompts, self.micro_batch_prompts = mini_batch_prompts, micro_batch_prompts
        # `layout` is what `forward` means for the policy, once the start of fit has chosen and checked it.
        self.forward_option, self.layout = forward, forward
        self.rollout_engine, self.cuda_graphs = rollout_engine, cuda_graphs
        self.sync_gradients, self.max_grad_norm = sync_gradients, max_grad_norm
        self.max_completion_length, self.eval_temperature = max_completion_length, eval_temperature
        self.seed = run_seed(seed)
        self.policy: nn.Module | None = None
        self.processor: Any = None
        self._gathered = ExitStack()

    # Set-up

    def steps_per_batch(self, batch_size: int) -> int:
        """Optimiser steps that a training batch of `batch_size` prompts makes."""
        return -(-batch_size // (self.mini_batch_prompts or batch_size))

    def on_fit_start(self) -> None:
        """Settle the layout of the forward, and refuse a `max_steps` at which the run could not be resumed."""
        self._settle_layout()
        self._check_max_steps()

    def _settle_layout(self) -> None:
        """Before any log-prob is used: see :func:`settle_layout`."""
        data = getattr(self.trainer, "datamodule", None)
        encoder = PromptEncoder(self.checkpoint, max_prompt_length=None) if data is None else data.encoder
        assert self.policy is not None
        # A sharded policy computes in the Trainer's precision; any other is compared in that of its weights, where the
        # difference of an exact layout is smallest.
        mixed = self.device_mesh is not None and self.trainer.precision != "32-true"
        context = self.trainer.precision_plugin.forward_context() if mixed else nullcontext()
        with unsharded(self.policy), context:
            self.layout = settle_layout(self.policy, self.forward_option, encoder, device=self.device, mixed=mixed)

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
        check_trainer(self.trainer)
        return []

    def configure_model(self) -> None:
        """Load the policy, and shard it under `fsdp2`; Lightning may call this more than once."""
        if self.policy is None:
            self.policy = self._load()
            self.processor = load_processor(self.checkpoint)
        self._shard(self.policy)

    def _load(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # new adapters start alike on every process and in every run of a seed
            return load_policy(
                self.checkpoint,
                dtype=self.dtype_name,
                attn_implementation=self.attn_implementation,
                lora=self.lora,
                freeze=self.freeze_parts,
                gradient_checkpointing=self.gradient_checkpointing,
            )

    def _shard(self, model: nn.Module) -> None:
        """Under `fsdp2`, shard a model that was just loaded."""
        if self.device_mesh is None:
            return
        # Autocast alone would keep a bfloat16 copy of every gathered weight until backward, as large as the model, and
        # gather twice the bytes.
        mixed = self.trainer.precision == "bf16-mixed"
        shard(model, self.device_mesh["data_parallel"], param_dtype=torch.bfloat16 if mixed else None)

    def configure_optimizers(self) -> Any:
        """AdamW and a linear decay to 0 over `trainer.max_steps` unless told otherwise (the paper's)."""
        assert self.policy is not None
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        if self.optimizer_callable is not None:
            optimizer = self.optimizer_callable(parameters)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)
        scheduler = self._build_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _build_scheduler(self, optimizer: Optimizer) -> Any:
        if self.lr_scheduler_callable is not None:
            return self.lr_scheduler_callable(optimizer)
        from transformers import get_scheduler

        steps = self.trainer.max_steps
        if self.schedule != "constant" and steps < 1:
            raise ConfigConflictError(
                f"The {self.schedule} schedule needs the number of optimiser steps: set trainer.max_steps, "
                "or model.schedule to constant."
            )
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        return get_scheduler(name, optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=max(steps, 1))

    def load_for_sampling(self, ckpt_path: str | None = None) -> None:
        """Load the policy without a Trainer, from its start or from a checkpoint of `fit`.

        Raises:
            CheckpointError: there is no such checkpoint, or it holds another model.
        """
        PolicyModule.configure_model(self)  # a reference model would be of no use
        if ckpt_path is None:
            return
        try:
            state = torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"]
            self.load_state_dict(state)
        except (OSError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{ckpt_path} does not hold this policy: {str(error).splitlines()[0]} Expected a .ckpt file that `fit` "
                "wrote with the same model.policy and model.lora."
            ) from error

    # The checkpoint

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
        state = full_state(self.policy)
        if state is None:
            return self.policy
        if not state:
            return None
        whole = self._load()
        whole.load_state_dict(state)
        return whole

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the weights belong to, so that `rft export` needs nothing else."""
        settings = {"dtype": self.dtype_name, "lora": self.lora, "freeze": self.freeze_parts}
        checkpoint[RECORD] = policy_record(self.checkpoint, settings, self.prompt_processor)

    # The optimiser step

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """What a step draws from torch's global state (dropout) follows from seed, step and process alone."""
        torch.manual_seed(derived_seed(self.seed, self.global_step, self.global_rank))

    def _optimizer(self) -> Optimizer:
        """The one optimiser; Lightning's wrapper is a subclass of it at run time."""
        return cast(Optimizer, self.optimizers())

    def _scheduler(self) -> LRScheduler:
        """The one learning-rate scheduler."""
        return cast(LRScheduler, self.lr_schedulers())

    def optimiser_step(self, pieces: Sequence[T], loss_of: Callable[[T], Tensor], names: Sequence[str]) -> Tensor:
        """One optimiser step over micro-batches whose losses add up to the loss of the step.

        Gradients are averaged over processes, once, with the last micro-batch.

        Args:
            pieces: the micro-batches.
            loss_of: scalar loss of a micro-batch, already divided by the step's normaliser.
            names: ids of the samples of this step, for errors.

        Returns:
            the detached loss of the step on this process.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; the weights are untouched.
        """
        optimizer, scheduler = self._optimizer(), self._scheduler()
        losses = []
        for number, piece in enumerate(pieces):
            with self._gradient_sync(number == len(pieces) - 1):
                loss = loss_of(piece)
                self.manual_backward(loss)
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        self._check_finite(total, names)  # before clipping, which would spread one NaN over every gradient
        if self.max_grad_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.max_grad_norm, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return total

    def _gradient_sync(self, last: bool) -> Any:
        """DDP reduces gradients once per optimiser step: micro-batches before the last one keep theirs."""
        assert self.policy is not None
        set_gradient_sync(self.policy, sync=last or self.sync_gradients == "micro_batch", last=last)
        strategy = self.trainer.strategy
        return nullcontext() if last or not hasattr(strategy, "block_backward_sync") else strategy.block_backward_sync()

    def _check_finite(self, loss: Tensor, names: Sequence[str]) -> None:
        """Every process stops together, else the others would wait for its gradients."""
        finite = loss.isfinite().all()
        assert self.policy is not None
        gradients = {n: local(p.grad) for n, p in self.policy.named_parameters() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))).isfinite() if gradients else None
        ok = finite if norms is None else finite & norms.all()
        everywhere = self.trainer.strategy.reduce(ok.float(), reduce_op="mean")
        if float(everywhere) == 1.0:
            return
        self._optimizer().zero_grad()
        # A reduced gradient is not finite everywhere; the samples to look at are those of a process with a bad loss.
        bad = [] if norms is None else [n for n, fine in zip(gradients, norms.tolist(), strict=True) if not fine]
        found: list[tuple[list[str], list[str]]] = [([] if bool(finite) else list(names), bad)]
        if self.trainer.world_size > 1:
            here, found = found[0], [([], [])] * self.trainer.world_size
            torch.distributed.all_gather_object(found, here)
        named = [name for culprits, _ in found for name in culprits] or list(names)
        bad = list(dict.fromkeys(name for _, gradients_there in found for name in gradients_there))
        raise NonFiniteError(
            f"Step {self.global_step}: the loss is {float(loss)} and {len(bad)} gradients are not finite "
            f"({', '.join(bad[:5]) or 'none'}). Samples of the step: {', '.join(named[:16])}. The weights are those of "
            "the last step, and the last checkpoint is unharmed. Lower the learning rate or look at these samples."
        )

    def reached_max_steps(self) -> bool:
        """Whether trainer.max_steps optimiser steps are done; Lightning itself looks only between batches."""
        return 0 <= self.trainer.max_steps <= self.global_step

    # Evaluation

    def generate(self, batch: PromptBatch, group_size: int = 1, **settings: Any) -> Rollouts:
        """Completions by the policy as it is; see :func:`sample_groups` for the settings."""
        assert self.policy is not None
        settings = {
            "max_completion_length": self.max_completion_length,
            "engine": self.rollout_engine,
            "cuda_graphs": self.cuda_graphs,
            "seed": self.seed,
            **settings,
        }
        with unsharded(self.policy):
            return sample_groups(self.policy, batch, group_size, tokenizer=self.processor.tokenizer, **settings)

    def on_validation_epoch_start(self) -> None:
        """Gather a sharded policy for the whole epoch: processes may have different numbers of batches."""
        assert self.policy is not None
        self._gathered.enter_context(unsharded(self.policy))

    def on_validation_epoch_end(self) -> None:
        """Shard it again."""
        self._gathered.close()

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
        rollouts = self.generate(batch, temperature=self.eval_temperature)
        return [
            Prediction(sample, texts[0], sample.task.read(texts[0], batch.frame, sample.image_size))
            for sample, texts in zip(rollouts.prompts.samples, rollouts.texts, strict=True)
        ]
