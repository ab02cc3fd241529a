"""The penalty for saying the same again."""

from __future__ import annotations

import math
import re

from rft_lightning.rewards.options import check_count, check_number, check_rules
from rft_lightning.sample import Answer, Target

# Numbers keep their decimals, so that 0.9 is one word and 10 9 are two. Chinese and Japanese write no blanks, so each
# of their signs is a word; and no word is so long that a loop of one letter could be one.
_SIGNS = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"\d{{1,32}}(?:\.\d{{1,32}})?|[{_SIGNS}]|[^\W\d_{_SIGNS}]{{1,32}}")


def repetition_reward(
    answer: Answer,
    target: Target | None,
    *,
    rules: str = "strict",
    step: int | None = None,
    ngram_size: int = 3,
    max_penalty: float = -1.0,
) -> float:
    """Share of the n-grams of words that occurred before, times the penalty. Applies to every kind of target.

    Source: arXiv 2502.03373, Appendix C.2, over tokens there; here over words and numbers of the text in lower case,
    so that it is the same for every tokenizer. Time is linear in the text. The paper and the published code have no
    such reward: all three rule sets compute the same.

    Entries of boxes with equal confidences share "Confidence 0.9 Position": up to a seventh of their 3-grams. For
    detection an `ngram_size` of 6 spans more than the words that all entries share.

    Args:
        answer: the completion as read; only its text counts.
        target: not read.
        rules: strict, paper or published_code; not read further.
        step: not read.
        ngram_size: words in an n-gram, at least 1.
        max_penalty: what a text that only repeats approaches, finite and <= 0.

    Returns:
        A number in [max_penalty, 0]; 0 for a text of fewer words than an n-gram.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules, or an option out of range.
    """
    check_rules(rules)
    check_count("ngram_size", ngram_size)
    check_number("max_penalty", max_penalty, -math.inf, 0)
    words = _WORD.findall(answer.text.lower())
    ngrams = list(zip(*(words[start:] for start in range(ngram_size)), strict=False))
    if not ngrams:
        return 0.0
    repeated = len(ngrams) - len(set(ngrams))
    return max_penalty * repeated / len(ngrams) if repeated else 0.0
