"""What the memory of a run follows from, beside the sizes of its policy, and what it comes to.

Shape legend: G completions per prompt, P prompt tokens, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rft_lightning.errors import ConfigConflictError
from rft_lightning.optimiser_steps import default_optimizer
from rft_lightning.policy.loading import DTYPES
from rft_lightning.policy.quantization import check_quantization

SINGLE, DDP, FSDP2 = "single", "ddp", "fsdp2"
STRATEGIES = (SINGLE, DDP, FSDP2)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the memory of a run follows from, beside the policy's own sizes.

    Attributes:
        dtype: of the weights: float32 or bfloat16.
        mixed: forward and backward run under bfloat16 autocast (``trainer.precision: bf16-mixed``).
        lora: fields of ``peft.LoraConfig``; None trains all weights.
        quantize: ``nf4`` or None.
        freeze: parts that are not trained.
        gradient_checkpointing: recompute activations in backward.
        attn_implementation: the attention kernel: sdpa or eager, others cannot run without a device.
        forward: layout of the log-probs, as ``model.forward``.
        optimizer: builds the optimiser from parameters.
        reference: a reference model scores (a second copy of the weights where all are trained).
        group_size: G.
        prompt_tokens: P, image included.
        image_tokens: tokens of P that are of an image.
        completion_tokens: C.
        rollout_prompts: prompts whose groups grow at the same time, on each process; 0 rolls nothing out.
        eval_prompts: prompts of a validation batch, on each process, answered once; 0 validates nothing.
        micro_batch_prompts: prompts of one forward and backward.
        strategy: ``single``, ``ddp`` or ``fsdp2``.
        processes: over all nodes.
        shard_size: processes that share one copy under fsdp2; None for all.
        gather_for_rollouts: fsdp2 holds the whole policy during rollouts.
        offload_policy: fsdp2 keeps what is sharded in host memory.
        offload_reference: the same of the reference model.
        sync_gradients: ``micro_batch`` or ``step``, see PolicyModule.
        bucket_view: DDP's gradients lie in its buckets (``gradient_as_bucket_view``).
    """

    dtype: str = "float32"
    mixed: bool = False
    lora: dict[str, Any] | None = None
    quantize: str | None = None
    freeze: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    forward: str = "auto"
    optimizer: Callable[[Iterable[nn.Parameter]], Any] = default_optimizer
    reference: bool = True
    group_size: int = 8
    prompt_tokens: int = 768
    image_tokens: int = 512
    completion_tokens: int = 256
    rollout_prompts: int = 2
    eval_prompts: int = 16
    micro_batch_prompts: int = 1
    strategy: str = SINGLE
    processes: int = 1
    shard_size: int | None = None
    gather_for_rollouts: bool = True
    offload_policy: bool = False
    offload_reference: bool = False
    sync_gradients: str = "micro_batch"
    bucket_view: bool = False

    @property
    def shards(self) -> int:
        """Processes among which one copy of the model is divided."""
        return (self.shard_size or self.processes) if self.strategy == FSDP2 else 1

    def check(self) -> None:
        """Refuse what no run could have.

        Raises:
            ConfigConflictError: names the setting.
        """
        if self.dtype not in DTYPES:
            raise ConfigConflictError(f"Expected dtype to be one of {', '.join(DTYPES)}, found {self.dtype!r}.")
        if self.strategy not in STRATEGIES:
            raise ConfigConflictError(f"Expected strategy to be one of {', '.join(STRATEGIES)}, found {self.strategy}.")
        for name in ("group_size", "prompt_tokens", "completion_tokens", "micro_batch_prompts", "processes"):
            if (value := getattr(self, name)) < 1:
                raise ConfigConflictError(f"Expected {name} >= 1, found {value}.")
        for name in ("image_tokens", "rollout_prompts", "eval_prompts"):
            if (value := getattr(self, name)) < 0:
                raise ConfigConflictError(f"Expected {name} >= 0, found {value}.")
        if self.image_tokens > self.prompt_tokens:
            raise ConfigConflictError(
                f"image_tokens ({self.image_tokens}) is greater than prompt_tokens ({self.prompt_tokens}), of which "
                "they are a part."
            )
        if self.strategy == SINGLE and self.processes > 1:
            raise ConfigConflictError(
                f"The strategy single is one process on one device, found {self.processes}. Use ddp or fsdp2."
            )
        if self.shards < 1 or self.processes % self.shards:
            raise ConfigConflictError(
                f"shard_size is {self.shards}, which does not divide {self.processes} processes (devices times nodes). "
                "Set it to a divisor, or name the devices that the run is for, where they are not those of this "
                f"machine: --devices {self.shards}."
            )
        if self.quantize is not None and self.strategy == FSDP2:
            raise ConfigConflictError("fsdp2 cannot shard 4-bit weights: use ddp, or model.quantize null.")
        check_quantization(self.quantize, dtype=self.dtype, lora=self.lora)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; what is there all the time, and what each phase of a run needs beside it.

    Attributes:
        weights: of the policy.
        reference: of the reference model.
        optimizer: the optimiser's state.
        buckets: DDP's copy of the gradients.
        gradients: of the trained weights; there from the first backward to the optimiser step.
        cast: autocast's copies of weights, kept to the end of a backward.
        cast_trained: those of trained weights, kept to the end of the step.
        gathered_rollout: what fsdp2 gathers for a rollout, and for a validation.
        gathered_update: what fsdp2 holds gathered at once in forward and backward, with the gradients of that.
        cache: keys and values of a rollout.
        prefill: the prompts' keys and values once more, as the model computes them, and a block's work on them.
        sampling: logits of a decode step, and what drawing from them needs.
        activations: what a micro-batch keeps for backward.
        working: what the block at hand needs beside that: its gradients and, under checkpointing, its activations anew.
        head: log-probs from hidden states, forward and backward.
        stepping: temporaries of the optimiser's step.
        validation: keys and values of a validation batch, with its prefill or its logits.
    """

    weights: int
    reference: int
    optimizer: int
    buckets: int
    gradients: int
    cast: int
    cast_trained: int
    gathered_rollout: int
    gathered_update: int
    cache: int
    prefill: int
    sampling: int
    activations: int
    working: int
    head: int
    stepping: int
    validation: int

    @property
    def always(self) -> int:
        """What is there in every phase."""
        return self.weights + self.reference + self.optimizer + self.buckets

    @property
    def phases(self) -> dict[str, int]:
        """What each phase needs, with what is always there; a run without rollouts or validation lacks those."""
        update = self.gradients + self.cast + self.gathered_update + self.activations + max(self.working, self.head)
        sampling = self.always + self.cast_trained + self.gathered_rollout
        phases = {
            "rollout": sampling + self.cache + max(self.prefill, self.sampling),
            "update": self.always + update,
            "step": self.always + self.gradients + self.cast_trained + self.stepping,
            "validation": sampling + self.validation,
        }
        absent = {"rollout": not self.cache, "validation": not self.validation}
        return {name: value for name, value in phases.items() if not absent.get(name)}

    @property
    def total(self) -> int:
        """What the phase that needs most needs."""
        return max(self.phases.values())
