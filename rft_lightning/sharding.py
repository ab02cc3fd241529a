"""Fully sharded training (FSDP2): the `fsdp2` strategy, the plan by which a model is sharded, and gathering it whole.

Each process holds a part of every weight, gradient and optimiser state; a block's weights are gathered when its forward
or backward runs. The forward must enter through the whole model, whose hooks gather what lies outside the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.families import base_model


class FSDP2Strategy(ModelParallelStrategy):
    """Shard over all processes of all nodes; each gets its own batches. ``--trainer.strategy fsdp2``.

    Runs on GPUs (NCCL) and on CPU (gloo). A checkpoint is one file with the full weights and optimiser state, gathered
    by rank 0, so it is written, resumed from, evaluated and exported like one of any other strategy.

    Args:
        process_group_backend: communication library; the one that fits the device when None.
        timeout: how long a process waits for the others before it gives up.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )

    def setup_environment(self) -> None:
        """Set the mesh before Lightning does: its default would give all processes of a node the same batches."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded training over all processes (FSDP2)")


def shard(model: nn.Module, mesh: DeviceMesh, *, param_dtype: torch.dtype | None = None) -> None:
    """Shard a model in place: every decoder block, every vision block, then what is left as one unit.

    A model that is sharded already is left as it is.

    Args:
        model: a Hugging Face vision-language model, or an adapter around one.
        mesh: the processes to shard over, one-dimensional.
        param_dtype: dtype in which weights are gathered and used; None for their own. The parts that each process
            holds, the optimiser and the sum of the gradients keep the dtype of the weights, at least float32.

    Raises:
        ConfigConflictError: the model names no blocks.
    """
    root = base_model(model)
    if isinstance(root, FSDPModule):
        return
    # Inputs are left to autocast, which is on wherever param_dtype is set: rotary angles and masks stay float32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(root):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(root, mesh=mesh, reshard_after_forward=not _trained(root), mp_policy=policy)
    if root is not model:
        # peft calls `forward` of the model inside it, past the hooks that gather its weights.
        model.base_model.forward = root.__call__  # type: ignore[union-attr]


def blocks(model: Any) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face model, vision tower included.

    They are the members of module lists whose class the model names as one that must not be split.

    Raises:
        ConfigConflictError: there are none.
    """
    names = set(model._no_split_modules or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [module for members in lists for module in members if type(module).__name__ in names]
    if not found:
        raise ConfigConflictError(
            f"{type(model).__name__} cannot be sharded: none of its module lists holds a class of its "
            f"_no_split_modules ({', '.join(sorted(names)) or 'empty'}), by which the blocks are known. "
            "Use --trainer.strategy ddp."
        )
    return found


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, the whole model is gathered on each process and forwards communicate nothing; sharded again afterwards.

    Around many forwards that do not train (a rollout) this costs one gather in all, not one per forward, and processes
    may make different numbers of them. All processes must enter. Does nothing for a model that is not sharded, or
    gathered already.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        yield
        return
    with torch.inference_mode(False):  # what is first gathered in an evaluation must serve training too
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not units[0] or not _trained(model), recurse=False)
            unit.reshard()


def _trained(model: nn.Module) -> bool:
    """The root of a trained model stays gathered until its backward, which begins with it; others have none."""
    return any(parameter.requires_grad for parameter in model.parameters())


def set_gradient_sync(model: nn.Module, *, sync: bool, last: bool) -> None:
    """Before a micro-batch of a sharded model: whether its gradients are summed over processes, whether it is the last.

    Does nothing for a model that is not sharded.
    """
    root = base_model(model)
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(sync)
        root.set_is_last_backward(last)


def full_state(model: nn.Module) -> dict[str, Any] | None:
    """The whole weights of a sharded model on the CPU of rank 0, {} elsewhere; None if it is not sharded.

    All processes must call it.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
