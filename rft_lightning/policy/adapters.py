"""LoRA adapters by peft: putting them around a model, and writing them alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft_lightning.errors import ConfigConflictError

if TYPE_CHECKING:
    from peft import LoraConfig


def with_adapters(model: Any, config: LoraConfig) -> Any:
    """The model with new adapters; its own weights are frozen.

    Raises:
        ValueError: peft finds no module to adapt.
    """
    import peft

    with warnings.catch_warnings():  # peft reads a property that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return peft.get_peft_model(model, config)


def save_adapters(policy: Any, folder: str | Path, *, base: str | None = None) -> Path:
    """Write the adapters alone, as ``peft.PeftModel.from_pretrained(base_model, folder)`` loads them; safetensors.

    Args:
        policy: a model with adapters.
        folder: where to write.
        base: what the files name as the model that the adapters belong to; where it was loaded from when None.

    Returns:
        the folder.

    Raises:
        ConfigConflictError: the policy has no adapters.
    """
    if not hasattr(policy, "peft_config"):
        raise ConfigConflictError("There are no adapters to save: the policy was trained without model.lora.")
    config = policy.peft_config["default"]
    named = config.base_model_name_or_path
    config.base_model_name_or_path = base or named
    try:
        # "auto" would ask the hub whether the vocabulary has grown, which it does not here.
        policy.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = named
    return Path(folder)
