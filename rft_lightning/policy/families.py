"""What differs between model families, in one table: frame, exact layouts, and where their parts are.

A family is known by ``config.model_type``, never by the name of a checkpoint folder. docs/adding-a-model.md tells how a
family gets its line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import TOKEN_TENSORS, PromptBatch

PREFIX_CACHE, PACKED = "prefix_cache", "packed"
PARTS = ("vision_tower", "projector", "language_model")
QWEN_VISION = {
    "vision_tower": ("model.visual",),
    # Inside the tower module, but the connector to the language model: not part of "vision_tower".
    "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    "language_model": ("model.language_model", "lm_head"),
}
LLAVA_PARTS = {
    "vision_tower": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector", "model.image_newline"),
    "language_model": ("model.language_model", "lm_head"),
}
# As configs name them: *_token_id and, in older files, *_token_index (LLaVA-OneVision, Gemma3).
VISION_TOKENS = tuple(
    f"{name}_token_{ending}"
    for name in ("image", "video", "vision", "vision_start", "vision_end", "boi", "eoi")
    for ending in ("id", "index")
)


@dataclass(frozen=True)
class Family:
    """What a model family needs told.

    Attributes:
        frame: how it writes boxes: ``relative`` (0 to 1000) or ``resized`` (pixels of the image as its processor
            resized it). Families without a convention of their own are asked for 0 to 1000, as the question states.
        layouts: the shared-prefix layouts that are exact for it (policy/shared_prefix.py), in order of preference; none
            means the plain route.
        parts: where the vision tower, the projector and the language model lie in the Hugging Face model. A module
            path that the model lacks is skipped; a path of one part inside another's is taken out of the outer one.
        images_both_ways: whether the tokens of an image see each other both ways in the decoder.
    """

    frame: str
    layouts: tuple[str, ...]
    parts: dict[str, tuple[str, ...]]
    images_both_ways: bool = False


FAMILIES = {
    "qwen2_vl": Family("relative", (PREFIX_CACHE, PACKED), QWEN_VISION),
    "qwen2_5_vl": Family("resized", (PREFIX_CACHE, PACKED), QWEN_VISION),
    "qwen3_vl": Family("relative", (PREFIX_CACHE, PACKED), QWEN_VISION),
    # Linear attention: the recurrence of a packed row runs through the other completions, and its cache is updated in
    # place, which backward forbids.
    "qwen3_5": Family("relative", (), QWEN_VISION),
    "internvl": Family("relative", (PREFIX_CACHE, PACKED), LLAVA_PARTS),
    "llava_onevision": Family("relative", (PREFIX_CACHE, PACKED), LLAVA_PARTS),
    "gemma3": Family("relative", (PREFIX_CACHE, PACKED), LLAVA_PARTS, images_both_ways=True),
}


def family_of(config: Any) -> Family | None:
    """The family of a model's config; None for one that is not in the table."""
    return FAMILIES.get(config.model_type)


def part_parameters(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """The parameters of a part by their names in the Hugging Face model, inside a possible adapter wrapper.

    Each belongs to the part with the longest path that leads to it. A tied weight appears under each of its names.

    Raises:
        ConfigConflictError: there is no such part, or it is not known where the family has it.
    """
    inner = base_model(model)
    check_parts((part,), inner.config)
    part_of = {path: name for name, paths in FAMILIES[inner.config.model_type].parts.items() for path in paths}
    found = {}
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        paths = [path for path in part_of if f"{name}.".startswith(f"{path}.")]
        if paths and part_of[max(paths, key=len)] == part:
            found[name] = parameter
    return found


def check_parts(parts: Sequence[str], config: Any) -> None:
    """Refuse names that are no parts, and families whose parts are not known.

    Raises:
        ConfigConflictError: either is the case.
    """
    if not set(parts) <= set(PARTS):
        raise ConfigConflictError(f"Expected a list of the parts {', '.join(PARTS)}, found {parts!r}.")
    if parts and family_of(config) is None:
        raise ConfigConflictError(
            f"It is not known where the family {config.model_type!r} has its {', '.join(parts)} (known: "
            f"{', '.join(FAMILIES)}). Leave model.freeze empty, or add the family to rft_lightning/policy/families.py."
        )


def coordinate_frame(config: Any, processor: Any) -> CoordinateFrame:
    """The frame in which the family of `config` writes boxes, for images resized by `processor`.

    Raises:
        CheckpointError: the family's convention is not known.
    """
    family = family_of(config)
    if family is None:
        raise CheckpointError(
            f"It is not known how the family {config.model_type!r} writes boxes (known: {', '.join(FAMILIES)}). "
            "Set data.frame, for example --data.frame.kind relative --data.frame.extent 1000 (from Python: "
            "frame=CoordinateFrame('relative', extent=1000))."
        )
    if family.frame == "relative":
        return CoordinateFrame("relative")
    images = processor.image_processor
    return CoordinateFrame(
        "resized",
        factor=images.patch_size * images.merge_size,
        min_pixels=images.size["shortest_edge"],
        max_pixels=images.size["longest_edge"],
    )


def base_model(model: Any) -> Any:
    """The Hugging Face model inside a possible adapter wrapper (Any: what is used of both is declared by neither)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def position_ids(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, vision: dict[str, Tensor]) -> Tensor:
    """Rope positions of complete rows [rows, T]: [3, rows, T] for families with multimodal rope, else [rows, T].

    Given explicitly because the models otherwise reuse ``rope_deltas`` left over from an earlier ``generate``, or count
    the padding on the left.
    """
    inner = base_model(model).model
    if not hasattr(inner, "get_rope_index"):
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    positions, _ = inner.get_rope_index(
        input_ids,
        mm_token_type_ids=vision["mm_token_type_ids"],
        image_grid_thw=vision.get("image_grid_thw"),
        attention_mask=attention_mask,
    )
    return positions


def vision_token_ids(config: Any) -> list[int]:
    """Placeholder tokens that the model must never write: a sampled one has no features and breaks the forward.

    With them the tokens around an image, where the config names them (InternVL's and LLaVA-OneVision's name none).
    """
    ids = {getattr(config, name, None) for name in VISION_TOKENS}
    return sorted(i for i in ids if isinstance(i, int))


def end_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the checkpoint's generation settings and the tokenizer's end of sequence."""
    ends = getattr(base_model(model).generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return sorted(set(ends))


def repeat_vision(
    vision: dict[str, Tensor], image_counts: list[int], patch_counts: list[int], times: int
) -> dict[str, Tensor]:
    """The vision tensors of B prompts with everything of each prompt repeated `times` in place."""
    repeated = {}
    for name, tensor in vision.items():
        if name in TOKEN_TENSORS:
            repeated[name] = tensor.repeat_interleave(times, 0)
        else:
            pieces = tensor.split(patch_counts if name == "pixel_values" else image_counts)
            repeated[name] = torch.cat([piece for piece in pieces for _ in range(times)])
    return repeated


def repeat_prompts(prompts: PromptBatch, times: int) -> PromptBatch:
    """Each of B prompts `times` times, next to each other."""
    return replace(
        prompts,
        input_ids=prompts.input_ids.repeat_interleave(times, 0),
        attention_mask=prompts.attention_mask.repeat_interleave(times, 0),
        vision=repeat_vision(prompts.vision, prompts.image_counts, prompts.patch_counts, times),
        image_counts=[count for count in prompts.image_counts for _ in range(times)],
        patch_counts=[count for count in prompts.patch_counts for _ in range(times)],
        samples=[sample for sample in prompts.samples for _ in range(times)],
        positions=None if prompts.positions is None else prompts.positions.repeat_interleave(times, -2),
        features=None if prompts.features is None else [found for found in prompts.features for _ in range(times)],
    )


def prompt_positions(model: nn.Module, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
    """Rope positions of the prompts, [3, B, P] or [B, P], and the position [B] of the token that follows each."""
    positions = prompts.positions
    if positions is None:
        positions = position_ids(model, prompts.input_ids, prompts.attention_mask, prompts.vision)
    seen = positions.masked_fill(prompts.attention_mask == 0, 0)
    return positions, seen.amax((0, 2) if seen.ndim == 3 else 1) + 1


def text_positions(model: nn.Module, positions: Tensor) -> Tensor:
    """Positions [rows, T] of text tokens in the form the family takes: [3, rows, T] for multimodal rope."""
    multimodal = hasattr(base_model(model).model, "get_rope_index")
    return positions.expand(3, -1, -1) if multimodal else positions
