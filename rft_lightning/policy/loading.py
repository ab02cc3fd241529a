"""Checkpoint -> policy, processor and reference model."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.adapters import with_adapters
from rft_lightning.policy.families import PARTS, base_model, check_parts, part_parameters
from rft_lightning.policy.quantization import (
    check_quantization,
    check_stored,
    quantization_config,
    use_exact_kernels,
)

if TYPE_CHECKING:
    from peft import LoraConfig

ASSET_PREFIX = "asset:"
# Fields of peft.LoraConfig that can change more than the adapters, and their values under which they do not.
WEIGHTS_UNTOUCHED: dict[str, tuple] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "kasa_config": (None,),
    "layer_replication": (None,),
}
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


def load_policy(
    checkpoint: str,
    *,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    lora: dict[str, Any] | LoraConfig | None = None,
    freeze: Sequence[str] = (),
    quantize: str | None = None,
    gradient_checkpointing: bool = False,
    skeleton: bool = False,
) -> nn.Module:
    """The policy, in training mode, with all parameters trainable unless told otherwise.

    Args:
        checkpoint: hub id, folder, or ``asset:NAME``.
        dtype: float32, bfloat16 or float16: the dtype of the weights in memory.
        attn_implementation: the attention kernel, as transformers names it.
        lora: train adapters instead of the weights; see :func:`add_adapters`.
        freeze: parts that are not trained and get no adapters: vision_tower, projector, language_model.
        quantize: ``nf4`` keeps the linear layers, of the vision tower too, in 4 bits (QLoRA); needs `lora`.
        gradient_checkpointing: recompute activations in backward, in training mode: less memory, more time.
        skeleton: leave the weights unread, on the meta device; somebody else will fill them.

    Raises:
        CheckpointError: see :func:`load_config` and :func:`whole_model`; or the checkpoint's own weights are quantised.
        ConfigConflictError: unknown dtype or part, nothing is left to train, or see :func:`add_adapters` and
            :func:`~rft_lightning.policy.quantization.check_quantization`.
    """
    from transformers import AutoModelForImageTextToText

    if dtype not in DTYPES:
        raise ConfigConflictError(f"Expected dtype to be one of {', '.join(DTYPES)}, found {dtype!r}.")
    check_quantization(quantize, dtype=dtype, lora=lora)
    config = load_config(checkpoint)
    check_stored(checkpoint, config)
    check_freeze(freeze, config)
    settings: dict[str, Any] = {}
    if quantize is not None and lora is not None:
        settings["quantization_config"] = quantization_config(config, dtype=DTYPES[dtype], lora=lora_config(lora))
        # Always there, so that a policy is the same numbers wherever it is trained and exported.
        settings["device_map"] = {"": "cpu"}
    settings |= {"dtype": DTYPES[dtype], "attn_implementation": attn_implementation}
    model: Any
    if skeleton:
        model = _skeleton(resolve_checkpoint(checkpoint), config, settings)
    else:
        model = whole_model(AutoModelForImageTextToText, checkpoint, **settings)
    if quantize is None:
        model.requires_grad_(True)
    else:
        use_exact_kernels(model)
    freeze_parts(model, freeze)
    if lora is not None:
        with torch.device("meta") if skeleton else nullcontext():
            model = add_adapters(model, lora, freeze)
    if gradient_checkpointing:
        enable_checkpointing(model)
    # Hugging Face loads in eval mode and Lightning keeps it.
    return model.train()


def whole_model(model_class: Any, checkpoint: str, **settings: Any) -> Any:
    """A model of transformers with the weights of a checkpoint, none of which may be missing; others are left out.

    Args:
        model_class: the class, one of transformers' Auto classes for example.
        checkpoint: hub id, folder, or ``asset:NAME``.
        **settings: of ``from_pretrained``.

    Raises:
        CheckpointError: weights cannot be read, are missing, or have other shapes than the checkpoint's configuration
            says.
    """
    from safetensors import SafetensorError

    try:
        model, found = model_class.from_pretrained(
            resolve_checkpoint(checkpoint), output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"The weights of {checkpoint!r} cannot be read ({str(error).splitlines()[0]}). Expected complete files of "
            "weights; download or copy them again."
        ) from error
    # Whole numbers (places in windows, counts) are no weights: a model computes them where they are missing.
    computed = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    missing = sorted(set(found["missing_keys"]) - computed)
    reshaped = [f"{name} {tuple(there)} for {tuple(due)}" for name, there, due in sorted(found["mismatched_keys"])]
    for verb, names in (("lacks", missing), ("holds, in another shape,", reshaped)):
        if names:
            raise CheckpointError(
                f"{checkpoint!r} {verb} {len(names)} of the weights of a {type(model).__name__}, which would be "
                f"random: {', '.join(names[:3])}{', ...' if names[3:] else ''}. Download or copy it again; if its "
                "files are complete, they are of another class of models than its config.json says."
            )
    return model


def check_freeze(freeze: Sequence[str], config: Any) -> None:
    """Refuse parts that are not known, and to freeze all of them.

    Raises:
        ConfigConflictError: either is the case.
    """
    check_parts(freeze, config)
    if set(freeze) == set(PARTS):
        raise ConfigConflictError(f"There is nothing to train: freeze names all parts ({', '.join(freeze)}). Drop one.")


def freeze_parts(model: nn.Module, freeze: Sequence[str]) -> None:
    """Exempt parts of a model from training."""
    for part in freeze:
        for parameter in part_parameters(model, part).values():
            parameter.requires_grad_(False)


def _skeleton(path: str, config: Any, settings: dict[str, Any]) -> Any:
    """The model without its weights, and with the generation settings that loading it would give it."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, **settings)
    with suppress(OSError):  # a checkpoint need not have such settings
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def add_adapters(model: Any, lora: dict[str, Any] | LoraConfig, freeze: Sequence[str] = ()) -> nn.Module:
    """The model with trainable LoRA adapters; its own weights are frozen.

    Args:
        model: a Hugging Face model.
        lora: fields of ``peft.LoraConfig``, or one; without target_modules, all linear layers but the output head.
        freeze: parts that get no adapters.

    Raises:
        ConfigConflictError: see :func:`lora_config`; or there is no module to adapt, or a frozen part would train.
    """
    config = lora_config(lora)
    frozen = {name.rpartition(".")[0] for part in freeze for name in part_parameters(model, part)}
    if frozen:
        config.exclude_modules = sorted(frozen | _module_names(model, config.exclude_modules))
    try:
        adapted = with_adapters(model, config)
    except ValueError as error:
        raise ConfigConflictError(f"peft cannot put adapters where lora and freeze allow them: {error}") from error
    for part in freeze:
        trained = [name for name, parameter in part_parameters(adapted, part).items() if parameter.requires_grad]
        if trained:
            raise ConfigConflictError(
                f"lora would train {trained[0]}, which lies in the frozen part {part}. Take it out of "
                "lora.modules_to_save and lora.target_parameters, or the part out of freeze."
            )
    _refuse_tied_adapters(model)
    return adapted


def _refuse_tied_adapters(model: Any) -> None:
    """One weight that serves as embedding and head cannot be merged with an adapter of one of the two."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    places = {"embeddings": model.get_input_embeddings(), "output head": model.get_output_embeddings()}
    adapted = [name for name, module in places.items() if isinstance(module, BaseTunerLayer)]
    weights = [getattr(module, "weight", None) for module in places.values()]
    if adapted and weights[0] is weights[1]:
        raise ConfigConflictError(
            f"lora puts an adapter on the {' and the '.join(adapted)}, but embeddings and output head of this model "
            "share one weight, so the exported model could not equal the tuned one. Take lm_head and embed_tokens out "
            "of lora.target_modules, or train them whole: lora.modules_to_save: [lm_head]."
        )


def lora_config(lora: dict[str, Any] | LoraConfig) -> LoraConfig:
    """A checked ``peft.LoraConfig``; a given one is copied, because peft writes into it.

    Raises:
        ConfigConflictError: an unknown field, values that peft refuses, or a setting under which the model with its
            adapters off is not the model as it was, which the reference model must be.
    """
    from peft import LoraConfig

    if isinstance(lora, dict):
        fields = [field.name for field in dataclasses.fields(LoraConfig)]
        for name in lora.keys() - set(fields):
            close = difflib.get_close_matches(name, fields)
            hint = f"did you mean {' or '.join(close)}?" if close else f"peft.LoraConfig has {', '.join(fields)}."
            raise ConfigConflictError(f"lora has no field {name!r}; {hint}")
        try:
            config = LoraConfig(**lora)
        except (TypeError, ValueError) as error:
            raise ConfigConflictError(f"peft refuses the settings lora: {lora}: {error}") from error
    else:
        config = copy.deepcopy(lora)
    for name, allowed in WEIGHTS_UNTOUCHED.items():
        if (value := getattr(config, name, None)) not in allowed:
            raise ConfigConflictError(
                f"lora.{name} is {value!r}, expected {' or '.join(map(repr, allowed))}: others change more than the "
                "adapters, and the reference model is the policy with its adapters off."
            )
    if config.target_modules is None and config.target_parameters is None:
        config.target_modules = "all-linear"
    config.task_type = None  # peft's wrapper for a task puts its own generation settings over ours
    return config


def _module_names(model: nn.Module, names: Iterable[str] | None) -> set[str]:
    """What a list of module names or, as a string, a pattern of them stands for."""
    if isinstance(names, str):
        return {name for name, _ in model.named_modules() if re.fullmatch(names, name)}
    return set(names or ())


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute activations in backward, in training mode."""
    inner = base_model(model)
    # The new name exists from transformers 5.23 on, which warns of the old one.
    new = getattr(inner, "activation_checkpointing_enable", None)
    (new or inner.gradient_checkpointing_enable)({"use_reentrant": False})


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


def checkpointing_active(model: nn.Module) -> bool:
    """Whether a forward of the model in its present mode would recompute activations in backward."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode: no dropout, and a cache even with gradient checkpointing."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
