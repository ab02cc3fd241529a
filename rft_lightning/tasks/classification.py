"""Classification: name the one class of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rft_lightning.frames import CoordinateFrame
from rft_lightning.rewards import accuracy_reward, format_reward
from rft_lightning.sample import Answer, ClassTarget, Target
from rft_lightning.tasks.base import Reward, Task, read_text

_TAIL = (
    "\nOutput the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "The output answer format should be as follows:\n"
    "<think> ... </think> <answer>species name</answer>\nPlease strictly follow the format."
)


class ClassificationTask(Task):
    """Name the class (paper Table 1 and Fig. 4).

    Args:
        subject: what the picture contains, in the words of the question ("an aircraft", "a plant", "a pet", "a car").
        noun: what is asked for ("the model of the aircraft", "the species of the plant").
        choices: class names listed in the question; None asks an open question, as the paper does.
        **kwargs: see :class:`Task`; `template` may use {subject}, {noun} and {choices}.
    """

    name = "classification"
    default_template = (
        "This is an image containing {subject}. Please identify {noun} based on the image.{choices}" + _TAIL
    )

    def __init__(
        self,
        *,
        subject: str = "an object",
        noun: str = "the class of the object",
        choices: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.subject, self.noun = subject, noun
        self.choices = list(choices) if choices is not None else None

    def default_rewards(self) -> dict[str, Reward]:
        return {"format": format_reward, "accuracy": accuracy_reward}

    def question(self, target: Target | None, frame: CoordinateFrame) -> str:
        choices = "" if self.choices is None else f"\nChoose one of: {', '.join(self.choices)}."
        return self.template.format(subject=self.subject, noun=self.noun, choices=choices)

    def solution(self, target: ClassTarget, frame: CoordinateFrame) -> str:
        return f"<answer>{target.label}</answer>"

    def thought(self, target: ClassTarget) -> str:
        return f"This looks like {target.label}."

    def read(self, text: str, frame: CoordinateFrame, image_size: tuple[int, int]) -> Answer:
        """The label; parsed if it stands in the one answer block and that block is closed, so that none is cut off."""
        answer, parsed = read_text(text)
        closed = all(problem.kind != "answer_not_closed" for problem in parsed.problems)
        answer.parsed = answer.label is not None and answer.answer_blocks == 1 and closed
        return answer
