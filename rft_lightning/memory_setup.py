"""What the memory of a run follows from, beside the sizes of its policy.

Shape legend: G completions per prompt, P prompt tokens, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.loading import DTYPES
from rft_lightning.policy.quantization import check_quantization

SINGLE, DDP, FSDP2 = "single", "ddp", "fsdp2"
STRATEGIES = (SINGLE, DDP, FSDP2)


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Any:
    """What PolicyModule builds when it is told nothing."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


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
        attn_implementation: the attention kernel.
        forward: layout of the log-probs, as ``model.forward``.
        optimizer: builds the optimiser from parameters.
        reference: a reference model scores (a second copy of the weights where all are trained).
        group_size: G.
        prompt_tokens: P, image included.
        image_tokens: tokens of P that are of an image.
        completion_tokens: C.
        rollout_prompts: prompts whose groups grow at the same time, on each process; 0 rolls nothing out.
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
        if self.processes < 1 or self.processes % self.shards:
            raise ConfigConflictError(
                f"shard_size is {self.shards}, which does not divide {self.processes} processes. Expected a divisor."
            )
        if self.quantize is not None and self.strategy == FSDP2:
            raise ConfigConflictError("fsdp2 cannot shard 4-bit weights: use ddp, or model.quantize null.")
        check_quantization(self.quantize, dtype=self.dtype, lora=self.lora)
