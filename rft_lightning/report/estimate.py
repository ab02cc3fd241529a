"""`rft prepare --estimate`: what a run of a configuration needs on each device, and which devices that fits.

:mod:`rft_lightning.report.memory_table` is the same for the published models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import jsonargparse
import torch
from rich.console import Console
from rich.table import Table

from rft_lightning.errors import ConfigConflictError
from rft_lightning.memory import Memory, PolicySizes
from rft_lightning.memory_setup import DDP, FSDP2, SINGLE, Setup
from rft_lightning.optimiser_steps import default_optimizer
from rft_lightning.policy.families import PARTS
from rft_lightning.policy.loading import load_config, resolve_checkpoint
from rft_lightning.sharding import FSDP2Strategy
from rft_lightning.trainer import check_trainer

GIB, MIB = 2**30, 2**20
DEVICES = (24, 40, 80, 141)
# Of a device, for the CUDA context, communication buffers, fragments and temporary tensors that are not counted.
USABLE = 0.9
# Of a question with its chat template; the paper's have fewer than 250.
TEXT_TOKENS = 256
PROCESS_OPTIONS = ("shard_size", "gather_for_rollouts", "offload_policy", "offload_reference")
LINES = {
    "weights": "weights of the policy",
    "reference": "reference model",
    "optimizer": "optimiser state",
    "buckets": "gradient buckets of DDP",
    "gradients": "gradients",
    "cast": "bfloat16 copies of weights",
    "gathered_rollout": "gathered weights, rollout",
    "gathered_update": "gathered weights and their gradients, update",
    "cache": "keys and values of the rollout",
    "prefill": "prefill of the rollout",
    "sampling": "logits of the rollout",
    "activations": "activations of a micro-batch",
    "working": "backward of one block",
    "head": "log-probs and their backward",
    "stepping": "temporaries of the optimiser step",
    "validation": "keys, values and prefill of the validation",
}
# As Lightning reads them.
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
KNOWN_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
# Kernels that run on tensors without memory; others are counted as the first.
KERNELS = ("sdpa", "eager")


def print_estimate(config: Any, *, overrides: Mapping[str, Any], console: Console | None = None) -> Memory:
    """Print what a run needs per device.

    Args:
        config: the parsed command line, with `model`, `data` and `trainer` blocks; nothing of it is built.
        overrides: `devices`, `num_nodes`, `strategy`, `precision` and `prompt_tokens` in place of the configuration's;
            None leaves that.
        console: where to print.

    Raises:
        CheckpointError: the policy's ``config.json`` cannot be read.
        ConfigConflictError: settings that no run could have.
    """
    console = console or Console()
    if config.model is None:
        raise ConfigConflictError("There is no model block to estimate. Name a file with one: -c configs/coco.yaml")
    setup = setup_of(config, overrides)
    sizes = PolicySizes(load_config(config.model.init_args.policy), setup)
    memory = sizes.memory()
    console.print(_parameters(sizes))
    lines = [
        f"{setup.processes} x {setup.strategy}, per process: {setup.rollout_prompts} prompts at once in a rollout, "
        f"{setup.micro_batch_prompts} in a micro-batch, {setup.group_size} completions each "
        f"of {setup.completion_tokens} tokens, prompts of {setup.prompt_tokens} ({setup.image_tokens} of the image), "
        f"{setup.eval_prompts} prompts at once in validation"
    ]
    kernel = config.model.init_args.get("attn_implementation")
    if kernel not in (None, setup.attn_implementation):
        lines.append(f"Counted with the attention kernel {KERNELS[0]}: {kernel} runs on devices alone.")
    for line in lines:
        console.print(line, markup=False, highlight=False)
    console.print(_bytes(memory))
    for line in _verdicts(memory):
        console.print(line, markup=False, highlight=False)
    return memory


def setup_of(config: Any, overrides: Mapping[str, Any]) -> Setup:
    """The settings of a parsed configuration that memory follows from; see :func:`print_estimate`."""
    model, trainer = _plain(config.model.init_args), _plain(config.trainer) or {}
    data = _plain(config.data.init_args) if config.data is not None else {}
    trainer = {**trainer, **{name: value for name, value in overrides.items() if value is not None}}
    strategy, options = _strategy(trainer)
    processes = _devices(trainer.get("devices")) * _count(trainer, "num_nodes", 1, "--num_nodes")
    if strategy == "auto":
        strategy = DDP if processes > 1 else SINGLE
    if strategy == DDP and processes == 1:
        strategy = SINGLE
    precision = _precision(trainer, strategy, model.get("quantize"))
    batch = _count(data, "batch_size", 1, "data.batch_size")
    mini = min(batch, _count(model, "mini_batch_prompts", batch, "model.mini_batch_prompts"))
    validates = bool(data) and trainer.get("limit_val_batches") != 0
    group, objective = model.get("group_size"), _plain(model.get("objective") or {}).get("init_args", {})
    image, prompt = _prompt(data, model["policy"], trainer.get("prompt_tokens"))
    named = {name: model[name] for name in _SAME if model.get(name) is not None}
    return Setup(
        **{**named, **({"dtype": "bfloat16"} if precision == "bf16-true" else {})},
        mixed=precision == "bf16-mixed",
        attn_implementation=_kernel(model.get("attn_implementation")),
        freeze=tuple(model.get("freeze") or ()),
        optimizer=_optimizer(model.get("optimizer")),
        reference=group is not None and objective.get("beta", 0.04) > 0,
        group_size=_count(model, "group_size", 1, "model.group_size"),
        prompt_tokens=prompt,
        image_tokens=image,
        completion_tokens=_count(model, "max_completion_length", 256, "model.max_completion_length"),
        rollout_prompts=0 if group is None else min(batch, _count(model, "rollout_prompts", batch, _ROLLOUT)),
        eval_prompts=_count(data, "eval_batch_size", 16, "data.eval_batch_size") if validates else 0,
        micro_batch_prompts=min(mini, _count(model, "micro_batch_prompts", mini, "model.micro_batch_prompts")),
        strategy=strategy,
        processes=processes,
        bucket_view=bool(options.get("gradient_as_bucket_view")),
        **{name: options[name] for name in PROCESS_OPTIONS if strategy == FSDP2 and options.get(name) is not None},
    )


# Arguments of PolicyModule that Setup has by the same name.
_SAME = ("dtype", "lora", "quantize", "gradient_checkpointing", "forward", "sync_gradients")
_ROLLOUT = "model.rollout_prompts"


def _count(block: Mapping[str, Any], name: str, default: int, option: str) -> int:
    """A number of things; `default` where it is null."""
    value = block.get(name)
    if value is not None and value < 1:
        raise ConfigConflictError(f"Expected {option} >= 1, found {value}.")
    return default if value is None else int(value)


def _strategy(trainer: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """``single``, ``ddp``, ``fsdp2`` or ``auto``, and the arguments of its class."""
    strategy = trainer.get("strategy") or "auto"
    block = {} if isinstance(strategy, str) else _plain(strategy)
    options = {**_plain(block.get("dict_kwargs") or {}), **_plain(block.get("init_args") or {})}
    name = strategy if isinstance(strategy, str) else str(block["class_path"]).rsplit(".", 1)[-1]
    known = {"auto": "auto", SINGLE: SINGLE, FSDP2: FSDP2, "FSDP2Strategy": FSDP2, "DDPStrategy": DDP}
    known |= {"single_device": SINGLE, "SingleDeviceStrategy": SINGLE}
    if name not in known and not name.startswith("ddp"):
        raise ConfigConflictError(f"Nothing is known about the memory of the strategy {name}; expected ddp or fsdp2.")
    return known.get(name, DDP), options


def _devices(devices: Any) -> int:
    """How many devices of a node a setting of the Trainer means; those of this machine where it leaves that open."""
    if devices is None or str(devices).strip() in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    try:
        listed = devices if isinstance(devices, list | tuple) else str(devices).strip("[] ").split(",")
        numbers = [int(number) for number in listed if str(number).strip()]
    except ValueError:
        numbers = []
    # Names of devices with a comma or in a list, a number of them without.
    which = isinstance(devices, list | tuple) or any(sign in str(devices) for sign in ",[")
    count = len(numbers) if which else sum(numbers)
    if count < 1 or (which and (len(set(numbers)) < count or min(numbers) < 0)):
        raise ConfigConflictError(
            f"Expected --devices to be a number of devices >= 1, a list of different ones, such as 0,1, or auto, found "
            f"{devices!r}."
        )
    return count


def _precision(trainer: Mapping[str, Any], strategy: str, quantize: str | None) -> str:
    """The precision as Lightning names it; refused is what `fit` refuses, in its words, and what is not known here."""
    given = trainer.get("precision")
    precision = "32-true" if given is None else PRECISIONS.get(str(given), str(given))
    asked = {name: trainer.get(name) for name in ("gradient_clip_val", "accumulate_grad_batches")}
    asked["accumulate_grad_batches"] = asked["accumulate_grad_batches"] or 1
    stand_in = FSDP2Strategy() if strategy == FSDP2 else None
    check_trainer(SimpleNamespace(strategy=stand_in, precision=precision, **asked), quantize=quantize)
    if precision not in KNOWN_PRECISIONS:
        raise ConfigConflictError(
            f"Nothing is known about the memory of trainer.precision {given}; expected {', '.join(KNOWN_PRECISIONS)}."
        )
    return precision


def _kernel(name: str | None) -> str:
    """The attention kernel to count with."""
    from transformers import AttentionInterface

    known = (*KERNELS, *AttentionInterface().valid_keys())
    if name is not None and name not in known and "/" not in name:
        raise ConfigConflictError(
            f"Expected model.attn_implementation to be one of {', '.join(dict.fromkeys(known))}, found {name!r}."
        )
    return name if name in KERNELS else KERNELS[0]


def _prompt(data: Mapping[str, Any], policy: str, whole: int | None) -> tuple[int, int]:
    """Tokens of the image and of the whole prompt: the largest image that is allowed, beside a question."""
    vision, longest = load_config(policy).vision_config, data.get("max_prompt_length")
    if whole is not None and whole < 1:
        raise ConfigConflictError(f"Expected --prompt_tokens >= 1, found {whole}.")
    pixels = _most_pixels(data, policy) if hasattr(vision, "spatial_merge_size") else None
    if pixels is not None:
        image = max(1, pixels // (vision.patch_size * vision.spatial_merge_size) ** 2)
        whole = whole or min(image + TEXT_TOKENS, longest or image + TEXT_TOKENS)
        return min(image, whole), whole
    whole = whole or longest
    if whole is None:
        raise ConfigConflictError(
            "Neither data.max_pixels nor data.max_prompt_length bounds a prompt. Say how many tokens one has, with its "
            "image: --prompt_tokens 1024"
        )
    return max(1, whole - TEXT_TOKENS), whole


def _most_pixels(data: Mapping[str, Any], policy: str) -> int | None:
    """Pixels of the largest image; the processor's own limit where the data has none, None where neither is known."""
    least, most = data.get("min_pixels"), data.get("max_pixels")
    if None in (least, most):
        size = _processor_size(policy)
        least = size.get("shortest_edge") if least is None else least
        most = size.get("longest_edge") if most is None else most
    if most is not None and most < (least or 1):
        raise ConfigConflictError(
            f"min_pixels ({least or 1}) is greater than max_pixels ({most}); set both, or lower min_pixels."
        )
    return most


def _processor_size(policy: str) -> dict[str, Any]:
    """The limits of the checkpoint's image processor, in pixels; {} where its settings cannot be read."""
    from transformers import AutoImageProcessor

    try:
        return dict(AutoImageProcessor.from_pretrained(resolve_checkpoint(policy)).size)
    except (OSError, ValueError):
        return {}


def _optimizer(block: Any) -> Callable[..., Any]:
    block = _plain(block)
    if block is None:
        return default_optimizer
    module, _, name = str(block["class_path"]).rpartition(".")
    make = getattr(import_module(module or "torch.optim"), name)
    arguments = block.get("init_args") or {}
    return lambda parameters: make(parameters, **arguments)


def _plain(block: Any) -> Any:
    return block.as_dict() if isinstance(block, jsonargparse.Namespace) else block


def _parameters(sizes: PolicySizes) -> Table:
    table = Table("parameters", "million", "trained", "in 4 bits", "blocks")
    rows = {part: [w for w in sizes.weights if w.part == part] for part in PARTS}
    for name, weights in {**rows, "all": sizes.weights}.items():
        counts = [sum(w.count for w in weights if chosen(w)) for chosen in _CHOICES]
        units = len({w.block for w in weights} - {None})
        table.add_row(name.replace("_", " "), *(f"{count / 1e6:,.1f}" for count in counts), str(units))
    return table


_CHOICES: tuple[Callable[[Any], bool], ...] = (lambda w: True, lambda w: w.trained, lambda w: w.quantized)


def _bytes(memory: Memory) -> Table:
    name, unit = ("GiB", GIB) if memory.total >= GIB else ("MiB", MIB)
    table = Table(f"{name} per device", "")
    for field, text in LINES.items():
        if value := getattr(memory, field):
            table.add_row(text, f"{value / unit:.2f}")
    table.add_section()
    for phase, value in memory.phases.items():
        table.add_row(f"together in the {phase}", f"{value / unit:.2f}")
    table.add_row("most", f"{memory.total / unit:.2f}")
    return table


def _verdicts(memory: Memory) -> list[str]:
    fits = [size for size in DEVICES if memory.total <= USABLE * size * GIB]
    lines = [f"{size} GB: {'fits' if size in fits else 'does not fit'}" for size in DEVICES]
    return [", ".join(lines), f"(Fits: {1 - USABLE:.0%} of the device stay free for what is not counted.)"]
