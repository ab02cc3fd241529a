"""The reward for saying rightly whether a picture shows a category."""

from __future__ import annotations

from rft_lightning.rewards.options import check_rules
from rft_lightning.sample import Answer, PresenceTarget, Target

# What PresenceTask makes of an answer that decides.
YES, NO = "yes", "no"


def presence_reward(
    answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
) -> float | None:
    """1 if the answer says "yes" where the category is in the picture and "no" where it is not, else 0.

    An answer that says neither, or both, is wrong whatever the picture shows: silence is no way to be right about what
    is absent. Neither the paper nor the published code has this reward; it is the same under all rules.

    Args:
        answer: the completion as :class:`rft_lightning.tasks.PresenceTask` read it.
        target: whether the category is there.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        0.0 or 1.0; None where the target is no PresenceTarget.

    Raises:
        ConfigConflictError: unknown rules.
    """
    check_rules(rules)
    if not isinstance(target, PresenceTarget):
        return None
    return float(answer.label == (YES if target.present else NO))
