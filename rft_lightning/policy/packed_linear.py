"""Linear layers for decoding on a CPU, their weights packed once per rollout.

A decode step multiplies a few rows with every weight. The kernel behind ``nn.Linear`` packs a weight in each call,
which for so few rows takes longer than the product; oneDNN can keep the packed form, as torch's own compiler lets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Packed copies live beside the weights for the length of a rollout: 1 GiB of them at most.
MOST_BYTES = 2**30


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, without gradients, linear layers of a float32 model on a CPU multiply with packed weights.

    Does nothing for other models, layers of other classes (such as adapted ones), and where torch has no oneDNN.

    Args:
        model: the policy in eval mode; its weights must not change inside.
        rows: rows of a decode step, which the packing is made for.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _packable(module.weight)]
    if not torch.backends.mkldnn.is_available() or sum(layer.weight.nbytes for layer in layers) > MOST_BYTES:
        layers = []
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = _Packed(layer, rows)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward


def _packable(weight: Any) -> bool:
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


class _Packed:
    """A linear layer's forward with its weight packed."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
