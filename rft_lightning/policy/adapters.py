"""Adapters by peft: putting them around a model, training in float32 what is trained, and writing them alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rft_lightning.errors import ConfigConflictError

if TYPE_CHECKING:
    from peft import LoraConfig

HALVES = (torch.float16, torch.bfloat16)


def with_adapters(model: Any, config: LoraConfig) -> Any:
    """The model with new adapters; its own weights are frozen.

    All that is trained is float32, whatever the model is: peft makes its adapters so, but not the modules that are
    trained whole (`modules_to_save`).

    Raises:
        ValueError: peft finds no module to adapt.
    """
    import peft
    from peft.utils import ModulesToSaveWrapper

    with warnings.catch_warnings():  # peft reads a property that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        adapted = peft.get_peft_model(model, config)
    wrappers = [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    for wrapper in wrappers:
        wrapper.__class__ = type(type(wrapper).__name__, (TrainedWhole, type(wrapper)), {})
        for module in wrapper.modules_to_save.modules():
            _round_in_use(module)
    for wrapper in wrappers:
        for parameter in wrapper.modules_to_save.parameters():
            if parameter.dtype in HALVES:
                parameter.data = parameter.data.float()
    return adapted


class RoundedInUse:
    """A module whose parameters are float32, in which small updates are not lost, and rounded where they are used.

    It computes as the module that it was made of: at first exactly what the reference model does, in the end exactly
    what is exported. Its class has a property in place of each such parameter: under whatever forward, recomputation
    in backward or gathering of shards, the weights are rounded when they are read.

    Attributes:
        dtypes: in which each parameter is used, by name.
    """

    dtypes: dict[str, torch.dtype]


def _round_in_use(module: nn.Module) -> None:
    """Make a module :class:`RoundedInUse` if it has parameters of its own in 16 bits."""
    dtypes = {name: p.dtype for name, p in module.named_parameters(recurse=False) if p.dtype in HALVES}
    if dtypes:
        body: dict[str, Any] = {name: _rounded(name, dtype) for name, dtype in dtypes.items()}
        kind = type(module)
        module.__class__ = type(kind.__name__, (RoundedInUse, kind), body | {"dtypes": dtypes})


def _rounded(name: str, dtype: torch.dtype) -> property:
    def read(module: nn.Module) -> Tensor:
        parameter = cast(Tensor, module._parameters[name])
        # A forward sees gathered weights; who reads the shards is FSDP2, which wants the parameter itself.
        return parameter if isinstance(parameter, DTensor) else parameter.to(dtype)

    return property(read)


class TrainedWhole:
    """What stands in place of a module of `modules_to_save`."""

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The trained module, of the class and in the dtype of the one that it was made of."""
        trained: nn.Module = cast(Any, super()).unload_and_optionally_merge_module(*args, **kwargs)
        for module in trained.modules():
            if isinstance(module, RoundedInUse):
                for name, dtype in module.dtypes.items():
                    parameter = cast(nn.Parameter, module._parameters[name])
                    parameter.data = parameter.data.to(dtype)
                module.__class__ = type(module).__bases__[1]
        return trained


def save_adapters(policy: Any, folder: str | Path, *, base: str | None = None) -> Path:
    """Write the adapters alone, as ``peft.PeftModel.from_pretrained(base_model, folder)`` loads them; safetensors.

    Args:
        policy: a model with adapters.
        folder: where to write.
        base: the model that the adapters belong to, which the files name: hub id, folder or ``asset:NAME``, of which
            they name the folder; where it was loaded from when None.

    Returns:
        the folder.

    Raises:
        ConfigConflictError: the policy has no adapters.
        CheckpointError: there is no such base.
    """
    from rft_lightning.policy.loading import resolve_checkpoint  # which imports this module

    if not hasattr(policy, "peft_config"):
        raise ConfigConflictError("There are no adapters to save: the policy was trained without model.lora.")
    config = policy.peft_config["default"]
    named = config.base_model_name_or_path
    config.base_model_name_or_path = named if base is None else resolve_checkpoint(base)
    try:
        # "auto" would ask the hub whether the vocabulary has grown, which it does not here.
        policy.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = named
    return Path(folder)
