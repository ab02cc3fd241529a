"""Checkpoints of transformers that are no policies: segmenters and comparison systems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.loading import DTYPES, resolve_checkpoint, whole_model


def load_pretrained(
    checkpoint: str, classes: Mapping[str, tuple[str, str]], *, dtype: str = "float32"
) -> tuple[Any, Any]:
    """A model, in eval mode and without gradients, and its processor.

    Weights are read from safetensors files only: pickled ones can execute code.

    Args:
        checkpoint: hub id or folder.
        classes: model type, as the checkpoint's configuration states it -> names of the model's and the processor's
            class in transformers.
        dtype: float32, bfloat16 or float16: the dtype of the weights in memory.

    Raises:
        CheckpointError: nothing is found there, it is of another type, or its weights are no safetensors files or not
            all there.
        ConfigConflictError: unknown dtype.
    """
    import transformers

    check_dtype(dtype)
    path = resolve_checkpoint(checkpoint)
    expected = f"Expected a hub id or folder of a model of type {' or '.join(classes)} with safetensors files."
    try:
        kind = transformers.AutoConfig.from_pretrained(path).model_type
        if kind not in classes:
            raise CheckpointError(f"{checkpoint!r} is a {kind!r} model. {expected}")
        model_class, processor_class = (getattr(transformers, name) for name in classes[kind])
        processor = processor_class.from_pretrained(path)
        model = whole_model(model_class, checkpoint, dtype=DTYPES[dtype], use_safetensors=True)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint!r} cannot be loaded: {str(error).splitlines()[0]} {expected}") from error
    return model.eval().requires_grad_(False), processor


def check_dtype(dtype: str) -> None:
    """Refuse a name that is none of a dtype of weights.

    Raises:
        ConfigConflictError: it is none.
    """
    if dtype not in DTYPES:
        raise ConfigConflictError(f"Expected dtype to be one of {', '.join(DTYPES)}, found {dtype!r}.")


__all__ = ["check_dtype", "load_pretrained"]
