"""What a policy has to compute and to read: floating-point operations of groups, bytes of decode steps.

Counted is what group sharing needs, however it is computed: a prompt and its image once per group and pass, every
token but the last of each completion once (the last predicts nothing), the output head where a token is predicted,
pairs of tokens in attention only where one sees the other. No credit for padding, masked pairs, or anything computed
twice (the plain route, gradient checkpointing). A product of matrices takes two operations per weight and row;
embeddings, norms, activations and rotary positions count nothing.

Shape legend: B prompts, G completions per prompt, T decode steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rft_lightning.policy.families import base_model, family_of, part_parameters
from rft_lightning.run_statistics import GroupSizes

UNLIMITED = 2**40


@dataclass(frozen=True)
class Matmuls:
    """The weights of some matrix products.

    Attributes:
        weights: how many.
        trained: how many of them are trained.
        bytes: what they occupy, in the precision they are used in where that is the smaller one.
    """

    weights: int
    trained: int
    bytes: int

    def forward(self, rows: float) -> float:
        """Operations of a forward of so many rows."""
        return 2.0 * self.weights * rows

    def backward(self, rows: float, *, inputs: bool) -> float:
        """Operations of their backward; with the gradient of the inputs where anything before them is trained."""
        return 2.0 * rows * (self.trained + (self.weights if inputs else 0))


@dataclass(frozen=True)
class PolicyCosts:
    """The sizes of a policy that its operations and bytes follow from.

    Attributes:
        patch_embedding: per patch.
        tower: the layers of the vision tower; per patch.
        projector: per `patches_per_token` patches.
        decoder: the layers of the language model; per token.
        head: the output head; per predicted token.
        tower_width: width of the vision tower.
        tower_windows: per layer of the tower, the patches that one sees at most; None for all of its image.
        patches_per_row: patches of a row of ``pixel_values``: 1 where a row is a patch, else those of a tile, which
            see only each other.
        patches_per_token: patches that the projector takes together.
        query_width: query heads times their width.
        key_value_bytes: bytes that one layer keeps of one token.
        windows: per attention layer of the decoder, the tokens that one sees at most; None for all.
    """

    patch_embedding: Matmuls
    tower: Matmuls
    projector: Matmuls
    decoder: Matmuls
    head: Matmuls
    tower_width: int
    tower_windows: tuple[int | None, ...]
    patches_per_row: int
    patches_per_token: float
    query_width: int
    key_value_bytes: int
    windows: tuple[int | None, ...]

    @property
    def vision_is_frozen(self) -> bool:
        """Whether nothing of tower and projector is trained, so that one forward of an image serves all passes."""
        return self.patch_embedding.trained + self.tower.trained + self.projector.trained == 0

    def forward(self, sizes: GroupSizes, *, vision: bool = True) -> float:
        """Operations of a forward over groups; of sampling them as well, which computes the same once.

        Args:
            sizes: the groups.
            vision: with the vision tower and the projector.
        """
        tokens, predicted, patches = _rows(sizes, self.patches_per_row)
        operations = self.decoder.forward(tokens) + self.head.forward(predicted) + self._attention(sizes)
        if not vision:
            return operations
        operations += self.patch_embedding.forward(patches) + self.tower.forward(patches)
        return operations + self.projector.forward(patches / self.patches_per_token) + self._tower_attention(sizes)

    def backward(self, sizes: GroupSizes) -> float:
        """Operations of a backward over groups: gradients of what is trained, and of the inputs on the way to it.

        Parts in front of all that is trained have none.
        """
        tokens, predicted, patches = _rows(sizes, self.patches_per_row)
        through_tower = self.tower.trained + self.patch_embedding.trained > 0
        through_decoder = self.decoder.trained > 0 or not self.vision_is_frozen
        operations = self.decoder.backward(tokens, inputs=through_decoder)
        operations += self.head.backward(predicted, inputs=through_decoder)
        operations += self.projector.backward(patches / self.patches_per_token, inputs=through_tower)
        operations += self.tower.backward(patches, inputs=through_tower)
        operations += self.patch_embedding.backward(patches, inputs=False)
        # Four products in backward for the two of forward.
        operations += 2 * self._attention(sizes) if through_decoder else 0
        return operations + (2 * self._tower_attention(sizes) if through_tower else 0)

    def decode_bytes(self, pieces: Sequence[GroupSizes]) -> float:
        """The fewest bytes that decoding reads: the weights once per step, and keys and values of what is seen.

        The cache of a prompt counts once per group and step, that of a completion for its own row. The steps are the
        fewest in which these completions can be written: as many as the longest one needs, and no fewer than all of
        them need with as many rows at once as the largest piece has. The first token of a completion is the prefill's.

        Args:
            pieces: groups that are decoded together.
        """
        if not pieces:
            return 0.0
        rows = max(piece.completions.numel() for piece in pieces)
        steps = [(piece.completions - 1).clamp(min=0) for piece in pieces]
        longest, total = max(int(count.max()) for count in steps), sum(int(count.sum()) for count in steps)
        weights = max(longest, -(-total // rows)) * (self.decoder.bytes + self.head.bytes)
        seen = sum(
            times * sum(_read_tokens(piece, window) for piece in pieces)
            for window, times in Counter(self.windows).items()
        )
        return float(weights + self.key_value_bytes * seen)

    def _attention(self, sizes: GroupSizes) -> float:
        pairs = sum(times * _seen_pairs(sizes, window) for window, times in Counter(self.windows).items())
        return 4.0 * self.query_width * pairs

    def _tower_attention(self, sizes: GroupSizes) -> float:
        if self.patches_per_row > 1:
            spans, times = torch.tensor([self.patches_per_row]), int(sizes.image_rows.sum())
        else:
            spans, times = sizes.image_rows, 1
        layers = (spans * spans.clamp(max=window or UNLIMITED) for window in self.tower_windows)
        return 4.0 * self.tower_width * times * sum(int(pairs.sum()) for pairs in layers)


def policy_costs(model: nn.Module, *, dtype: torch.dtype | None = None) -> PolicyCosts | None:
    """The costs of a policy; None for a family that policy/families.py does not know.

    Args:
        model: a Hugging Face vision-language model, or an adapter around one.
        dtype: what it computes in; the dtype of its weights when None.
    """
    base = base_model(model)
    if family_of(base.config) is None:
        return None
    dtype = base.dtype if dtype is None else dtype
    text, vision = base.config.get_text_config(), base.config.vision_config
    head = base.get_output_embeddings()
    in_head = set(head.modules())
    tower = _products(base, "vision_tower")
    convolutions = [module for module in tower if not isinstance(module, nn.Linear)]
    projector = _products(base, "projector")
    tower_width = convolutions[0].out_channels
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return PolicyCosts(
        patch_embedding=_matmuls(convolutions, dtype),
        tower=_matmuls((module for module in tower if isinstance(module, nn.Linear)), dtype),
        projector=_matmuls(projector, dtype),
        decoder=_matmuls((m for m in _products(base, "language_model") if m not in in_head), dtype),
        head=_matmuls(_active(head), dtype),
        tower_width=tower_width,
        tower_windows=_tower_windows(vision),
        patches_per_row=_patches_per_row(vision),
        patches_per_token=projector[0].in_features / tower_width if projector else 1.0,
        query_width=heads * head_width,
        key_value_bytes=2 * text.num_key_value_heads * head_width * dtype.itemsize,
        windows=_windows(text),
    )


def _products(base: Any, part: str) -> list[Any]:
    """The linear layers and convolutions of a part."""
    names = part_parameters(base, part)
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return [m for name, m in base.named_modules() if isinstance(m, kinds) and f"{name}.weight" in names]


def _active(head: Any) -> list[Any]:
    """The linear layers that a call of the output head runs through: of an adapted one, the adapters too."""
    saved = getattr(head, "modules_to_save", None)
    if saved is not None:  # peft's copy that is trained in place of the original
        return [saved[name] for name in head.active_adapters if name in saved]
    return [module for module in head.modules() if isinstance(module, nn.Linear) and not hasattr(module, "base_layer")]


def _matmuls(modules: Iterable[Any], dtype: torch.dtype) -> Matmuls:
    weights, trained, size = 0, 0, 0
    for module in modules:
        # A quantised weight packs several numbers into one, so a linear layer is asked for its sides.
        linear = isinstance(module, nn.Linear)
        count = module.in_features * module.out_features if linear else module.weight.numel()
        weights += count
        trained += count if module.weight.requires_grad else 0
        size += module.weight.numel() * min(module.weight.element_size(), dtype.itemsize)
    return Matmuls(weights, trained, size)


def _windows(text: Any) -> tuple[int | None, ...]:
    """Layers of linear attention keep a state of constant size: they have no entry."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return tuple(text.sliding_window if kind == "sliding_attention" else None for kind in kinds if "linear" not in kind)


def _tower_windows(vision: Any) -> tuple[int | None, ...]:
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    whole = getattr(vision, "fullatt_block_indexes", None)
    if whole is None:
        return (None,) * layers
    window = (vision.window_size // vision.patch_size) ** 2
    return tuple(None if layer in whole else window for layer in range(layers))


def _patches_per_row(vision: Any) -> int:
    """1 where rows of ``pixel_values`` are patches: those towers take images of any size."""
    if getattr(vision, "image_size", None) is None:
        return 1
    side, patch = (size if isinstance(size, int) else size[0] for size in (vision.image_size, vision.patch_size))
    return (side // patch) ** 2


def _rows(sizes: GroupSizes, patches_per_row: int) -> tuple[int, int, int]:
    """Tokens through the decoder, positions through the head, and patches of groups.

    The first tokens of a group are predicted by one position, the end of its prompt.
    """
    later = int((sizes.completions - 1).clamp(min=0).sum())
    return int(sizes.prompts.sum()) + later, len(sizes) + later, int(sizes.image_rows.sum()) * patches_per_row


def _seen_pairs(sizes: GroupSizes, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included."""
    own = _pairs(torch.zeros_like(sizes.prompts), sizes.prompts, window)
    later = _pairs(sizes.prompts[:, None], (sizes.completions - 1).clamp(min=0), window)
    return int(own.sum() + later.sum())


def _pairs(before: Tensor, count: Tensor, window: int | None) -> Tensor:
    """The sum of min(before + t, window) over t from 1 to `count`."""
    growing = torch.minimum((UNLIMITED if window is None else window) - before, count).clamp(min=0)
    pairs = growing * before + growing * (growing + 1) // 2
    return pairs if window is None else pairs + (count - growing) * window


def _read_tokens(piece: GroupSizes, window: int | None) -> int:
    """Tokens whose keys and values the decode steps of a piece read, those of a prompt once per group and step."""
    limit = UNLIMITED if window is None else window
    steps_BG = (piece.completions - 1).clamp(min=0)
    step_T = torch.arange(1, int(steps_BG.max()) + 1)
    prompt_BT = torch.minimum((limit - step_T).clamp(min=0), piece.prompts[:, None])
    grows_BT = step_T <= steps_BG.amax(1, keepdim=True)
    own_T = step_T.clamp(max=limit) * (step_T <= steps_BG[..., None]).sum((0, 1))
    return int((prompt_BT * grows_BT).sum() + own_T.sum())
