"""Presence: whether a picture shows a category, asked before boxes are."""

from __future__ import annotations

import re

from rft_lightning.answers import Problem
from rft_lightning.frames import CoordinateFrame
from rft_lightning.rewards.presence import NO, YES, presence_reward
from rft_lightning.sample import Answer, DetectionTarget, PresenceTarget, Target
from rft_lightning.tasks.base import Reward, Task, read_text

# Whole words, also between the underscores of Markdown. (A pattern that ignores case finds a long s in "yes".)
_DECISION = re.compile(r"(?<![^\W_])(?:[yY][eE][sS]|[nN][oO])(?![^\W_])")


class PresenceTask(Task):
    """Say whether the picture shows a category: the first stage of the paper's detection protocol.

    The paper asks for boxes of those categories alone which a policy says are in the picture; how it was asked was
    never published, so the question is ours. It asks for one word, which a policy answers as it comes; one that thinks
    and puts its answer into tags is read as well. The default reward is :func:`rft_lightning.rewards.presence_reward`;
    the format reward would contradict the question.

    `template` may use {category}: the name with its underscores as spaces, since LVIS writes "kitchen_table" for what
    people call a kitchen table.
    """

    name = "presence"
    default_template = (
        "Does this image show at least one object of the category '{category}'? Answer with one word: yes or no."
    )

    def default_rewards(self) -> dict[str, Reward]:
        return {"presence": presence_reward}

    def question(self, target: Target | None, frame: CoordinateFrame) -> str:
        category = target.category if isinstance(target, PresenceTarget | DetectionTarget) else "object"
        return self.template.format(category=_words(category))

    def solution(self, target: PresenceTarget, frame: CoordinateFrame) -> str:
        return f"<answer>{YES if target.present else NO}</answer>"

    def thought(self, target: PresenceTarget) -> str:
        return f"I look for {_words(target.category)}."

    def read(self, text: str, frame: CoordinateFrame, image_size: tuple[int, int]) -> Answer:
        """The decision as `label`: "yes" if that word stands in the answer and "no" does not, and the other way round.

        Case, punctuation and further words do not count, thoughts are not looked at, and an answer without tags is no
        problem. Neither word, both, or several answer blocks are no decision: `label` is None, `parsed` False, and the
        category counts as absent, so that the second stage does not ask for it.
        """
        answer, _ = read_text(text)
        said = {word.lower() for word in _DECISION.findall(answer.label or "")}
        answer.parsed = len(said) == 1 and answer.answer_blocks <= 1
        kept = [problem for problem in answer.problems if getattr(problem, "kind", "") != "no_answer_block"]
        if len(said) != 1:
            kept.append(Problem("no_decision", "both yes and no" if said else "neither yes nor no"))
        answer.problems = tuple(kept)
        answer.label = said.pop() if answer.parsed else None
        answer.no_objects = answer.label == NO
        return answer

    def target(self, found: DetectionTarget) -> PresenceTarget:
        """What is right to say where these objects are annotated; a crowd is there, too."""
        assert found.ignore_boxes is not None
        return PresenceTarget(
            present=len(found.boxes) + len(found.ignore_boxes) > 0,
            category=found.category,
            category_id=found.category_id,
            image_size=found.image_size,
        )


def _words(category: str) -> str:
    return category.replace("_", " ")
