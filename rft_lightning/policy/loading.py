"""Checkpoint -> policy, processor and reference model."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rft_lightning.errors import CheckpointError, ConfigConflictError

ASSET_PREFIX = "asset:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_checkpoint(checkpoint: str | Path) -> str:
    """A hub id or folder as given; ``asset:NAME`` is a policy shipped inside this package.

    Raises:
        CheckpointError: no shipped policy of that name, or a path that does not exist.
    """
    text = str(checkpoint)
    if text.startswith(ASSET_PREFIX):
        folder = Path(str(resources.files("rft_lightning"))) / "assets" / text.removeprefix(ASSET_PREFIX)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"This package ships no policy named {text!r}; expected {folder}/config.json.")
        return str(folder)
    looks_like_path = text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_like_path and not Path(text).expanduser().exists():
        raise CheckpointError(f"No checkpoint folder at {text!r}; expected a folder with config.json, or a hub id.")
    return str(Path(text).expanduser()) if Path(text).expanduser().exists() else text


def load_config(checkpoint: str) -> Any:
    """The configuration of a vision-language checkpoint.

    Raises:
        CheckpointError: nothing is found there, or it is no vision-language model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    path = resolve_checkpoint(checkpoint)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"No model configuration can be read from {checkpoint!r}: {str(error).splitlines()[0]} "
            "Expected a Hugging Face folder or hub id of a vision-language model, such as Qwen/Qwen2-VL-2B-Instruct."
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise CheckpointError(
            f"{checkpoint!r} is a {config.model_type!r} model, which is no vision-language model. "
            "Expected a checkpoint that answers questions about images, such as Qwen/Qwen2-VL-2B-Instruct."
        )
    return config


def load_policy(checkpoint: str, *, dtype: str = "float32", attn_implementation: str = "sdpa") -> nn.Module:
    """The policy, in training mode, with all parameters trainable.

    Args:
        checkpoint: hub id, folder, or ``asset:NAME``.
        dtype: float32, bfloat16 or float16: the dtype of the weights in memory.
        attn_implementation: the attention kernel, as transformers names it.

    Raises:
        CheckpointError: see :func:`load_config`.
        ConfigConflictError: unknown dtype.
    """
    from transformers import AutoModelForImageTextToText

    if dtype not in DTYPES:
        raise ConfigConflictError(f"Expected dtype to be one of {', '.join(DTYPES)}, found {dtype!r}.")
    load_config(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(
        resolve_checkpoint(checkpoint), dtype=DTYPES[dtype], attn_implementation=attn_implementation
    )
    # Hugging Face loads in eval mode and Lightning keeps it.
    return model.train().requires_grad_(True)


def load_processor(checkpoint: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The processor of a checkpoint, padding on the left; the limits replace the checkpoint's own when given.

    Raises:
        CheckpointError: the checkpoint has no processor with an image part.
        ConfigConflictError: min_pixels is greater than max_pixels.
    """
    from transformers import AutoProcessor

    load_config(checkpoint)
    try:
        processor = AutoProcessor.from_pretrained(resolve_checkpoint(checkpoint))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint!r} has no usable processor: {str(error).splitlines()[0]}") from error
    if not hasattr(processor, "image_processor"):
        raise CheckpointError(f"The processor of {checkpoint!r} ({type(processor).__name__}) does not take images.")
    set_pixel_limits(processor, min_pixels, max_pixels)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def set_pixel_limits(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Bound the number of pixels after resizing, for processors that resize to an area (the Qwen families)."""
    if min_pixels is None and max_pixels is None:
        return
    images = processor.image_processor
    size = dict(images.size)
    if "longest_edge" not in size:
        raise ConfigConflictError(
            f"{type(images).__name__} does not resize by area (its size is {size}); "
            "leave min_pixels and max_pixels out."
        )
    size["shortest_edge"] = min_pixels if min_pixels is not None else size["shortest_edge"]
    size["longest_edge"] = max_pixels if max_pixels is not None else size["longest_edge"]
    if size["shortest_edge"] > size["longest_edge"]:
        raise ConfigConflictError(
            f"min_pixels ({size['shortest_edge']}) is greater than max_pixels ({size['longest_edge']}); "
            "set both, or lower min_pixels."
        )
    images.size = size


def frozen_copy(policy: nn.Module) -> nn.Module:
    """The reference model: a copy of the policy as it is now, in eval mode and without gradients."""
    return copy.deepcopy(policy).eval().requires_grad_(False)
