"""What a checkpoint says about its policy, and export of a policy to a Hugging Face folder."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.loading import ASSET_PREFIX

RECORD = "rft_policy"


def policy_record(policy: str, settings: dict[str, Any], processor: Any) -> dict[str, Any]:
    """Plain data from which the policy of a checkpoint can be built again, from any working directory.

    Args:
        policy: the checkpoint that training started from.
        settings: the arguments of :class:`PolicyModule` that decide which weights there are.
        processor: the processor of the training prompts, for its image size.
    """
    folder = Path(policy).expanduser()
    local = not policy.startswith(ASSET_PREFIX) and folder.exists()
    size = dict(processor.image_processor.size)
    by_area = size.get("longest_edge") is not None and size.get("shortest_edge") is not None
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]} if by_area else {}
    return {"policy": str(folder.absolute()) if local else policy, "settings": settings, "pixel_limits": limits}


def read_record(ckpt: str | Path) -> dict[str, Any]:
    """The :func:`policy_record` of a checkpoint file; its tensors are not read.

    Raises:
        CheckpointError: there is no such file, or `fit` did not write it.
    """
    if not Path(ckpt).is_file():
        raise CheckpointError(f"No checkpoint file at {ckpt}; expected a .ckpt file that `rft fit` wrote.")
    try:
        saved = torch.load(ckpt, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{ckpt} cannot be read: it is another kind of file, or cut short. Expected a .ckpt file that `rft fit` "
            "wrote."
        ) from error
    if not isinstance(saved, dict) or RECORD not in saved:
        raise CheckpointError(
            f"{ckpt} does not say which policy it belongs to; expected a .ckpt file that `rft fit` wrote."
        )
    return saved[RECORD]


def check_export_folder(folder: str | Path) -> None:
    """Refuse to replace what is no earlier export.

    Raises:
        ConfigConflictError: `folder` is a file, or a folder that holds something else.
    """
    folder = Path(folder)
    replaceable = folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))
    if folder.exists() and not replaceable:
        raise ConfigConflictError(
            f"{folder} exists and is no exported policy (it holds no config.json), so it is not replaced. Choose "
            "another output_dir, or remove it."
        )


def export_policy(policy: nn.Module, processor: Any, folder: str | Path) -> Path:
    """Write policy and processor so that ``from_pretrained(folder)`` loads them; safetensors, no pickle.

    Written beside the target and renamed: nothing half-written is ever in its place.

    Args:
        policy: a Hugging Face model, or adapters around one, which are merged into a copy of its weights.
        processor: its processor.
        folder: where to write; an earlier export there is replaced.

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
        merged(policy).save_pretrained(partial)  # type: ignore[operator]
        _forget_last_call(processor)
        processor.save_pretrained(partial)
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


def merged(policy: Any) -> nn.Module:
    """A Hugging Face model with the weights of the policy: itself, or a copy with its adapters merged in."""
    return copy.deepcopy(policy).merge_and_unload() if hasattr(policy, "merge_and_unload") else policy


def _forget_last_call(processor: Any) -> None:
    """A fast tokenizer would save the padding of its last call with it."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
