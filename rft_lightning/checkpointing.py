"""What a checkpoint holds and says of its policy, reading it, and export of a policy to a Hugging Face folder."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import nn

from rft_lightning import sharded_files
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.model_card import write_card
from rft_lightning.policy.adapters import save_adapters
from rft_lightning.policy.loading import ASSET_PREFIX
from rft_lightning.policy.quantization import dequantized, is_quantized

RECORD = "rft_policy"


def policy_record(
    policy: str, settings: dict[str, Any], processor: Any, facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Plain data from which the policy of a checkpoint can be built again, from any working directory.

    Args:
        policy: the checkpoint that training started from.
        settings: the arguments of :class:`PolicyModule` that decide which weights there are.
        processor: the processor of the training prompts, for its image size.
        facts: what there is to say of the run; see :func:`rft_lightning.model_card.run_facts`.
    """
    folder = Path(policy).expanduser()
    local = not policy.startswith(ASSET_PREFIX) and folder.exists()
    size = dict(processor.image_processor.size)
    by_area = size.get("longest_edge") is not None and size.get("shortest_edge") is not None
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]} if by_area else {}
    base = str(folder.absolute()) if local else policy
    return {"policy": base, "settings": settings, "pixel_limits": limits, "run": facts or {}}


class PolicyCheckpointIO(TorchCheckpointIO):
    """Reads checkpoints of every strategy under those of one device and DDP: a file, or the folder of `fsdp2`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file where it is told to; Lightning's holds it twice in memory, and writes it to /tmp first.

        RolloutCheckpoint sees to it that a file cut short is never in the place of a whole one.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:  # given the path, torch would not say why it could not write
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint as one dictionary; unless `weights_only` is False, nothing but plain data and tensors."""
        if sharded_files.is_folder(path):
            return sharded_files.load_checkpoint(path)
        return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)


def read_record(ckpt: str | Path) -> dict[str, Any]:
    """The :func:`policy_record` of a checkpoint; its tensors are not read.

    Raises:
        CheckpointError: there is no such checkpoint, or `fit` did not write it.
    """
    saved = sharded_files.load_rest(ckpt) if sharded_files.is_folder(ckpt) else _read_file(ckpt)
    if not isinstance(saved, dict) or RECORD not in saved:
        raise CheckpointError(
            f"{ckpt} does not say which policy it belongs to; expected a checkpoint that `rft fit` wrote."
        )
    return saved[RECORD]


def _read_file(ckpt: str | Path) -> Any:
    """What a file holds; its tensors stay on the disk until they are used."""
    if not Path(ckpt).is_file():
        raise CheckpointError(f"No checkpoint at {ckpt}; expected a .ckpt file or folder that `rft fit` wrote.")
    try:
        return torch.load(ckpt, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{ckpt} cannot be read: it is another kind of file, or cut short. Expected a .ckpt file that `rft fit` "
            "wrote."
        ) from error


def saved_names(module: nn.Module, *, adapters_only: bool) -> set[str]:
    """The names of what a checkpoint of the module holds: all weights, or those alone that are trained."""
    if not adapters_only:
        return set(module.state_dict())
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_names(module: nn.Module, found: Iterable[str], *, adapters_only: bool) -> None:
    """Refuse a checkpoint that is not of this module.

    Raises:
        CheckpointError: weights are missing, or there are others.
    """
    found = set(found)
    missing = saved_names(module, adapters_only=adapters_only) - found
    foreign = found - set(module.state_dict())
    if missing or foreign:
        lists = {"lacks": missing, "holds": foreign}
        told = [f"it {verb} {sorted(names)[0]} and {len(names) - 1} more" for verb, names in lists.items() if names]
        raise CheckpointError(
            f"The checkpoint is not of this policy: {' and '.join(told)}. Resume with the model.policy, model.lora and "
            "model.quantize that wrote it."
        )


def load_weights(module: nn.Module, ckpt: str | Path, *, adapters_only: bool) -> None:
    """Load the weights of a checkpoint into a module on one process; one tensor in memory at a time.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not of this module.
    """
    own = module.state_dict()
    if sharded_files.is_folder(ckpt):
        there = sharded_files.weight_names(ckpt)
        check_names(module, there, adapters_only=adapters_only)
        sharded_files.load_into(ckpt, {f"{sharded_files.WEIGHTS}{name}": own[name] for name in there})
        return
    saved = _read_file(ckpt)
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise CheckpointError(f"{ckpt} holds no weights; expected a .ckpt file that `rft fit` wrote.")
    check_names(module, saved["state_dict"], adapters_only=adapters_only)
    try:
        module.load_state_dict(saved["state_dict"], strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{ckpt} is of another model, or of adapters of another rank: {str(error).splitlines()[-1].strip()}"
        ) from error


def check_export_folder(folder: str | Path) -> None:
    """Refuse to replace what is no earlier export.

    Raises:
        ConfigConflictError: `folder` is a file, or a folder that holds something else.
    """
    folder = Path(folder)
    exported = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    replaceable = folder.is_dir() and (exported or not any(folder.iterdir()))
    if folder.exists() and not replaceable:
        raise ConfigConflictError(
            f"{folder} exists and is no exported policy (it holds no config.json, nor an adapter_config.json), so it "
            "is not replaced. Choose another output_dir, or remove it."
        )


def export_policy(
    policy: nn.Module,
    processor: Any,
    folder: str | Path,
    *,
    record: Mapping[str, Any] | None = None,
    merge: bool = True,
    in_place: bool = False,
) -> Path:
    """Write policy and processor so that ``from_pretrained(folder)`` loads them; safetensors, no pickle.

    Written beside the target and renamed: nothing half-written is ever in its place.

    Args:
        policy: a Hugging Face model, or adapters around one, which are merged into a copy of its weights.
        processor: its processor.
        folder: where to write; an earlier export there is replaced.
        record: the :func:`policy_record`, of which the model card tells; without one there is no card.
        merge: merge adapters; false writes them alone, for ``peft.PeftModel.from_pretrained`` over the policy that
            training started from.
        in_place: the policy may be used up by it, which saves the memory of a copy.

    Returns:
        the folder.

    Raises:
        ConfigConflictError: see :func:`check_export_folder`.
    """
    check_export_folder(folder)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    earlier = folder.with_name(f".{folder.name}-{os.getpid()}-earlier")
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if merge:
            merged(policy, in_place=in_place).save_pretrained(partial)  # type: ignore[operator]
        else:
            save_adapters(policy, partial, base=None if record is None else record["policy"])
        _forget_last_call(processor)
        processor.save_pretrained(partial)
        if record is not None and record["run"]:
            write_card(partial, record["policy"], record["settings"], record["run"])
        os.chmod(partial, 0o755)  # mkdtemp makes it private, and safetensors its files
        for file in partial.rglob("*"):
            os.chmod(file, 0o755 if file.is_dir() else 0o644)
        if folder.exists():
            os.replace(folder, earlier)
        os.replace(partial, folder)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def merged(policy: Any, *, in_place: bool = False) -> nn.Module:
    """A Hugging Face model with the weights of the policy: itself, or a copy with its adapters merged in.

    The weights under adapters that were 4-bit in training are what these stand for, in the policy's dtype.
    """
    if not hasattr(policy, "merge_and_unload"):
        return policy
    if is_quantized(policy):
        return dequantized(policy).merge_and_unload()
    return (policy if in_place else copy.deepcopy(policy)).merge_and_unload()


def _forget_last_call(processor: Any) -> None:
    """A fast tokenizer would save the padding of its last call with it."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
