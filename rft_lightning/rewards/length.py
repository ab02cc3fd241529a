"""Rewards that depend on the number of tokens: the penalty near the limit, and short answers before long ones.

The paper and the published code have neither: all three rule sets compute the same.
"""

from __future__ import annotations

import math

from rft_lightning.errors import ConfigConflictError
from rft_lightning.rewards.accuracy import accuracy_reward
from rft_lightning.rewards.curriculum import Threshold, threshold_at
from rft_lightning.rewards.detection import detection_iou_reward
from rft_lightning.rewards.grounding import grounding_iou_reward
from rft_lightning.rewards.options import check_ascending, check_count, check_rules
from rft_lightning.sample import Answer, Target


def overlong_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    soft_punish_cache: int | None = None,
    max_completion_length: int | None = None,
) -> float | None:
    """0, falling in a line to -1 over the last tokens before the limit. Applies to every kind of target.

    Source: DAPO (arXiv 2503.14476), Eq. 13.

    Args:
        answer: the completion as read; its `num_tokens` and, unless `max_completion_length` is given, `token_limit`.
        target: not read.
        rules: strict, paper or published_code; not read further, see the module.
        step: not read.
        soft_punish_cache: tokens over which it falls, at most the limit; None: a fifth of the limit, which is DAPO's
            share (4096 of 20480).
        max_completion_length: the limit in tokens; None: the limit that the completion had.

    Returns:
        A number in [-1, 0]; None where the length or the limit is not known.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules, or an option out of range.
    """
    check_rules(rules)
    limit = _limit(answer, max_completion_length)
    if soft_punish_cache is not None:
        check_count("soft_punish_cache", soft_punish_cache)
    if answer.num_tokens is None or limit is None:
        return None
    cache = soft_punish_cache or max(1, limit // 5)
    if cache > limit:
        raise ConfigConflictError(
            f"Expected soft_punish_cache to be at most the limit of {limit} tokens, found {cache}; lower it."
        )
    return max(-1.0, min(0, limit - cache - answer.num_tokens) / cache)


def cosine_length_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    threshold: Threshold = 0.5,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_completion_length: int | None = None,
) -> float | None:
    """A right answer earns more when it is short, a wrong one is punished less when it is long.

    low + (high - low) * (1 + cos(pi * length / limit)) / 2 from `max_value_correct` down to `min_value_correct` for a
    right answer, and from `min_value_wrong` up to `max_value_wrong` for a wrong one. Source: arXiv 2502.03373, Appendix
    C.1. Right is what the strict accuracy of the target's kind says: :func:`accuracy_reward`,
    :func:`detection_iou_reward` or :func:`grounding_iou_reward` is more than 0 and at least `threshold`.

    Args:
        answer: the completion as read; its `num_tokens` and, unless `max_completion_length` is given, `token_limit`.
        target: the right answer.
        rules: strict, paper or published_code; not read further, see the module.
        step: the optimiser step, for a threshold that changes.
        threshold: accuracy from which an answer is right, in [0, 1], or {first step: threshold}.
        min_value_wrong: a wrong answer of length 0.
        max_value_wrong: a wrong answer at the limit.
        min_value_correct: a right answer at the limit.
        max_value_correct: a right answer of length 0; the four values ascend in this order.
        max_completion_length: the limit in tokens; None: the limit that the completion had.

    Returns:
        A number in [min_value_wrong, max_value_correct]; None where the length or the limit is not known, and without
        a target.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules, or an option out of range.
    """
    check_rules(rules)
    check_ascending(
        min_value_wrong=min_value_wrong,
        max_value_wrong=max_value_wrong,
        min_value_correct=min_value_correct,
        max_value_correct=max_value_correct,
    )
    threshold_now = threshold_at(threshold, step, closed=True)
    limit = _limit(answer, max_completion_length)
    accuracy = _accuracy(answer, target)
    if accuracy is None or answer.num_tokens is None or limit is None:
        return None
    # Past the limit the cosine would turn back.
    long = (1 - math.cos(math.pi * min(1.0, answer.num_tokens / limit))) / 2
    if accuracy > 0 and accuracy >= threshold_now:
        return max_value_correct - (max_value_correct - min_value_correct) * long
    return min_value_wrong + (max_value_wrong - min_value_wrong) * long


def _limit(answer: Answer, max_completion_length: int | None) -> int | None:
    if max_completion_length is not None:
        check_count("max_completion_length", max_completion_length)
        return max_completion_length
    return answer.token_limit


def _accuracy(answer: Answer, target: Target | None) -> float | None:
    values = (reward(answer, target) for reward in (accuracy_reward, detection_iou_reward, grounding_iou_reward))
    return next((value for value in values if value is not None), None)
