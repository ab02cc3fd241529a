"""A decode step with nothing but its arithmetic: the decoder's weights, driven without the model's own forward.

For a few rows of one token the models' forwards do much around the products: masks, wrappers, norms in six operations,
positions in three dimensions that are equal for text. This runs the same layers in fewer operations, which on a CPU is
time and in a CUDA graph is kernels. Only decoders built as the Llama kind is are taken
(:func:`lean_step` looks at their parts), and the first step is compared with the model's own.

Shape legend: n rows, H heads, h key heads, d width of a head, D width of the decoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rft_lightning.policy.families import base_model

# attend(layer, query [n, H, d], key [n, h, d], value [n, h, d], scale) -> [n, H, d]
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION, NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
STATIC_ROPE = {"default", "linear", "yarn", "llama3"}
# Packed copies of weights live beside them for the length of a rollout: 1 GiB of them at most.
MOST_PACKED = 2**30


def lean_step(model: Any, rows: int) -> LeanStep | None:
    """A lean decode step of this model, or None where its decoder is of another kind or somebody listens to it.

    Args:
        model: the policy in eval mode; its weights must not change as long as the step is used.
        rows: rows of a step, which packed weights are made for.
    """
    base = base_model(model)
    decoder = base.model.language_model
    rope = getattr(decoder, "rotary_emb", None)
    layers = list(getattr(decoder, "layers", ()))
    if not layers or not all(map(_is_known, layers)) or getattr(rope, "rope_type", None) not in STATIC_ROPE:
        return None
    around = [base, base.model, base.get_output_embeddings(), decoder, decoder.norm, rope]
    watched = [*around, *(module for layer in layers for module in layer.modules())]
    if any(map(_has_listeners, watched)) or any(isinstance(p, DTensor) for p in decoder.parameters()):
        return None
    return LeanStep(base, layers, rows, kind=tuple(type(module) for module in watched))


def _is_known(layer: Any) -> bool:
    """Whether a layer is norm, attention with rotary positions, norm and gated MLP, and nothing besides."""

    def parts(module: Any) -> set[str]:
        return {name for name, _ in module.named_children()}

    return (
        parts(layer) == LAYER
        and parts(layer.self_attn) - NORMS == ATTENTION
        and parts(layer.mlp) == MLP
        and getattr(layer.self_attn, "sliding_window", None) is None
        and all(hasattr(norm, "variance_epsilon") for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    )


def _has_listeners(module: nn.Module) -> bool:
    """Whether somebody waits for calls of the module, or has put another forward in its place.

    FSDP2 waits with one hook of each kind, to gather weights, which they are.
    """
    if "forward" in vars(module):
        return True
    own = int(isinstance(module, FSDPModule))
    return len(module._forward_hooks) > own or len(module._forward_pre_hooks) > own


class LeanStep:
    """Logits of the next token of each row. See :func:`lean_step`.

    Attributes:
        kind: the classes of all modules that take part.
    """

    def __init__(self, base: Any, layers: Sequence[Any], rows: int, *, kind: tuple[type, ...] = ()) -> None:
        self.kind = kind
        decoder = base.model.language_model
        weights = sum(p.nbytes for p in decoder.parameters())
        packs = torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu") and weights <= MOST_PACKED
        self.pack = rows if packs else 0
        self.embed, self.norm = decoder.embed_tokens, decoder.norm
        self.head = fused([base.get_output_embeddings()], self.pack)
        self.inv_freq, self.rope_scale = decoder.rotary_emb.inv_freq, decoder.rotary_emb.attention_scaling
        self.blocks = [_Block(layer, self.pack) for layer in layers]

    def __call__(self, tokens_n: Tensor, positions_n: Tensor, attend: Attend) -> Tensor:
        """Logits [n, V].

        Args:
            tokens_n: the last token of each row.
            positions_n: its rope position.
            attend: stores the token's key and value and computes attention.
        """
        hidden_nD = self.embed(tokens_n)
        angles = positions_n[:, None, None].float() * self.inv_freq.float()
        cos, sin = (
            (trigonometry(angles) * self.rope_scale).to(hidden_nD.dtype) for trigonometry in (torch.cos, torch.sin)
        )
        for number, block in enumerate(self.blocks):
            hidden_nD = block(number, hidden_nD, cos, sin, attend)
        return self.head(_rms_norm(hidden_nD, self.norm))[0]


class _Block:
    """One decoder layer."""

    def __init__(self, layer: Any, pack: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.width, self.scale = attention.head_dim, attention.scaling
        self.first_norm, self.second_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.qkv = fused([attention.q_proj, attention.k_proj, attention.v_proj], pack)
        self.out = fused([attention.o_proj], pack)
        self.gate_up, self.down, self.act = (
            fused([mlp.gate_proj, mlp.up_proj], pack),
            fused([mlp.down_proj], pack),
            mlp.act_fn,
        )

    def __call__(self, number: int, hidden_nD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (x.unflatten(1, (-1, self.width)) for x in self.qkv(_rms_norm(hidden_nD, self.first_norm)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _rms_norm(q, self.q_norm), _rms_norm(k, self.k_norm)
        q, k = _rotated(torch.cat([q, k], 1), cos, sin).split((q.shape[1], k.shape[1]), 1)
        mixed = attend(number, q, k, v, self.scale)
        hidden_nD = hidden_nD + self.out(mixed.flatten(1))[0]
        gate, up = self.gate_up(_rms_norm(hidden_nD, self.second_norm))
        return hidden_nD + self.down(self.act(gate) * up)[0]


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[n, heads, d] turned by the angles [n, 1, d/2]; the two halves of a head are the coordinates."""
    first, second = x.chunk(2, -1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, -1)


def fused(layers: Sequence[nn.Module], pack: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """Several linear layers of one input: what each gives.

    On a CPU the kernel behind ``nn.Linear`` packs a weight in every call, which for a few rows takes longer than the
    product. oneDNN can keep the packed form, as torch's own compiler lets it; so can then all layers be one product.
    Adapted layers, and any on other devices or in other dtypes, are called as they are.

    Args:
        layers: linear layers, or what stands in their place.
        pack: rows to pack for; 0 leaves weights alone.
    """
    linears = [layer for layer in layers if type(layer) is nn.Linear]
    packable = (
        pack
        and len(linears) == len(layers)
        and all(
            type(layer.weight) is nn.Parameter
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype == torch.float32
            for layer in linears
        )
    )
    if not packable:
        return lambda x: [layer(x) for layer in layers]
    sizes = [layer.out_features for layer in linears]
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat([layer.weight.detach() for layer in linears]), pack)
    bias = None
    if any(layer.bias is not None for layer in linears):
        biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in linears]
        bias = torch.cat([bias.detach() for bias in biases])
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "").split(sizes, -1)
