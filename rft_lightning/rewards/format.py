"""The rewards for keeping to the format, and the choice of a rule set that all rewards share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

from rft_lightning.answers import TAGS
from rft_lightning.errors import ConfigConflictError
from rft_lightning.rewards import published
from rft_lightning.sample import Answer, Target

Rule = Callable[..., float]


def select_rule(by_rules: Mapping[str, Rule], rules: str) -> Rule:
    """The function of one rule set.

    Raises:
        ConfigConflictError: (a ValueError) there is no rule set of this name.
    """
    if rules not in by_rules:
        raise ConfigConflictError(f"Expected rules to be one of {', '.join(by_rules)}, found {rules!r}.")
    return by_rules[rules]


def format_reward(answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None) -> float:
    """1 for a thought in its tags followed by an answer in its tags, else 0. Applies to every kind of target.

    - ``strict``: exactly one of each of the four tags, and nothing around the two blocks but whitespace.
    - ``paper`` and ``published_code``: the published pattern (the paper states the tags in words only), which accepts
      repeated blocks and refuses whitespace before or after.

    Args:
        answer: the completion as read.
        target: not read.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        0.0 or 1.0.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules.
    """
    return select_rule(_FORMAT, rules)(answer)


def soft_format_reward(
    answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
) -> float:
    """A quarter for each of the four tags that is in its place: a slope towards the format for a policy far from it.

    In their places are the most tags, each of which occurs exactly once in the text, that stand in the order
    ``<think>``, ``</think>``, ``<answer>``, ``</answer>``. Text around and between is allowed. A repeated tag earns
    nothing, and what is in order without it was so before, so that repetition never pays. The paper and the published
    code have no such reward: all three rule sets compute the same. Applies to every kind of target.

    Args:
        answer: the completion; only its text is read.
        target: not read.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        0.0, 0.25, 0.5, 0.75 or 1.0.

    Raises:
        ConfigConflictError: (a ValueError) unknown rules.
    """
    return select_rule(_SOFT, rules)(answer)


def _strict(answer: Answer) -> float:
    return float(answer.well_formed)


def _soft(answer: Answer) -> float:
    places = [answer.text.find(tag) for tag in TAGS if answer.text.count(tag) == 1]
    chosen = (some for count in range(len(places) + 1) for some in combinations(places, count))
    return max(len(some) for some in chosen if list(some) == sorted(some)) / len(TAGS)


_FORMAT: dict[str, Rule] = {
    "strict": _strict,
    "paper": published.format_reward,
    "published_code": published.format_reward,
}
_SOFT: dict[str, Rule] = dict.fromkeys(_FORMAT, _soft)
