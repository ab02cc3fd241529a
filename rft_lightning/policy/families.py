"""What differs between model families: the coordinate frame, rope positions and image placeholder tokens.

A family is known by ``config.model_type``, never by the name of a checkpoint folder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.errors import CheckpointError
from rft_lightning.frames import CoordinateFrame

# model_type -> how the family writes boxes. Qwen2.5-VL writes pixels of the image as its processor resized it.
FRAME_KINDS = {"qwen2_vl": "relative", "qwen2_5_vl": "resized", "qwen3_vl": "relative"}


def coordinate_frame(config: Any, processor: Any) -> CoordinateFrame:
    """The frame in which the family of `config` writes boxes, for images resized by `processor`.

    Raises:
        CheckpointError: the family's convention is not known.
    """
    kind = FRAME_KINDS.get(config.model_type)
    if kind is None:
        raise CheckpointError(
            f"It is not known how the family {config.model_type!r} writes boxes (known: {', '.join(FRAME_KINDS)}). "
            "Give the PromptEncoder a `frame`, for example CoordinateFrame('relative', extent=1000)."
        )
    if kind == "relative":
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


def position_ids(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, vision: dict[str, Tensor]
) -> Tensor | None:
    """Rope positions of complete rows [rows, T]: [3, rows, T] for families with multimodal rope, else None.

    Given explicitly because the models otherwise reuse ``rope_deltas`` left over from an earlier ``generate``.
    """
    inner = base_model(model).model
    if not hasattr(inner, "get_rope_index"):
        return None
    positions, _ = inner.get_rope_index(
        input_ids,
        mm_token_type_ids=vision["mm_token_type_ids"],
        image_grid_thw=vision.get("image_grid_thw"),
        attention_mask=attention_mask,
    )
    return positions


def vision_token_ids(config: Any) -> list[int]:
    """Placeholder tokens that the model must never write: a sampled one has no features and breaks the forward."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    ids = {getattr(config, name, None) for name in names}
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
        if name in ("pixel_values", "image_grid_thw"):
            counts = patch_counts if name == "pixel_values" else image_counts
            pieces = tensor.split(counts)
            repeated[name] = torch.cat([piece for piece in pieces for _ in range(times)])
        else:
            repeated[name] = tensor.repeat_interleave(times, 0)
    return repeated
