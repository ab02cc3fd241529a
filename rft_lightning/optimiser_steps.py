"""OptimiserSteps: manual optimisation in micro-batches, gradients over processes, and steps that are not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rft_lightning.device_memory import out_of_memory_as
from rft_lightning.errors import ConfigConflictError, NonFiniteError
from rft_lightning.policy.quantization import check_optimizer
from rft_lightning.sharding import local, set_gradient_sync

T = TypeVar("T")
# So many optimiser steps in a row may be skipped: more are no accident of the data.
MAX_SKIPPED = 10

_log = logging.getLogger(__name__)


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The published runs' AdamW."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


class OptimiserSteps(LightningModule):
    """The optimiser of a policy, its schedule and its steps. See :class:`PolicyModule` for the arguments."""

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable | None,
        schedule: str,
        warmup_steps: int,
        lr_scheduler: LRSchedulerCallable | None,
        mini_batch_prompts: int | None,
        micro_batch_prompts: int | None,
        sync_gradients: str,
        max_grad_norm: float | None,
        on_nonfinite: str,
    ) -> None:
        super().__init__()
        if schedule not in ("linear", "cosine", "constant"):
            raise ConfigConflictError(f"Expected schedule linear, cosine or constant, found {schedule!r}.")
        if sync_gradients not in ("micro_batch", "step"):
            raise ConfigConflictError(f"Expected sync_gradients micro_batch or step, found {sync_gradients!r}.")
        if on_nonfinite not in ("stop", "skip"):
            raise ConfigConflictError(f"Expected on_nonfinite stop or skip, found {on_nonfinite!r}.")
        for name, size in (("mini_batch_prompts", mini_batch_prompts), ("micro_batch_prompts", micro_batch_prompts)):
            if size is not None and size < 1:
                raise ConfigConflictError(f"Expected {name} >= 1 or null, found {size}.")
        self.automatic_optimization = False
        self.optimizer_callable, self.lr_scheduler_callable = optimizer, lr_scheduler
        self.schedule, self.warmup_steps = schedule, warmup_steps
        self.mini_batch_prompts, self.micro_batch_prompts = mini_batch_prompts, micro_batch_prompts
        self.sync_gradients, self.max_grad_norm = sync_gradients, max_grad_norm
        self.on_nonfinite, self._skipped_in_row = on_nonfinite, 0
        self.policy: nn.Module | None = None

    def steps_per_batch(self, batch_size: int) -> int:
        """Optimiser steps that a training batch of `batch_size` prompts makes."""
        return -(-batch_size // (self.mini_batch_prompts or batch_size))

    def configure_optimizers(self) -> Any:
        """AdamW and a linear decay to 0 over `trainer.max_steps` unless told otherwise (the paper's)."""
        assert self.policy is not None
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        if self.optimizer_callable is not None:
            optimizer = self.optimizer_callable(parameters)
            check_optimizer(optimizer, sharded=self.device_mesh is not None)
        else:
            optimizer = default_optimizer(parameters)
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

    def _optimizer(self) -> Optimizer:
        """The one optimiser; Lightning's wrapper is a subclass of it at run time."""
        return cast(Optimizer, self.optimizers())

    def _scheduler(self) -> LRScheduler:
        """The one learning-rate scheduler."""
        return cast(LRScheduler, self.lr_schedulers())

    def optimiser_step(
        self, pieces: Sequence[T], loss_of: Callable[[T], Tensor], names: Sequence[str]
    ) -> Tensor | None:
        """One optimiser step over micro-batches whose losses add up to the loss of the step.

        Gradients are averaged over processes, once, with the last micro-batch.

        Args:
            pieces: the micro-batches.
            loss_of: scalar loss of a micro-batch, already divided by the step's normaliser.
            names: ids of the samples of this step, for errors.

        Returns:
            the detached loss of the step on this process; None where the step was skipped, on all of them.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite, and such steps are not skipped, or too many in a
                row were; the weights are untouched.
            DeviceMemoryError: the device has not enough memory for a micro-batch.
        """
        optimizer, scheduler = self._optimizer(), self._scheduler()
        losses = []
        with out_of_memory_as("the update", self._update_remedies()):
            for number, piece in enumerate(pieces):
                with self._gradient_sync(number == len(pieces) - 1):
                    loss = loss_of(piece)
                    self.manual_backward(loss)
                losses.append(loss.detach())
        total = torch.stack(losses).sum()
        # Before clipping, which would spread one NaN over every gradient.
        problem = self._not_finite(total, names)
        if problem is not None:
            # Without gradients the optimiser leaves weights and state as they are, but the step counts: the schedule
            # goes on, the run ends where it should, and stops at rollout boundaries alone.
            optimizer.zero_grad(set_to_none=True)
            self._skip(problem)
        elif self.max_grad_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.max_grad_norm, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        self._skipped_in_row = 0 if problem is None else self._skipped_in_row + 1
        return total if problem is None else None

    def _update_remedies(self) -> str:
        prompts = self.micro_batch_prompts or self.mini_batch_prompts or "the whole batch"
        lower = f"Set model.micro_batch_prompts ({prompts}) lower" if prompts != 1 else "One prompt is the least"
        return (
            f"{lower}. Then: model.gradient_checkpointing true, model.group_size or model.max_completion_length lower, "
            "data.max_pixels lower, model.lora, or more devices with --trainer.strategy fsdp2."
        )

    def _skip(self, problem: str) -> None:
        """Say so and go on, or raise."""
        if self.on_nonfinite == "stop":
            raise NonFiniteError(f"{problem} To leave out such steps instead: model.on_nonfinite skip.")
        if self._skipped_in_row + 1 >= MAX_SKIPPED:
            raise NonFiniteError(f"{problem} It is step {MAX_SKIPPED} in a row that is not finite.")
        if self.global_rank == 0:
            _log.warning("%s The step is skipped (model.on_nonfinite).", problem)

    def _gradient_sync(self, last: bool) -> Any:
        """DDP reduces gradients once per optimiser step: micro-batches before the last one keep theirs."""
        assert self.policy is not None
        set_gradient_sync(self.policy, sync=last or self.sync_gradients == "micro_batch", last=last)
        strategy = self.trainer.strategy
        return nullcontext() if last or not hasattr(strategy, "block_backward_sync") else strategy.block_backward_sync()

    def _not_finite(self, loss: Tensor, names: Sequence[str]) -> str | None:
        """What is not finite, and of which samples; None if all is. All processes agree, on whichever it was."""
        finite = loss.isfinite().all()
        assert self.policy is not None
        gradients = {n: local(p.grad) for n, p in self.policy.named_parameters() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))).isfinite() if gradients else None
        ok = finite if norms is None else finite & norms.all()
        everywhere = self.trainer.strategy.reduce(ok.float(), reduce_op="mean")
        if float(everywhere) == 1.0:
            return None
        # A reduced gradient is not finite everywhere; the samples to look at are those of a process with a bad loss.
        bad = [] if norms is None else [n for n, fine in zip(gradients, norms.tolist(), strict=True) if not fine]
        found: list[tuple[list[str], list[str]]] = [([] if bool(finite) else list(names), bad)]
        if self.trainer.world_size > 1:
            here, found = found[0], [([], [])] * self.trainer.world_size
            torch.distributed.all_gather_object(found, here)
        named = [name for culprits, _ in found for name in culprits] or list(names)
        bad = list(dict.fromkeys(name for _, gradients_there in found for name in gradients_there))
        return (
            f"Step {self.global_step}: the loss is {float(loss)} and {len(bad)} gradients are not finite "
            f"({', '.join(bad[:5]) or 'none'}). Samples of the step: {', '.join(named[:16])}. The weights are those of "
            "the last step, and the last checkpoint is unharmed. Lower the learning rate or look at these samples."
        )

    def reached_max_steps(self) -> bool:
        """Whether trainer.max_steps optimiser steps are done; Lightning itself looks only between batches."""
        return 0 <= self.trainer.max_steps <= self.global_step
