"""Fully sharded training (FSDP2): the `fsdp2` strategy, the plan by which a model is sharded, and gathering it whole.

Each process holds a part of every weight, gradient and optimiser state; a block's weights are gathered when its forward
or backward runs. The forward must enter through the whole model, whose hooks gather what lies outside the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.families import base_model

# Gathered on the CPU of rank 0, nothing elsewhere.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


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

    # Lightning's own way with one file counts frozen parameters too, so that optimiser states of other strategies go to
    # the wrong parameters, and cannot load an optimiser without state (SGD).

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, as an optimiser of unsharded parameters would save it; {} elsewhere."""
        assert self.model is not None
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = get_optimizer_state_dict(self.model, plain, options=WHOLE)
        names = [name for group in state.get("param_groups", ()) for name in group["params"]]
        return _renamed(state, dict(zip(names, range(len(names)), strict=True))) if state else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimiser states of one file of any strategy; return what else it holds."""
        assert self.model is not None
        assert self.lightning_module is not None
        path = self.broadcast(checkpoint_path)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        options = StateDictOptions(full_state_dict=True, strict=self.lightning_module.strict_loading)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            if not saved["state"]:  # torch cannot distribute nothing
                optimizer.load_state_dict(saved)
                continue
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            ours = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            state = _renamed(saved, dict(zip(numbers, ours, strict=True)))
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return checkpoint


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """The state of an optimiser with other names for its parameters."""
    groups = [{**group, "params": [names[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[name]: value for name, value in state["state"].items()}, "param_groups": groups}


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded training over all processes (FSDP2)")


def shard(model: nn.Module, mesh: DeviceMesh, *, param_dtype: torch.dtype | None = None) -> None:
    """Shard a model in place: every decoder block, every vision block, then what is left as one unit.

    A model that is sharded already is left as it is.

    Args:
        model: a Hugging Face vision-language model, or an adapter around one.
        mesh: the processes to shard over, one-dimensional.
        param_dtype: dtype in which weights are gathered and used; None for their own, which the parts that each process
            holds and the optimiser keep. Gradients are summed in float32.

    Raises:
        ConfigConflictError: the model names no blocks.
    """
    root = base_model(model)
    if isinstance(root, FSDPModule):
        return
    # Inputs are left to autocast, which is on wherever param_dtype is set: rotary angles and masks stay float32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*blocks(root), root):
        # The root too, though torch would keep it gathered until backward: after a forward without one it would stay
        # so, and peft's switching of adapters would then reach the gathered parameters instead of the trained ones.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
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
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


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
    return get_model_state_dict(model, options=WHOLE)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
