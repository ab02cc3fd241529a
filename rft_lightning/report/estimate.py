"""`rft prepare --estimate`: what a run of a configuration needs on each device, and which devices that fits.

:mod:`rft_lightning.report.memory_table` is the same for the published models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import jsonargparse
import torch
from rich.console import Console
from rich.table import Table

from rft_lightning.errors import ConfigConflictError
from rft_lightning.memory import Memory, PolicySizes
from rft_lightning.memory_setup import DDP, FSDP2, SINGLE, Setup, default_optimizer
from rft_lightning.policy.families import PARTS
from rft_lightning.policy.loading import load_config

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
}


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
    console.print(
        f"{setup.processes} x {setup.strategy}, per process: {setup.rollout_prompts} prompts at once in a rollout, "
        f"{setup.micro_batch_prompts} in a micro-batch, {setup.group_size} completions each "
        f"of {setup.completion_tokens} tokens, prompts of {setup.prompt_tokens} ({setup.image_tokens} of the image)",
        markup=False,
        highlight=False,
    )
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
    processes = _devices(trainer.get("devices", "auto")) * int(trainer.get("num_nodes") or 1)
    if strategy == "auto":
        strategy = DDP if processes > 1 else SINGLE
    if strategy == DDP and processes == 1:
        strategy = SINGLE
    precision = str(trainer.get("precision") or "32-true")
    batch = int(data.get("batch_size") or 1)
    group = model.get("group_size")
    objective = _plain(model.get("objective") or {}).get("init_args", {})
    whole = trainer.get("prompt_tokens")
    image, prompt = _prompt(data, model["policy"], whole if whole is None else int(whole))
    named = {name: model[name] for name in _SAME if model.get(name) is not None}
    return Setup(
        **{**named, **({"dtype": "bfloat16"} if precision == "bf16-true" else {})},
        mixed=precision == "bf16-mixed",
        freeze=tuple(model.get("freeze") or ()),
        optimizer=_optimizer(model.get("optimizer")),
        reference=group is not None and objective.get("beta", 0.04) > 0,
        group_size=group or 1,
        prompt_tokens=prompt,
        image_tokens=image,
        completion_tokens=model.get("max_completion_length") or 256,
        rollout_prompts=0 if group is None else min(batch, model.get("rollout_prompts") or batch),
        micro_batch_prompts=min(batch, model.get("micro_batch_prompts") or model.get("mini_batch_prompts") or batch),
        strategy=strategy,
        processes=processes,
        bucket_view=bool(options.get("gradient_as_bucket_view")),
        **{name: options[name] for name in PROCESS_OPTIONS if strategy == FSDP2 and options.get(name) is not None},
    )


# Arguments of PolicyModule that Setup has by the same name.
_SAME = (
    "dtype", "lora", "quantize", "gradient_checkpointing", "attn_implementation", "forward", "sync_gradients"
)  # fmt: skip


def _strategy(trainer: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """``single``, ``ddp``, ``fsdp2`` or ``auto``, and the arguments of its class."""
    strategy = trainer.get("strategy") or "auto"
    options = {} if isinstance(strategy, str) else _plain(strategy.get("init_args") or {})
    name = strategy if isinstance(strategy, str) else str(strategy["class_path"]).rsplit(".", 1)[-1]
    known = {"auto": "auto", SINGLE: SINGLE, FSDP2: FSDP2, "FSDP2Strategy": FSDP2, "DDPStrategy": DDP}
    if name not in known and not name.startswith("ddp"):
        raise ConfigConflictError(f"Nothing is known about the memory of the strategy {name}; expected ddp or fsdp2.")
    return known.get(name, DDP), options


def _devices(devices: Any) -> int:
    """How many devices of a node a setting of the Trainer means; those of this machine where it leaves that open."""
    if isinstance(devices, list | tuple):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    return int(devices)


def _prompt(data: Mapping[str, Any], policy: str, whole: int | None) -> tuple[int, int]:
    """Tokens of the image and of the whole prompt: the largest image that is allowed, beside a question."""
    config = load_config(policy)
    vision, longest, pixels = config.vision_config, data.get("max_prompt_length"), data.get("max_pixels")
    if pixels is not None and hasattr(vision, "spatial_merge_size"):
        image = int(pixels) // (vision.patch_size * vision.spatial_merge_size) ** 2
        whole = whole or min(image + TEXT_TOKENS, longest or image + TEXT_TOKENS)
        return min(image, whole), whole
    whole = whole or longest
    if whole is None:
        raise ConfigConflictError(
            "Neither data.max_pixels nor data.max_prompt_length bounds a prompt. Say how many tokens one has, with its "
            "image: --prompt_tokens 1024"
        )
    return max(1, whole - TEXT_TOKENS), whole


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
