"""What a run needs on each device, in bytes, worked out from the sizes of the policy alone.

The policy is built without weights, so that parameters are counted, not estimated, and the states that follow from them
(weights, gradients, optimiser, reference model, keys and values) are exact. What one micro-batch keeps for backward is
read off a forward that computes shapes only (policy/shape_pass.py). Temporary memory within an operation, the
allocator's fragments and the CUDA context are no part of it: leave room for them.

Everything is counted for the process that has most, rank 0 of a group that shares a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from rft_lightning.errors import ConfigConflictError
from rft_lightning.flops import PolicyCosts, policy_costs
from rft_lightning.memory_setup import DDP, FSDP2, Memory, Setup
from rft_lightning.policy.decoding import FIRST_ROOM
from rft_lightning.policy.families import FAMILIES, PARTS, base_model, family_of, part_parameters
from rft_lightning.policy.loading import DTYPES, add_adapters, check_freeze, freeze_parts, lora_config
from rft_lightning.policy.logprobs import CHUNK_LOGITS
from rft_lightning.policy.quantization import BLOCK, check_optimizer, kept_layers
from rft_lightning.policy.shape_pass import Groups, Saved, saved_for_backward, without_memory
from rft_lightning.policy.shared_prefix import shares_keys
from rft_lightning.sharding import blocks

FLOAT = torch.float32.itemsize
OTHER_OPTIMIZER = "Estimate with another optimiser: --model.optimizer AdamW keeps two numbers per weight."
# Double quantisation of NF4, as bitsandbytes stores it: a byte per block of weights, one float for 256 of those, and
# two tables and an offset per layer.
SCALES_PER_FLOAT, TABLES = 256, (16 + 256 + 1) * FLOAT


@dataclass(frozen=True)
class Weight:
    """A parameter of the policy.

    Attributes:
        name: in the policy.
        shape: of the whole.
        dtype: of the numbers as they are kept; of 4-bit ones that of the arithmetic.
        trained: whether it has a gradient.
        multiplied: whether it is of a linear layer or convolution, which autocast gives a copy in its own dtype.
        quantized: whether it is kept in 4 bits.
        block: number of the repeated block it belongs to; None outside of them.
        part: vision_tower, projector or language_model.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    multiplied: bool
    quantized: bool
    block: int | None
    part: str

    @property
    def count(self) -> int:
        """How many numbers."""
        return torch.Size(self.shape).numel()

    def local(self, shards: int) -> tuple[int, ...]:
        """The shape of what rank 0 of `shards` processes holds: FSDP2 cuts the first dimension into equal chunks."""
        return (-(-self.shape[0] // shards), *self.shape[1:]) if shards > 1 else self.shape

    def bytes(self, shards: int = 1) -> int:
        """Of what rank 0 holds."""
        if not self.quantized:
            return torch.Size(self.local(shards)).numel() * self.dtype.itemsize
        scales = -(-self.count // BLOCK)
        return -(-self.count // 2) + scales + -(-scales // SCALES_PER_FLOAT) * FLOAT + TABLES


class PolicySizes:
    """A policy without weights, and what can be counted on it.

    Args:
        config: the model's configuration, as transformers reads it.
        setup: of the run; what concerns processes may be replaced later (:meth:`memory`).
    """

    def __init__(self, config: Any, setup: Setup) -> None:
        setup.check()
        self.config, self.setup = config, setup
        self.model: Any = self._build()
        self._optimizers: dict[int, Any] = {}

    def _build(self) -> nn.Module:
        from transformers import AutoModelForImageTextToText

        setup = self.setup
        if family_of(self.config) is None:
            raise ConfigConflictError(
                f"The memory of {self.config.model_type!r} models cannot be estimated: it is not known where they have "
                f"their parts (known: {', '.join(FAMILIES)}). docs/adding-a-model.md tells how a family is added."
            )
        check_freeze(setup.freeze, self.config)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                self.config, dtype=DTYPES[setup.dtype], attn_implementation=setup.attn_implementation
            ).requires_grad_(True)
            freeze_parts(model, setup.freeze)
            self._quantized = self._mark_quantized(model)
            return (model if setup.lora is None else add_adapters(model, setup.lora, setup.freeze)).train()

    def _mark_quantized(self, model: nn.Module) -> set[int]:
        """The ids of the weights that are kept in 4 bits."""
        if self.setup.quantize is None or self.setup.lora is None:
            return set()
        kept = kept_layers(self.config, lora_config(self.setup.lora).modules_to_save or ())
        inside = tuple(f"{name}." for name in kept)
        linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        return {id(m.weight) for name, m in linear.items() if not f"{name}.".startswith(inside)}

    @cached_property
    def weights(self) -> list[Weight]:
        """The parameters, tied ones once."""
        base = base_model(self.model)
        parts = {id(p): part for part in PARTS for p in part_parameters(self.model, part).values()}
        block = {id(p): n for n, unit in enumerate(blocks(base)) for p in unit.parameters()}
        kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
        multiplied = {id(p) for m in self.model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
        return [
            Weight(
                name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad, id(parameter) in multiplied,
                id(parameter) in self._quantized, block.get(id(parameter)), parts.get(id(parameter), "language_model"),
            )
            for name, parameter in self.model.named_parameters()
        ]  # fmt: skip

    # What follows from the weights

    def optimizer_bytes(self, shards: int = 1) -> int:
        """The state that the optimiser keeps for what rank 0 trains.

        Raises:
            ConfigConflictError: the optimiser cannot make a step.
        """
        states = self._stepped(shards).state.values()
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def stepping_bytes(self, shards: int = 1) -> int:
        """Temporaries: torch's step over all parameters at once (its way on GPUs) holds one state more."""
        ours = type(self._stepped(shards)).__module__.startswith("torch.")
        stateful = self.optimizer_bytes(shards) > FLOAT * len(self.weights)
        return sum(w.bytes(shards) for w in self.weights if w.trained) if ours and stateful else 0

    def _stepped(self, shards: int) -> Any:
        """The optimiser of what rank 0 trains after a step, which was made on tensors without memory."""
        if shards in self._optimizers:
            return self._optimizers[shards]
        with FakeTensorMode(allow_non_fake_inputs=True):
            parameters = [nn.Parameter(torch.empty(w.local(shards), dtype=w.dtype)) for w in self.weights if w.trained]
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        try:
            optimizer = self.setup.optimizer(parameters)
            optimizer.step()
        except DataDependentOutputException as error:
            raise ConfigConflictError(
                f"{type(optimizer).__name__} looks at the numbers it updates, so what it keeps cannot be known without "
                f"them. {OTHER_OPTIMIZER}"
            ) from error
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigConflictError(
                f"The optimiser cannot make a step on what is trained, here or in a run: {error} {OTHER_OPTIMIZER}"
            ) from error
        self._optimizers[shards] = optimizer
        return optimizer

    def reference_bytes(self, shards: int = 1) -> int:
        """A second copy of the weights, where they are all trained; with adapters the policy without them serves."""
        needed = self.setup.reference and self.setup.lora is None
        return sum(weight.bytes(shards) for weight in self.weights) if needed else 0

    def cast_bytes(self, *, trained_only: bool) -> int:
        """Autocast's bfloat16 copies of float32 weights. Under fsdp2 weights are gathered in bfloat16 instead."""
        if not self.setup.mixed or self.setup.strategy == FSDP2:
            return 0
        chosen = [w for w in self.weights if w.multiplied and not w.quantized and (w.trained or not trained_only)]
        return sum(w.count * torch.bfloat16.itemsize for w in chosen if w.dtype == torch.float32)

    def gathered_bytes(self, *, whole: bool) -> int:
        """The whole policy as fsdp2 gathers it; or what lies outside the blocks and two of them, the next one too."""
        outside = [self._gathered(w) for w in self.weights if w.block is None]
        return sum(outside) + (sum(self._of_blocks()) if whole else sum(sorted(self._of_blocks())[-2:]))

    def gathered_gradient_bytes(self) -> int:
        """Gradients of what is gathered at once, and the float32 in which they are summed; or whole ones."""
        trained = [w for w in self.weights if w.trained]
        if self.setup.sync_gradients == "step":
            return sum(w.count * FLOAT for w in trained)
        of_blocks: dict[int | None, int] = {}
        for w in trained:
            of_blocks[w.block] = of_blocks.get(w.block, 0) + self._gathered(w) + w.count * FLOAT
        return of_blocks.pop(None, 0) + max(of_blocks.values(), default=0)

    def _of_blocks(self) -> list[int]:
        sums: dict[int, int] = {}
        for weight in self.weights:
            if weight.block is not None:
                sums[weight.block] = sums.get(weight.block, 0) + self._gathered(weight)
        return list(sums.values())

    def _gathered(self, weight: Weight) -> int:
        return weight.count * (torch.bfloat16.itemsize if self.setup.mixed else weight.dtype.itemsize)

    # What follows from prompts and completions

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return torch.bfloat16 if self.setup.mixed else DTYPES[self.setup.dtype]

    @cached_property
    def _costs(self) -> PolicyCosts:
        costs = policy_costs(self.model, dtype=self.compute_dtype)
        assert costs is not None
        return costs

    @cached_property
    def _shares_keys(self) -> bool:
        with without_memory(self.model):
            return shares_keys(self.model)

    def _token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self._costs.key_value_bytes * len(self._costs.windows)

    def cache_bytes(self, prompts: int, group_size: int) -> int:
        """Keys and values of answers: each prompt's once, each completion's in room that doubles.

        Where prompts cannot be shared, each completion has its prompt's too.
        """
        setup, room = self.setup, FIRST_ROOM
        while room < setup.completion_tokens - 1:
            room *= 2
        shared = setup.prompt_tokens + group_size * room
        apart = group_size * (setup.prompt_tokens + setup.completion_tokens)
        return prompts * (shared if self._shares_keys else apart) * self._token_bytes()

    def prefill_bytes(self, prompts: int) -> int:
        """The prompts' keys and values as the model returns them, before they are stored, and a block's work."""
        tokens = prompts * self.setup.prompt_tokens
        work = max(self._saved.per_image * prompts, self._saved.per_token * tokens)
        return tokens * self._token_bytes() + int(work)

    def sampling_bytes(self, rows: int) -> int:
        """The logits of a decode step of so many answers; scaled and masked copies of them in float32."""
        head = base_model(self.model).get_output_embeddings()
        return rows * head.out_features * (self.compute_dtype.itemsize + 3 * FLOAT)

    def validation_bytes(self) -> int:
        """One answer to each prompt of a validation batch, all at the same time."""
        prompts = self.setup.eval_prompts
        return self.cache_bytes(prompts, 1) + max(self.prefill_bytes(prompts), self.sampling_bytes(prompts))

    @cached_property
    def _saved(self) -> Saved:
        setup = self.setup
        groups = Groups(
            setup.micro_batch_prompts,
            setup.group_size,
            setup.prompt_tokens,
            setup.image_tokens,
            setup.completion_tokens,
        )
        return saved_for_backward(
            self.model,
            groups,
            forward=setup.forward,
            mixed=setup.mixed,
            gradient_checkpointing=setup.gradient_checkpointing,
        )

    def head_bytes(self) -> int:
        """Log-probs, chunk by chunk: what backward needs at once, a chunk's logits and the gradient of the head."""
        setup, head = self.setup, base_model(self.model).get_output_embeddings()
        weight = head.weight.numel()
        positions = setup.micro_batch_prompts * setup.group_size * setup.completion_tokens
        logits = min(positions * head.out_features, CHUNK_LOGITS)
        cast = weight * self.compute_dtype.itemsize if self.compute_dtype != head.weight.dtype else 0
        gradient = weight * head.weight.dtype.itemsize + cast if head.weight.requires_grad else 0
        return logits * (2 * FLOAT + 2 * self.compute_dtype.itemsize) + cast + gradient

    # All together

    def memory(self, **processes: Any) -> Memory:
        """What one device needs; `processes` are attributes of Setup about processes and sharding, in place of its own.

        Raises:
            ConfigConflictError: see :meth:`Setup.check`.
        """
        saved = self._saved
        if processes:
            other = replace(self.setup, **processes)
            other.check()
            return self._with(other).memory()
        setup, shards = self.setup, self.setup.shards
        check_optimizer(self._stepped(shards), sharded=setup.strategy == FSDP2)
        trained = sum(w.bytes(shards) for w in self.weights if w.trained)
        here = 0 if setup.offload_policy else 1
        sharded, answers = setup.strategy == FSDP2, setup.rollout_prompts + setup.eval_prompts > 0
        return Memory(
            weights=here * sum(w.bytes(shards) for w in self.weights),
            reference=0 if setup.offload_reference else self.reference_bytes(shards),
            optimizer=here * self.optimizer_bytes(shards),
            buckets=trained if setup.strategy == DDP and not setup.bucket_view else 0,
            gradients=here * trained,
            cast=self.cast_bytes(trained_only=False),
            cast_trained=self.cast_bytes(trained_only=True),
            gathered_rollout=self.gathered_bytes(whole=setup.gather_for_rollouts) if sharded and answers else 0,
            gathered_update=self.gathered_bytes(whole=False) + self.gathered_gradient_bytes() if sharded else 0,
            cache=self.cache_bytes(setup.rollout_prompts, setup.group_size),
            prefill=self.prefill_bytes(setup.rollout_prompts),
            sampling=self.sampling_bytes(setup.rollout_prompts * setup.group_size),
            activations=saved.kept,
            working=saved.block,
            head=self.head_bytes(),
            stepping=here * self.stepping_bytes(shards),
            validation=self.validation_bytes(),
        )

    def _with(self, setup: Setup) -> PolicySizes:
        """The same policy for other processes, with what was counted on it."""
        sizes = object.__new__(PolicySizes)
        sizes.__dict__.update(self.__dict__)
        sizes.setup = setup
        return sizes


def estimate(config: Any, setup: Setup) -> Memory:
    """What a run needs on each device.

    Args:
        config: the model's configuration, as transformers reads it from ``config.json``.
        setup: of the run.

    Raises:
        ConfigConflictError: settings that no run could have.
    """
    return PolicySizes(config, setup).memory()
