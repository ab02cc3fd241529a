"""QLoRA (arXiv 2305.14314): a frozen policy in 4-bit NormalFloat, on which adapters train.

Each linear layer holds 4-bit codes and, for every block of 64 weights, a scale that is itself stored in 8 bits (double
quantisation): 4.13 bits per weight. A forward dequantises the layer it is in; only adapters get gradients.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.adapters import with_adapters
from rft_lightning.policy.families import base_model

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

NF4 = "nf4"
QUANTIZATIONS = (NF4,)
# Weights that share a scale, as in the paper and in bitsandbytes.
BLOCK = 64
# On CPUs with AVX512-BF16, bitsandbytes advises at import to install the package `kernels`, by which it would download
# a kernel that :func:`use_exact_kernels` leaves unused.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)
# Losses here are not scaled, as the gradients of float16 would need.
QUANTIZED_DTYPES = ("float32", "bfloat16")


def check_quantization(quantize: str | None, *, dtype: str, lora: Any) -> None:
    """Refuse settings that do not go together.

    Args:
        quantize: ``nf4``, or None.
        dtype: dtype of all that is not quantised, and of the arithmetic.
        lora: the adapters' settings, or None.

    Raises:
        ConfigConflictError: there is no such quantisation, nothing that could train, or no dtype to compute in.
    """
    if quantize is None:
        return
    if quantize not in QUANTIZATIONS:
        raise ConfigConflictError(f"Expected quantize to be {' or '.join(QUANTIZATIONS)} or null, found {quantize!r}.")
    if lora is None:
        raise ConfigConflictError(
            f"model.quantize is {quantize}, but 4-bit weights cannot be trained themselves. Train adapters on them, "
            "with model.lora: {r: 16, lora_alpha: 32} for example, or leave model.quantize null."
        )
    if dtype not in QUANTIZED_DTYPES:
        raise ConfigConflictError(
            f"model.quantize computes in {' or '.join(QUANTIZED_DTYPES)}, found model.dtype {dtype}: the small "
            "gradients of float16 become zero without loss scaling. Use bfloat16."
        )


def check_stored(checkpoint: str, config: Any) -> None:
    """Refuse a checkpoint whose files hold quantised weights.

    Raises:
        CheckpointError: that is the case.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    raise CheckpointError(
        f"{checkpoint!r} holds weights that are quantised already ({getattr(method, 'value', method)}): they can "
        "neither be trained nor exported with adapters merged into them. Start from the unquantised checkpoint that it "
        "was made of; model.quantize: nf4 with model.lora keeps that one in 4 bits in memory."
    )


def quantization_config(config: Any, *, dtype: torch.dtype, lora: LoraConfig) -> BitsAndBytesConfig:
    """What ``from_pretrained`` needs to know to load a model in NF4.

    Args:
        config: the model's configuration.
        dtype: dtype of the arithmetic.
        lora: the adapters; what they train whole (`modules_to_save`) is not quantised.

    Raises:
        ConfigConflictError: adapters of parameters (`target_parameters`), of which 4-bit ones cannot have any.
    """
    from transformers import BitsAndBytesConfig

    if lora.target_parameters:
        raise ConfigConflictError(
            "lora.target_parameters adapts parameters as tensors, which 4-bit weights are not: name their layers in "
            "lora.target_modules, or leave model.quantize null."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Bytes, which no cast of a model's floating-point weights (trainer.precision) touches.
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=[re.escape(name) for name in kept_layers(config, lora.modules_to_save or ())],
    )


def kept_layers(config: Any, trained_whole: Collection[str] = ()) -> list[str]:
    """The modules with linear layers that are not quantised.

    These are the output head, whose errors no later layer can make good; modules that are trained whole; and layers
    with rows that are no whole blocks, for which kernels of bitsandbytes 0.50 on AVX-512 give other weights (widths of
    16 times an odd number, for one). Among published models those are the 3420 wide layers in Qwen2.5-VL's tower.

    Args:
        config: the model's configuration.
        trained_whole: names of modules, or their ends, as peft understands `modules_to_save`.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    head, kept = model.get_output_embeddings(), []
    for name, module in model.named_modules():
        broken = isinstance(module, nn.Linear) and module.in_features % BLOCK != 0
        if module is head or broken or any(name == end or name.endswith(f".{end}") for end in trained_whole):
            kept.append(name)
    return kept


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The 4-bit linear layers of a model by their names."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def is_quantized(model: nn.Module) -> bool:
    """Whether a policy was loaded in 4 bits."""
    return getattr(base_model(model), "is_loaded_in_4bit", False)


def use_exact_kernels(model: nn.Module) -> None:
    """Compute alike in training and evaluation.

    On CPUs with AVX512-BF16, bitsandbytes repacks a layer at its first forward in eval mode: from then on it computes
    in bfloat16 and passes no gradients, in training mode too.
    """
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def check_optimizer(optimizer: Optimizer, *, sharded: bool) -> None:
    """Refuse an optimiser that cannot update its parameters.

    Args:
        optimizer: of the policy.
        sharded: whether `fsdp2` shards them.

    Raises:
        ConfigConflictError: one of bitsandbytes, whose state is quantised, for parameters that are sharded.
    """
    name = type(optimizer).__name__
    if sharded and type(optimizer).__module__.startswith("bitsandbytes"):
        raise ConfigConflictError(
            f"bitsandbytes' {name} cannot update parameters that fsdp2 shards: its kernels read the memory of a whole "
            "tensor, and its state in blocks fits no other number of processes. Use torch.optim.AdamW, whose state is "
            "sharded too, or --trainer.strategy ddp."
        )


def dequantized(policy: Any) -> Any:
    """A copy on the CPU of adapters around a 4-bit model, around its dequantised weights instead.

    It computes what the policy does, up to rounding. peft's own merging would round to 4 bits again what was learned.

    Args:
        policy: a ``peft.PeftModel``; unchanged.
    """
    import peft

    adapters = peft.get_peft_model_state_dict(policy, save_embedding_layers=False)
    base = copy.deepcopy(policy).to("cpu").unload()
    for name, layer in quantized_layers(base).items():  # one by one: 4-bit and whole weights of one layer together
        base.set_submodule(name, _plain(layer, base.dtype))
    base.hf_quantizer.remove_quantization_config(base)
    with torch.random.fork_rng(devices=[]):  # new adapters draw numbers before they are overwritten
        whole = with_adapters(base, copy.deepcopy(policy.peft_config["default"]))
    peft.set_peft_model_state_dict(whole, adapters)
    return whole.train(policy.training)


def _plain(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """An ordinary linear layer with the weights that a 4-bit one computes with."""
    from bitsandbytes.functional import dequantize_4bit

    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype))
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data.to(dtype))
    return plain.requires_grad_(False)
