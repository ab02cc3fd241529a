"""Task: how to ask a question, write the right answer, read a completion and reward it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rft_lightning.answers import parse_answer
from rft_lightning.errors import ConfigConflictError, NonFiniteError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import Answer, Target

RULES = ("strict", "paper", "published_code")
Reward = Callable[..., float | None]


class Task(ABC):
    """Question, solution, reading and rewards of one kind of answer.

    Rewards live here, so that swapping the datamodule swaps prompts and rewards together.

    Args:
        rules: ``strict`` (hardened, default), ``paper`` (the paper's equations) or ``published_code`` (what the
            authors' repository computes, quirks included).
        rewards: name -> reward function ``(answer, target, *, rules, step) -> float | None``; in YAML the import path
            of a function. Replaces the task's own set.
        reward_weights: name -> weight of the rewards in the sum; 1 where not given.
        template: the question, with the placeholders of the task in braces; the paper's wording by default.

    Raises:
        ConfigConflictError: unknown rules, or a weight for a reward that does not exist.
    """

    name: ClassVar[str]
    default_template: ClassVar[str]

    def __init__(
        self,
        *,
        rules: str = "strict",
        rewards: Mapping[str, Callable] | None = None,
        reward_weights: Mapping[str, float] | None = None,
        template: str | None = None,
    ) -> None:
        if rules not in RULES:
            raise ConfigConflictError(f"Expected rules to be one of {', '.join(RULES)}, found {rules!r}.")
        self.rules = rules
        self.rewards = dict(rewards) if rewards is not None else self.default_rewards()
        if not self.rewards:
            raise ConfigConflictError(f"{type(self).__name__} has no rewards; leave `rewards` out for the default set.")
        unknown = set(reward_weights or {}) - set(self.rewards)
        if unknown:
            raise ConfigConflictError(
                f"reward_weights names {sorted(unknown)}, but the rewards are {sorted(self.rewards)}."
            )
        self.reward_weights = {name: float((reward_weights or {}).get(name, 1.0)) for name in self.rewards}
        self.template = template if template is not None else self.default_template

    @abstractmethod
    def default_rewards(self) -> dict[str, Reward]:
        """The paper's rewards of this task."""

    @abstractmethod
    def question(self, target: Target | None, frame: CoordinateFrame) -> str:
        """The text of the user turn."""

    @abstractmethod
    def solution(self, target: Any, frame: CoordinateFrame) -> str:
        """The right answer in its answer tags, as the published data writes it."""

    def thought(self, target: Any) -> str:
        """A minimal thought for supervised examples; the data sets have none."""
        return "I look at the image."

    @abstractmethod
    def read(self, text: str, frame: CoordinateFrame, image_size: tuple[int, int]) -> Answer:
        """A completion as an Answer in pixels of the original image. Never raises on model text."""

    def score(self, answer: Answer, target: Target, *, step: int | None = None, sample_id: str = "?") -> Tensor:
        """Rewards [K] in the order of `rewards`, unweighted; NaN where a reward does not apply (None).

        Raises:
            NonFiniteError: a reward function returned NaN or infinity; names the sample and the function.
        """
        values = []
        for name, function in self.rewards.items():
            value = function(answer, target, rules=self.rules, step=step)
            if value is not None and not math.isfinite(value):
                raise NonFiniteError(
                    f"Reward {name!r} returned {value} for sample {sample_id!r} on the completion "
                    f"{answer.text[:200]!r}. A reward must be a finite number, or None where it does not apply."
                )
            values.append(math.nan if value is None else float(value))
        return torch.tensor(values, dtype=torch.float32)


def read_text(text: str) -> tuple[Answer, list[list[float]], list[float]]:
    """The part of reading that all tasks share.

    Returns:
        an Answer without boxes that is not yet called parsed, and the boxes and confidences as written.
    """
    parsed = parse_answer(text)
    answer = Answer(
        text=text,
        label=parsed.label,
        thought=parsed.thought,
        well_formed=parsed.well_formed,
        no_objects=parsed.no_objects,
        answer_blocks=parsed.answer_blocks,
        parsed=False,
        problems=tuple(parsed.problems),
    )
    return answer, parsed.boxes, parsed.confidences
