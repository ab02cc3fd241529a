"""The plain route: one row per completion, the prompt and its image repeated in each. The oracle of every faster one.

Shape legend: B prompts, G completions per prompt, N = B*G rows, P prompt tokens, C completion tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rft_lightning.policy.families import position_ids, repeat_prompts
from rft_lightning.policy.logprobs import token_entropies, token_logprobs
from rft_lightning.policy.prompt_inputs import model_inputs
from rft_lightning.sample import TOKEN_TENSORS, PromptBatch


def plain_group_logprobs(
    model: nn.Module,
    prompt: PromptBatch,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of G completions of each of B prompts under the model.

    Args:
        model: the policy or the reference model (a Hugging Face vision-language model).
        prompt: B prompts, left-padded.
        completion_ids: [B, G, C] token ids, right-padded.
        completion_mask: [B, G, C] True on tokens, False on padding.
        temperature: divides the logits; the one the completions were sampled with.
        with_entropy: also return the entropies.
        entropy_gradient: with their gradient.

    Returns:
        log-probs [B, G, C] float32 (meaningless on padding), and entropies [B, G, C] or None.
    """
    groups, group_size, length = completion_ids.shape
    rows = repeat_prompts(prompt, group_size)
    ids_NT = torch.cat([rows.input_ids, completion_ids.flatten(0, 1)], 1)
    mask_NT = torch.cat([rows.attention_mask, completion_mask.flatten(0, 1).to(rows.attention_mask)], 1)
    vision = model_inputs(rows)
    for name in vision.keys() & TOKEN_TENSORS:
        vision[name] = nn.functional.pad(vision[name], (0, length))  # completions are text: 0
    logits_NCV = model(
        input_ids=ids_NT,
        attention_mask=mask_NT,
        position_ids=position_ids(model, ids_NT, mask_NT, vision),
        use_cache=False,
        logits_to_keep=length + 1,
        **vision,
    ).logits[:, :-1]
    flat_ids = completion_ids.flatten(0, 1)
    logp = token_logprobs(logits_NCV, flat_ids, temperature=temperature).view(groups, group_size, length)
    if not with_entropy:
        return logp, None
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = token_entropies(logits_NCV, temperature=temperature).view(groups, group_size, length)
    return logp, entropy
