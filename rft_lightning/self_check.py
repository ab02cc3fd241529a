"""The start-up self-check: does a shared-prefix layout give the plain route's log-probs and gradients on tiny groups?

A wrong layout raises nothing: a mask that a kernel ignores, a recurrence that runs through other completions or a
second mask left out change the numbers alone. The table in families.py says what should be exact; this says what is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.families import PACKED, base_model
from rft_lightning.policy.loading import evaluating
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.shared_prefix import (
    PLAIN,
    choose_layout,
    group_logprobs,
    never_share_keys,
    possible_layouts,
    shares_keys,
)
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import PromptBatch, Sample
from rft_lightning.tasks import ClassificationTask

# |Difference| of log-probs, averaged over a completion. Exact layouts differ by 1e-6 in float32. In bfloat16 they
# differ about as much as the plain route does from its own float32 result, by 0.02 to 0.06; wrong ones by tenths.
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-4, 0.1
# Relative difference of gradients: 1e-6 in float32 and 0.03 in bfloat16 where they are exact.
GRADIENT_TOLERANCE, LOW_PRECISION_GRADIENT_TOLERANCE = 1e-3, 0.2


def probe(encoder: PromptEncoder) -> tuple[PromptBatch, Tensor, Tensor]:
    """Two unequal prompts about a small picture, unequal completions [2, 3, C] of their last tokens, and their mask."""
    side = 64
    pixels = torch.arange(side * side * 3, dtype=torch.int64).mul_(2654435761).remainder_(251).to(torch.uint8)
    image = Image.fromarray(pixels.view(side, side, 3).numpy())
    questions = "What is this?", "Which of the things that you know is it?"
    prompt = encoder(
        [Sample("self-check", image, None, ClassificationTask(), (side, side), question=text) for text in questions]
    )
    last = prompt.input_ids[0, -6:]
    mask = torch.arange(6) < torch.tensor([[[6], [3], [5]], [[2], [6], [4]]])
    return prompt, torch.stack([last, last.flip(0), last.roll(2)]).expand(2, -1, -1), mask


@torch.no_grad()
def layout_error(
    model: Any, encoder: PromptEncoder, layout: str, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """How far the log-probs of a layout are from the plain route's, in nats, averaged over the worst completion.

    Args:
        model: the policy; in eval mode during the check.
        encoder: encodes the prompt.
        layout: ``prefix_cache`` or ``packed``.
        device: where the model is.

    Returns:
        the error, and how far the plain route is from itself when each completion is computed alone: by rounding.

    Raises:
        ConfigConflictError: the layout is not in the family's list, or cannot be used with the model as it is set up.
    """
    prompt, ids, mask = probe(encoder)
    prompt, ids, mask = prompt.to(device), ids.to(device), mask.to(device)
    with evaluating(model):
        shared = group_logprobs(model, prompt, ids, mask, forward=layout)
        plain, _ = plain_group_logprobs(model, prompt, ids, mask)
        alone = [plain_group_logprobs(model, prompt, ids[:, [g]], mask[:, [g]])[0] for g in range(ids.shape[1])]
    return _worst(shared, plain, mask), _worst(torch.cat(alone, 1), plain, mask)


def gradient_error(model: Any, encoder: PromptEncoder, layout: str, device: torch.device | str = "cpu") -> float | None:
    """The relative difference of a gradient of a layout from the plain route's; None where there is none to compare.

    That of the smallest trained tensors of the decoder's first layer, or else of the model: everything behind them has
    a part in it, and no other gradient is kept. Sharded models are left out.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    first = [name for name in names if ".layers.0." in name and "language_model" in name] or names
    parameters = dict(model.named_parameters())
    chosen = sorted((parameters[name] for name in first), key=lambda p: p.numel())[:2]
    if not chosen or any(isinstance(module, FSDPModule) for module in model.modules()):
        return None
    prompt, ids, mask = probe(encoder)
    prompt, ids, mask = prompt.to(device), ids.to(device), mask.to(device)
    weights = torch.linspace(-1, 1, ids.numel(), device=device).view_as(ids) * mask
    gradients = []
    with evaluating(model), torch.enable_grad():
        for run in (partial(group_logprobs, forward=layout), lambda *inputs: plain_group_logprobs(*inputs)[0]):
            found = torch.autograd.grad((run(model, prompt, ids, mask) * weights).sum(), chosen, allow_unused=True)
            gradients.append(torch.cat([g.flatten().float() for g in found if g is not None] or [weights.new_zeros(1)]))
    shared, plain = gradients
    return float((shared - plain).norm() / plain.norm()) if float(plain.norm()) > 0 else None


def _worst(found_BGC: Tensor, expected_BGC: Tensor, mask_BGC: Tensor) -> float:
    """The mean |difference| of the completion where it is largest: a wrong layout may spare the first one."""
    difference_BGC = (found_BGC - expected_BGC).abs().masked_fill(~mask_BGC, 0)
    return float((difference_BGC.sum(-1) / mask_BGC.sum(-1)).max())


def tolerance(model: Any, rounding: float, *, mixed: bool = False) -> float:
    """The largest error of an exact layout.

    Args:
        model: its dtype decides.
        rounding: the second number of :func:`layout_error`.
        mixed: whether the forward computed in a lower precision than the weights have.
    """
    return TOLERANCE if _is_full(model, mixed) else max(LOW_PRECISION_TOLERANCE, 4 * rounding)


def _is_full(model: Any, mixed: bool) -> bool:
    return model.dtype == torch.float32 and not mixed and torch.get_float32_matmul_precision() == "highest"


def settle_layout(
    model: Any, forward: str, encoder: PromptEncoder, *, device: torch.device | str = "cpu", mixed: bool = False
) -> str:
    """The layout that `forward` means for this model, after comparing it with the plain route.

    Says what was chosen and why. With ``auto``, a layout for which the comparison fails (or a kernel of which refuses)
    is passed over with a warning. See :func:`layout_error` and :func:`tolerance` for the other arguments.

    Raises:
        ConfigConflictError: a layout was asked for that is not exact.
    """
    asked = choose_layout(model, forward)
    if forward == PLAIN:
        return PLAIN
    for layout in possible_layouts(model) if forward == "auto" else [asked]:
        failure = _failure(model, encoder, layout, device, mixed)
        if failure is None:
            return layout
        if forward != "auto":
            raise ConfigConflictError(f"forward: {failure}. Use model.forward: auto or plain.")
        rank_zero_warn(f"forward: {failure}, so that layout is not used.")
        if layout == PACKED and shares_keys(model):  # nor is its attention in rollouts; a dense mask may still do
            never_share_keys(model)
            return settle_layout(model, forward, encoder, device=device, mixed=mixed)
    config = base_model(model).config
    rank_zero_info(
        f"forward: plain. No shared-prefix layout is known to be exact for {config.model_type} with "
        f"{config._attn_implementation} attention, so prompts are computed once per completion."
    )
    return PLAIN


def _failure(model: Any, encoder: PromptEncoder, layout: str, device: torch.device | str, mixed: bool) -> str | None:
    """What is wrong with a layout; None, and a message, if nothing is."""
    try:
        error, rounding = layout_error(model, encoder, layout, device)
        gradient = gradient_error(model, encoder, layout, device)
    except RuntimeError as refusal:
        return f"{layout} cannot be computed on this machine ({str(refusal).splitlines()[0]})"
    if error > tolerance(model, rounding, mixed=mixed):
        return f"{layout} gives other log-probs than the plain route (by {error:.2g} nats on average)"
    limit = GRADIENT_TOLERANCE if _is_full(model, mixed) else LOW_PRECISION_GRADIENT_TOLERANCE
    if gradient is not None and not gradient <= limit:
        return f"{layout} gives other gradients than the plain route (relative difference {gradient:.2g})"
    rank_zero_info(f"forward: {layout}; its log-probs differ from the plain route's by {error:.0e} on average.")
    return None
