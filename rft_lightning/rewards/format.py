"""The reward for keeping to the format, and the choice of a rule set that all rewards share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
        ValueError: unknown rules.
    """
    return select_rule(_FORMAT, rules)(answer)


def _strict(answer: Answer) -> float:
    return float(answer.well_formed)


_FORMAT: dict[str, Rule] = {
    "strict": _strict,
    "paper": published.format_reward,
    "published_code": published.format_reward,
}
