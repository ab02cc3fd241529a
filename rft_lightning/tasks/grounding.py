"""Grounding: the one box an instruction refers to."""

from __future__ import annotations

from dataclasses import replace

from rft_lightning.answers import ParsedAnswer, Problem
from rft_lightning.boxes import valid_boxes
from rft_lightning.frames import CoordinateFrame
from rft_lightning.rewards import format_reward, giou_reward
from rft_lightning.sample import Answer, GroundingTarget, Target
from rft_lightning.tasks.base import Reward, Task, read_text
from rft_lightning.tasks.detection import solution_size, with_boxes, with_points


class GroundingTask(Task):
    """Output the box of the instance an instruction describes (the LISA prompt of the published code).

    The published wording has two slips ("grouding", a stray bracket); they are kept because released checkpoints were
    trained on them. `template` may use {expression}.
    """

    name = "grounding"
    default_template = (
        "Output the bounding box in the image corresponding to the instruction: {expression}"
        " Output the thinking process in <think> </think> and your grouding box. "
        'Following "<think> thinking process </think>\n<answer>(x1,y1),(x2,y2)</answer>)" format.'
    )

    def default_rewards(self) -> dict[str, Reward]:
        return {"format": format_reward, "giou": giou_reward}

    def question(self, target: Target | None, frame: CoordinateFrame) -> str:
        expression = target.expression if isinstance(target, GroundingTarget) else "the main object"
        return self.template.format(expression=expression)

    def solution(self, target: GroundingTarget, frame: CoordinateFrame) -> str:
        x1, y1, x2, y2 = frame.from_pixels(target.boxes[:1], solution_size(target))[0].tolist()
        return f"<answer>({x1},{y1}),({x2},{y2})</answer>"

    def thought(self, target: GroundingTarget) -> str:
        return f"I look for {target.expression}."

    def read(self, text: str, frame: CoordinateFrame, image_size: tuple[int, int]) -> Answer:
        """The first box that is written, and the points; a box that is inverted or leaves the frame is no answer."""
        answer, parsed = read_text(text)
        answer = with_points(answer, parsed, frame, image_size)
        first = replace(parsed, boxes=parsed.boxes[:1], confidences=parsed.confidences[:1])
        problem = _problem(first, frame, image_size)
        if problem is not None:
            answer.problems += (problem,)
            return answer
        answer = with_boxes(answer, first, frame, image_size)
        answer.parsed = len(answer.boxes) > 0 or len(answer.points) > 0
        return answer


def _problem(parsed: ParsedAnswer, frame: CoordinateFrame, image_size: tuple[int, int]) -> Problem | None:
    """What makes the one box useless, if anything does."""
    if not bool(frame.inside(parsed.boxes, image_size).all()):
        return Problem("box_outside_frame", f"box {parsed.boxes[0]} leaves the frame, dropped")
    if not bool(valid_boxes(frame.to_pixels(parsed.boxes, image_size)).all()):
        return Problem("box_without_area", f"box {parsed.boxes[0]} has x1 >= x2 or y1 >= y2, dropped")
    return None
