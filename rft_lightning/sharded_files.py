"""Checkpoint folders: every process writes the parts of the tensors that it holds, at the same time.

A folder holds ``__R_0.distcp`` with the parts that process R held, ``.metadata`` that says where each part belongs
(both are written by ``torch.distributed.checkpoint``), and ``meta.pt`` with all that is no weight or optimiser tensor.
The parts may be read by any number of processes, each of which reads what it needs of the files.

Names of tensors: ``state_dict.PARAMETER`` and ``optimizer_I.PARAMETER.SLOT``.
"""

from __future__ import annotations

import importlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from rft_lightning.errors import CheckpointError

INDEX, REST = ".metadata", "meta.pt"
WEIGHTS = "state_dict."
# What the index of a folder is made of. A pickle could name anything else and have it called.
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath"},
}


def is_folder(path: str | Path) -> bool:
    """Whether a path is a checkpoint folder, or should be one: a directory."""
    return Path(path).is_dir()


def save(folder: str | Path, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], *, writes_rest: bool) -> None:
    """Write a folder. All processes must call it, with the same names and their own parts.

    Args:
        folder: where to; must not hold a checkpoint.
        tensors: name -> tensor, sharded or the same everywhere.
        rest: plain data and tensors that one process writes for all.
        writes_rest: whether this is that process.

    Raises:
        OSError: a process could not write its part; raised on all of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _alone():
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, overwrite=False))
    except dcp.CheckpointException as error:  # no Exception, and raised on all processes: what went wrong on some
        process, (cause, _) = next(iter(error.failures.items()))
        raise OSError(
            getattr(cause, "errno", None), f"process {process} could not write to {folder}: {cause}"
        ) from error
    if writes_rest:
        torch.save(dict(rest), folder / REST)


def load_rest(folder: str | Path) -> dict[str, Any]:
    """What a folder holds beside weights and optimiser tensors.

    Raises:
        CheckpointError: it is no folder that `fit` wrote, or parts of it are missing.
    """
    file = Path(folder) / REST
    if not file.is_file() or not (Path(folder) / INDEX).is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint folder, or one that was cut short: expected {INDEX}, {REST} and *.distcp files "
            "in it, as `rft fit --trainer.strategy fsdp2` writes them."
        )
    try:
        rest: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read ({str(error).splitlines()[0]}). Copy the folder anew.") from error
    return rest


def sizes(folder: str | Path) -> dict[str, TensorStorageMetadata]:
    """Name -> shape and dtype of the tensors of a folder."""
    found = _Reader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def weight_names(folder: str | Path) -> list[str]:
    """The names of the weights of a folder."""
    return [name.removeprefix(WEIGHTS) for name in sizes(folder) if name.startswith(WEIGHTS)]


def load_into(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place, each process those that it has, or its parts of them; one tensor in memory at a time.

    Raises:
        CheckpointError: the folder lacks one, holds it in another shape, or a file of it is missing or cut short.
    """
    there = sizes(folder)
    for name, tensor in tensors.items():
        if name not in there:
            raise CheckpointError(f"{folder} holds no {name}. Expected the checkpoint of a run with the same settings.")
        if there[name].size != tensor.shape:
            raise CheckpointError(
                f"{folder} holds {name} of shape {tuple(there[name].size)}, expected {tuple(tensor.shape)}: it belongs "
                "to another model, or to adapters of another rank."
            )
    if not tensors:
        return
    try:
        with _alone():
            dcp.load(dict(tensors), storage_reader=_Reader(folder), no_dist=True)
    except (OSError, EOFError, RuntimeError, dcp.CheckpointException) as error:
        reason = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise CheckpointError(f"{folder} cannot be read ({reason}). Expected all of its *.distcp files.") from error


def load_whole(folder: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors whose names begin so, on the CPU, by one process or by each."""
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sizes(folder).items()
        if name.startswith(prefix)
    }
    load_into(folder, tensors)
    return tensors


# Optimisers


def optimizer_tensors(number: int, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser, with names for its parameters, as (tensors, the rest of it)."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for parameter, slots in state["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer_{number}.{parameter}.{slot}"] = value
            else:
                rest.setdefault(parameter, {})[slot] = value
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def optimizer_state(number: int, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`optimizer_tensors` took apart."""
    state = {parameter: dict(slots) for parameter, slots in rest["state"].items()}
    prefix = f"optimizer_{number}."
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            parameter, _, slot = name.removeprefix(prefix).rpartition(".")
            state.setdefault(parameter, {})[slot] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def load_optimizer(
    folder: str | Path, number: int, optimizer: Optimizer, names: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Load the state of an optimiser whose parameters may be sharded.

    Args:
        folder: the checkpoint.
        number: which of its optimisers.
        optimizer: the one to load.
        names: its parameters by name.
        rest: what `optimizer_tensors` left over.
    """
    tensors: dict[str, Tensor] = {}
    prefix = f"optimizer_{number}."
    for name, entry in sizes(folder).items():
        if name.startswith(prefix):
            parameter = names.get(name.removeprefix(prefix).rpartition(".")[0])
            dtype = entry.properties.dtype
            if parameter is not None and parameter.shape == entry.size:
                tensors[name] = torch.empty_like(parameter, dtype=dtype)
            else:
                tensors[name] = torch.empty(entry.size, dtype=dtype)
    load_into(folder, tensors)
    optimizer.load_state_dict(optimizer_state(number, tensors, rest))


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """A folder as the dictionary that a single file would hold, on one process or on each."""
    checkpoint = load_rest(folder)
    weights = load_whole(folder, WEIGHTS)
    checkpoint["state_dict"] = {name.removeprefix(WEIGHTS): tensor for name, tensor in weights.items()}
    states = checkpoint.get("optimizer_states", [])
    checkpoint["optimizer_states"] = [
        optimizer_state(number, load_whole(folder, f"optimizer_{number}."), rest) for number, rest in enumerate(states)
    ]
    return checkpoint


class _IndexUnpickler(pickle.Unpickler):
    """Makes the classes of an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")
        return getattr(importlib.import_module(module), name)


class _Reader(dcp.FileSystemReader):
    """Reads a folder without running what a pickle may hold; torch's own loads the index as it comes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / INDEX
        try:
            with file.open("rb") as stream:
                metadata: Metadata = _IndexUnpickler(stream).load()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{file} is no index of a checkpoint ({error}). Expected a folder that `fit` wrote."
            ) from error
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def _alone() -> Iterator[None]:
    """Torch warns that processes do not talk, though reading needs none of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
