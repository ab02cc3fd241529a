"""The reward for naming the right class."""

from __future__ import annotations

import re
import unicodedata

from rft_lightning.rewards import published
from rft_lightning.rewards.format import Rule, select_rule
from rft_lightning.sample import Answer, ClassTarget, Target

# Spaces, underscores and the hyphens and dashes people type are one separator: data sets and models differ in them.
_SEPARATORS = re.compile(r"[\s_\-\u2010-\u2015\u2212]+")
_PARTS_OF_NAMES = "+#%"


def accuracy_reward(
    answer: Answer, target: Target | None, *, rules: str = "strict", step: int | None = None
) -> float | None:
    """1 if the answer names the class, else 0.

    - ``strict``: the answer equals the label or an alias once both are normalised (case, separators and punctuation at
      the ends do not count). An empty answer, and an answer in several blocks, is wrong.
    - ``paper``: the same equality with the label alone: 1 if correct, 0 if not.
    - ``published_code``: one contains the other; see :func:`rft_lightning.rewards.published.accuracy_reward`.

    Args:
        answer: the completion as read.
        target: the class.
        rules: strict, paper or published_code.
        step: not read.

    Returns:
        0.0 or 1.0; None where the target is no ClassTarget.

    Raises:
        ValueError: unknown rules, or ``published_code`` without `target.solution_text`.
    """
    rule = select_rule(_ACCURACY, rules)
    return rule(answer, target) if isinstance(target, ClassTarget) else None


def normalise_label(label: str) -> str:
    """A class name in lower case, separators as one space, without punctuation at its ends.

    Signs that are part of names (C++, C#, 100%) stay, and so does a name of nothing but punctuation.
    """
    # Names of folders may come with decomposed accents, models write composed ones.
    words = _SEPARATORS.sub(" ", unicodedata.normalize("NFC", label).lower())
    # A pattern for "punctuation up to the end" would take quadratic time on a long run of it.
    ends = "".join({character for character in words if not character.isalnum() and character not in _PARTS_OF_NAMES})
    return words.strip(ends) or words.strip()


def _strict(answer: Answer, target: ClassTarget) -> float:
    if answer.answer_blocks > 1:
        return 0.0
    return _equals_one_of(answer, (target.label, *target.aliases))


def _paper(answer: Answer, target: ClassTarget) -> float:
    return _equals_one_of(answer, (target.label,))


def _equals_one_of(answer: Answer, names: tuple[str, ...]) -> float:
    said = normalise_label(answer.label or "")
    return float(bool(said) and said in {normalise_label(name) for name in names})


_ACCURACY: dict[str, Rule] = {"strict": _strict, "paper": _paper, "published_code": published.accuracy_reward}
