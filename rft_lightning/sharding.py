"""Fully sharded training (FSDP2): the `fsdp2` strategy, the plan by which a model is sharded, and gathering it whole.

Each process holds a part of every weight, gradient and optimiser state; a block's weights are gathered when its forward
or backward runs. The forward must enter through the whole model, whose hooks gather what lies outside the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rft_lightning import sharded_files
from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.families import base_model

# Gathered on the CPU of rank 0, nothing elsewhere.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FSDP2Strategy(ModelParallelStrategy):
    """Shard over the processes of all nodes; each gets its own batches. ``--trainer.strategy fsdp2``.

    Runs on GPUs (NCCL) and on CPU (gloo). A checkpoint is a folder into which every process writes its part, or one
    file; of either kind a run may go on, be evaluated and exported under any strategy and number of processes.

    Args:
        shard_size: processes that hold one copy of the model together, such as those of a node (hybrid sharding:
            weights are gathered inside these groups, gradients averaged over them); all processes when None.
        gather_for_rollouts: gather the whole policy for a rollout, so that decoding communicates nothing. Where that
            does not fit a device: false, which gathers block by block in every decode step, and is much slower.
        offload_policy: keep weights, gradients and optimiser state in host memory, where the optimiser step then runs.
        offload_reference: keep the frozen reference model in host memory.
        save_distributed_checkpoint: write folders; one file with everything, gathered by rank 0, when false.
        process_group_backend: communication library; the one that fits the device when None.
        timeout: how long a process waits for the others before it gives up; longer than the slowest rollout.

    Raises:
        ConfigConflictError: (at set-up) `shard_size` does not divide the number of processes.
    """

    def __init__(
        self,
        *,
        shard_size: int | None = None,
        gather_for_rollouts: bool = True,
        offload_policy: bool = False,
        offload_reference: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.shard_size, self.gather_for_rollouts = shard_size, gather_for_rollouts
        self.offload_policy, self.offload_reference = offload_policy, offload_reference
        self._shard_mesh: DeviceMesh | None = None

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The processes that shard a model: [processes], or [copies, processes of a copy]."""
        assert self._shard_mesh is not None
        return self._shard_mesh

    def setup_environment(self) -> None:
        """Set the mesh before Lightning does: its default would give all processes of a node the same batches."""
        world = self.num_nodes * self.num_processes
        size = self.shard_size or world
        if size < 1 or world % size:
            raise ConfigConflictError(
                f"shard_size is {size}, which does not divide the {world} processes into groups of that size. Expected "
                "a divisor of devices times num_nodes, such as the number of devices of a node; null is all."
            )
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        super().setup_environment()
        self._shard_mesh = self.device_mesh["data_parallel"]
        if size < world:
            names = ("replicate", "shard")
            self._shard_mesh = init_device_mesh(self.root_device.type, (world // size, size), mesh_dim_names=names)

    def _get_process_group_backend(self) -> str:
        # Gradients that lie in host memory are clipped there, for which NCCL has no operations.
        offloads = self.offload_policy and self.root_device.type == "cuda"
        return self._process_group_backend or (
            "cpu:gloo,cuda:nccl" if offloads else super()._get_process_group_backend()
        )

    def model_to_device(self) -> None:
        """What is sharded was moved, or left in host memory, as it was sharded."""
        assert self.model is not None
        for child in self.model.children():
            if not any(isinstance(parameter, DTensor) for parameter in child.parameters()):
                child.to(self.root_device)

    # Checkpoints. Lightning's own way with one file counts frozen parameters too, so that optimiser states of other
    # strategies go to the wrong parameters, and cannot load an optimiser without state (SGD); its folders are read
    # with torch's pickles.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The sharded weights; or the whole ones, on rank 0 alone. Of adapted models, what is trained."""
        assert self.model is not None
        if self._save_distributed_checkpoint:
            return self.model.state_dict()
        assert self.lightning_module is not None
        return get_model_state_dict(
            self.model, options=replace(WHOLE, ignore_frozen_params=not self.lightning_module.strict_loading)
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The sharded state, by parameter names; or the whole one on rank 0, as of plain parameters, {} elsewhere."""
        assert self.model is not None
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if self._save_distributed_checkpoint:
            return _renamed(plain.state_dict(), dict(enumerate(self._names(plain))))
        state = plain.state_dict()
        gathered: dict[Any, dict[str, Any]] = {}
        for number, slots in state["state"].items():
            for slot, value in slots.items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                if self.is_global_zero:
                    gathered.setdefault(number, {})[slot] = whole.cpu() if isinstance(whole, Tensor) else whole
        return {**state, "state": gathered} if self.is_global_zero else {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder or a file; all processes must call it."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        weights, states = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states", [])
        parts = [sharded_files.optimizer_tensors(number, state) for number, state in enumerate(states)]
        tensors = {f"{sharded_files.WEIGHTS}{name}": tensor for name, tensor in weights.items()}
        for found, _ in parts:
            tensors |= found
        rest = {**checkpoint, "optimizer_states": [left for _, left in parts]}
        sharded_files.save(self.broadcast(filepath), tensors, rest, writes_rest=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimiser states, of any strategy; return what else there is, and the weights' names."""
        path = self.broadcast(checkpoint_path)
        return self._load_folder(path) if sharded_files.is_folder(path) else self._load_file(path)

    def _load_folder(self, path: str | Path) -> dict[str, Any]:
        assert self.model is not None
        checkpoint = sharded_files.load_rest(path)
        there = set(sharded_files.weight_names(path))
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if name in there}
        sharded_files.load_into(path, {f"{sharded_files.WEIGHTS}{name}": w for name, w in weights.items()})
        states = checkpoint.pop("optimizer_states", [])
        named = dict(self.model.named_parameters())
        for number, (optimizer, rest) in enumerate(zip(self.optimizers, states, strict=False)):
            sharded_files.load_optimizer(path, number, optimizer, named, rest)
        return {**checkpoint, "state_dict": dict.fromkeys(there)}

    def _load_file(self, path: str | Path) -> dict[str, Any]:
        assert self.model is not None
        assert self.lightning_module is not None
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        options = StateDictOptions(full_state_dict=True, strict=self.lightning_module.strict_loading)
        weights = checkpoint.pop("state_dict")
        set_model_state_dict(self.model, weights, options=options)
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            of = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {slot: _part(value, of[number]) for slot, value in slots.items()}
                for number, slots in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})
        return {**checkpoint, "state_dict": dict.fromkeys(weights)}

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The names of an optimiser's parameters, in its order."""
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """The state of an optimiser with other names for its parameters."""
    groups = [{**group, "params": [names[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def _part(value: Any, parameter: Tensor) -> Any:
    """Of a whole value of an optimiser's state, what this process holds of it: as of the parameter it belongs to."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded training over all processes (FSDP2)")


def shard(model: nn.Module, mesh: DeviceMesh, *, param_dtype: torch.dtype | None = None, offload: bool = False) -> None:
    """Shard a model in place: every decoder block, every vision block, then what is left as one unit.

    A model that is sharded already is left as it is. Parameters on the meta device are made just before their unit is
    sharded, uninitialised, so that no more than one unit is ever held whole; :func:`share_weights` fills them.

    Args:
        model: a Hugging Face vision-language model, or an adapter around one.
        mesh: the processes to shard over, one-dimensional; or two-dimensional, [copies, processes of a copy].
        param_dtype: dtype in which weights are gathered and used; None for their own, which the parts that each process
            holds and the optimiser keep. Gradients are summed in float32.
        offload: keep the parts, their gradients and the optimiser's state in host memory.

    Raises:
        ConfigConflictError: the model names no blocks.
    """
    root = base_model(model)
    if isinstance(root, FSDPModule):
        return
    # Inputs are left to autocast, which is on wherever param_dtype is set: rotary angles and masks stay float32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offloading = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for unit in (*blocks(root), root):
        _materialize(unit, mesh.device_type)
        # The root too, though torch would keep it gathered until backward: after a forward without one it would stay
        # so, and peft's switching of adapters would then reach the gathered parameters instead of the trained ones.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy, offload_policy=offloading)
    register_fsdp_forward_method(root, "get_image_features")  # a way into the model beside its forward
    # Else the first unit that runs takes itself for the root: a vision block, where `generate` encodes images first.
    root._get_fsdp_state()._lazy_init()
    if root is not model:
        # peft calls `forward` of the model inside it, past the hooks that gather its weights.
        model.base_model.forward = root.__call__  # type: ignore[union-attr]


def _materialize(unit: nn.Module, device: str) -> None:
    """Give what is on the meta device memory; what is tied stays tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in unit.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                made.setdefault(parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad))
                setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))


def share_weights(model: nn.Module, whole: dict[str, Any]) -> None:
    """Fill the parts of every process from the whole weights of rank 0; all processes must call it.

    Args:
        model: sharded.
        whole: of rank 0, its ``state_dict()`` before it was sharded; of the others, nothing.
    """
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in model.buffers():  # also those that no state dict holds, such as rotary frequencies
        torch.distributed.broadcast(buffer, 0)


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


def gather_weights(model: nn.Module, whole: nn.Module | None) -> None:
    """Copy the trained weights of a sharded model into a whole one, tensor by tensor; all processes must call it.

    Args:
        model: sharded.
        whole: the same model as it was before training, on the CPU of rank 0; None elsewhere.
    """
    targets = {} if whole is None else dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gathered = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if name in targets:
                targets[name].data.copy_(gathered)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
