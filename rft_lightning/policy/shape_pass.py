"""What a forward keeps for backward, found by a forward that computes shapes only: no weights, no memory, no device.

Tensors are fake ones of the CPU: they have shapes and dtypes and go through the model's own code, its attention, its
gradient checkpointing and autocast. Other devices' kernels may keep a little more or less.

Shape legend: B prompts, G completions per prompt, P prompt tokens, C completion tokens, T tokens of a row, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from rft_lightning.flops import policy_costs
from rft_lightning.policy.families import FAMILIES, PACKED, PREFIX_CACHE, base_model, text_positions
from rft_lightning.policy.group_attention import PackedGroups, as_mask, install
from rft_lightning.policy.group_row import GroupRow
from rft_lightning.policy.loading import enable_checkpointing
from rft_lightning.policy.shared_prefix import PLAIN, choose_layout, shares_keys


@dataclass(frozen=True)
class Saved:
    """Bytes that a micro-batch keeps for backward.

    Attributes:
        kept: all of them, under gradient checkpointing the inputs of the blocks.
        block: what backward needs beside them for the block at hand: about as much for its gradients as its forward
            kept, and under gradient checkpointing that forward once more.
        per_image: what the forward of one block of the vision tower keeps, of one image.
        per_token: what the forward of one block of the decoder keeps, of one token.
    """

    kept: int
    block: int
    per_image: float
    per_token: float


@dataclass(frozen=True)
class Groups:
    """The groups of a micro-batch, all of one size.

    Attributes:
        prompts: B.
        group_size: G.
        prompt_tokens: P.
        image_tokens: tokens of P that are of an image.
        completion_tokens: C.
    """

    prompts: int
    group_size: int
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int

    @property
    def rows(self) -> int:
        """Completions of all groups."""
        return self.prompts * self.group_size


@contextmanager
def without_memory(model: nn.Module, *, products: torch.dtype | None = None) -> Iterator[FakeTensorMode]:
    """Inside, parameters and buffers of a model are fake tensors on the CPU; afterwards they are what they were.

    Args:
        model: on any device, the meta device too.
        products: dtype to give to floating-point weights of linear layers and convolutions; None for their own.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    kinds, made, restore = (nn.Linear, nn.Conv2d, nn.Conv3d), {}, []
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                restore.append((tensors, name, tensor))
                if id(tensor) not in made:
                    dtype = products if products is not None and isinstance(module, kinds) else tensor.dtype
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = made[id(tensor)]
    try:
        yield mode
    finally:
        for tensors, name, tensor in restore:
            tensors[name] = tensor


def saved_for_backward(
    model: Any, groups: Groups, *, forward: str = "auto", mixed: bool = False, gradient_checkpointing: bool = False
) -> Saved:
    """What the forward of a micro-batch keeps for backward, weights and their copies apart.

    Args:
        model: a policy in training mode, on the meta device or any other; gradient checkpointing is set on it.
        groups: the micro-batch.
        forward: layout of the log-probs, as ``model.forward``.
        mixed: under bfloat16 autocast, whose copies of weights are not counted.
        gradient_checkpointing: recompute activations in backward.
    """
    base = base_model(model)
    with without_memory(model, products=torch.bfloat16 if mixed else None) as mode:
        if gradient_checkpointing:
            enable_checkpointing(model)
        layout = choose_layout(model, forward)
        # The plain route repeats the image, and all of the prompt, for each completion.
        images = groups.rows if layout == PLAIN else groups.prompts
        run = images * groups.prompt_tokens + groups.rows * groups.completion_tokens

        def kept() -> tuple[int, int]:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                return _tower(model, groups, images, mode), _decoder(model, groups, layout, mode)

        tower, decoder = kept()
        total = tower + decoder
        if gradient_checkpointing:
            with _no_checkpointing(base):
                tower, decoder = kept()
        costs = policy_costs(model)
        assert costs is not None
        tower, decoder = tower // len(costs.tower_windows), decoder // base.config.get_text_config().num_hidden_layers
        block = max(tower, decoder) * (2 if gradient_checkpointing else 1)
    text, tokens = base.config.get_text_config(), groups.rows * groups.completion_tokens
    # Of the head, its inputs; on the plain route all logits.
    width = text.vocab_size if layout == PLAIN else text.hidden_size
    size = torch.float32.itemsize if layout == PLAIN else 2 if mixed else base.dtype.itemsize
    return Saved(total + tokens * width * size, block, tower / images, decoder / run)


@contextmanager
def _no_checkpointing(model: nn.Module) -> Iterator[None]:
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _counted(model: nn.Module, run: Any) -> int:
    """Bytes of the memory behind all tensors that `run` saves for backward, parameters apart."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    # Held, so that no two tensors have one address.
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for address, storage in found.items() if address not in own)


def _tower(model: Any, groups: Groups, images: int, mode: FakeTensorMode) -> int:
    """Of the vision tower, with the projector where that is inside it."""
    base, costs = base_model(model), policy_costs(model)
    assert costs is not None
    tower = base.get_submodule(FAMILIES[base.config.model_type].parts["vision_tower"][0])
    convolution = next(module for module in tower.modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
    vision, settings = base.config.vision_config, {}
    if costs.patches_per_row == 1:
        merge = vision.spatial_merge_size
        height = max(1, math.isqrt(groups.image_tokens))
        width = -(-groups.image_tokens // height)
        settings["grid_thw"] = torch.tensor([[1, height * merge, width * merge]] * images)
        shape = [images * height * width * merge**2, convolution.weight[0].numel()]
    else:
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        tiles = -(-int(groups.image_tokens * costs.patches_per_token) // costs.patches_per_row)
        shape = [images * tiles, convolution.in_channels, side, side]
    with mode:
        pixels = torch.empty(shape, dtype=base.dtype)
    return _counted(model, lambda: tower(pixels, **settings))


def _decoder(model: Any, groups: Groups, layout: str, mode: FakeTensorMode) -> int:
    """Of the decoder, from the embedded tokens to the last hidden states."""
    prompt, completion = groups.prompt_tokens, groups.completion_tokens
    if layout == PACKED and shares_keys(model):
        install()
        lengths = [[completion] * groups.group_size] * groups.prompts
        row = GroupRow([prompt] * groups.prompts, lengths, prompt, completion)
        return _rows(model, 1, row.size, mode, as_mask(PackedGroups(row), torch.device("cpu")))
    if layout == PACKED:
        size = prompt + groups.group_size * completion
        return _rows(model, groups.prompts, size, mode, torch.ones(groups.prompts, 1, size, size, dtype=torch.bool))
    if layout == PREFIX_CACHE:
        costs = policy_costs(model, dtype=torch.bfloat16 if torch.is_autocast_enabled("cpu") else None)
        assert costs is not None
        # Keys and values of the prompt, repeated to the rows of its group and joined to theirs.
        joined = groups.rows * (prompt + completion) * costs.key_value_bytes * len(costs.windows)
        return _rows(model, groups.prompts, prompt, mode) + _rows(model, groups.rows, completion, mode) + joined
    assert layout == PLAIN
    return _rows(model, groups.rows, prompt + completion, mode)


def _rows(model: Any, rows: int, tokens: int, mode: FakeTensorMode, mask: Tensor | None = None) -> int:
    base = base_model(model)
    decoder = base.get_submodule(FAMILIES[base.config.model_type].parts["language_model"][0])
    before = [
        base.get_input_embeddings(),
        base.get_submodule(FAMILIES[base.config.model_type].parts["vision_tower"][0]),
    ]
    learns = any(parameter.requires_grad for module in before for parameter in module.parameters())
    with mode:
        embedded = torch.empty(
            rows, tokens, base.config.get_text_config().hidden_size, dtype=base.dtype, requires_grad=learns
        )
    positions = text_positions(model, torch.arange(tokens).expand(rows, -1))
    settings = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    return _counted(model, lambda: decoder(inputs_embeds=embedded, **settings))
