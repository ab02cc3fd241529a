"""What every pass over a prompt needs and what is the same in all of them: worked out once per rollout batch.

Rope positions depend on the prompt alone. So do the features of its images where nothing that makes them is trained:
then rollout, reference model and policy share one pass of the vision tower. Within a rollout nothing is trained, so
that several questions about one picture share its features in any case.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.policy.families import base_model, family_of, part_parameters, prompt_positions
from rft_lightning.sample import TOKEN_TENSORS, Features, PromptBatch


def prepared(model: Any, prompts: PromptBatch, at_once: int | None = None, *, share: bool = True) -> PromptBatch:
    """The same prompts with their rope positions, and with the features of their images if those never change.

    Args:
        model: the policy in eval mode.
        prompts: B prompts.
        at_once: pictures that go through the vision tower together; all when None.
        share: see :func:`with_features`.
    """
    if prompts.positions is None:
        prompts = replace(prompts, positions=prompt_positions(model, prompts)[0])
    return with_features(model, prompts, at_once, share=share) if has_fixed_features(model) else prompts


@torch.no_grad()
def with_features(model: Any, prompts: PromptBatch, at_once: int | None = None, *, share: bool = True) -> PromptBatch:
    """The same prompts with the features of their images, as the model's weights are now.

    Args:
        model: the policy in eval mode.
        prompts: B prompts.
        at_once: pictures that go through the vision tower together; all when None.
        share: compute the features of a picture that several prompts show once, for all of them.
    """
    if prompts.features is not None:
        return prompts
    owner = picture_owners(prompts) if share else list(range(len(prompts)))
    first = sorted(set(owner))
    distinct = prompts if len(first) == len(prompts) else prompts.take(first)
    chunks = distinct.chunks(at_once or len(distinct))
    found = dict(zip(first, (each for chunk in chunks for each in image_features(model, chunk)), strict=True))
    return replace(prompts, features=[found[number] for number in owner])


def picture_owners(prompts: PromptBatch) -> list[int]:
    """Of each prompt, the number of the first one with the same picture: the same file, or the same object in memory.

    Not the image id, which is only as good as who gave it. A batch has one encoder, which makes the same of it.
    """
    first: dict[Any, int] = {}
    pictures = [sample.image if isinstance(sample.image, Path) else id(sample.image) for sample in prompts.samples]
    return [first.setdefault(picture, number) for number, picture in enumerate(pictures)]


def shares_pictures(model: Any, prompts: PromptBatch) -> bool:
    """Whether some prompts show the same picture, to a model that takes features in place of it."""
    return family_of(base_model(model).config) is not None and len(set(picture_owners(prompts))) < len(prompts)


def has_fixed_features(model: Any) -> bool:
    """Whether neither the vision tower nor the projector has anything that is trained, adapters included."""
    if family_of(base_model(model).config) is None:
        return False
    parts = [part_parameters(model, part) for part in ("vision_tower", "projector")]
    # Frozen adapters too: the reference model is without them.
    adapted = any(
        f".{place}." in name for part in parts for name in part for place in ("base_layer", "modules_to_save")
    )
    trained = any(parameter.requires_grad for part in parts for parameter in part.values())
    return all(len(part) for part in parts) and not adapted and not trained


def can_keep_graph(model: Any) -> bool:
    """Whether features made in eval mode are those of a training forward, gradients included: nothing drops out."""
    base = base_model(model)
    if family_of(base.config) is None:
        return False
    vision = base.config.vision_config
    rates = [getattr(vision, name, 0.0) for name in ("attention_dropout", "hidden_dropout", "dropout")]
    return not any([*rates, *(module.p for module in model.modules() if isinstance(module, nn.Dropout))])


def image_features(model: Any, prompts: PromptBatch) -> list[Features]:
    """The features of each prompt's images, as the family gives them; with their graph where gradients are on."""
    inputs = {name: tensor for name, tensor in prompts.vision.items() if name not in TOKEN_TENSORS}
    found = base_model(model).get_image_features(**inputs, return_dict=True)
    pooled = found.pooler_output
    # One entry per image, or one row per row of pixel_values (tiles).
    counts = prompts.patch_counts if isinstance(pooled, Tensor) else prompts.image_counts
    deep = getattr(found, "deepstack_features", None) or []
    features, start = [], 0
    for count in counts:
        part = slice(start, start + count)
        features.append(Features(pooled[part], [layer[part] for layer in deep]))
        start += count
    return features


def model_inputs(prompts: PromptBatch) -> dict[str, Any]:
    """What a forward takes beside token ids, mask and positions: pictures, or the features made of them."""
    if prompts.features is None:
        return dict(prompts.vision)
    inputs: dict[str, Any] = {name: tensor for name, tensor in prompts.vision.items() if name != "pixel_values"}
    pooled: Any = [features.pooled for features in prompts.features]
    output = SimpleNamespace(
        pooler_output=torch.cat(pooled) if isinstance(pooled[0], Tensor) else _joined(pooled),
        deepstack_features=[
            _joined(level) for level in zip(*(features.deep for features in prompts.features), strict=True)
        ],
    )
    return {**inputs, "mm_encoder_outputs": {"image": output}}


def _joined(parts: Any) -> tuple[Tensor, ...]:
    return tuple(image for part in parts for image in part)
