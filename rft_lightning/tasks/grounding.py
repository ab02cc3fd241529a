"""Grounding: the one box an instruction refers to."""

from __future__ import annotations

from rft_lightning.boxes import valid_boxes
from rft_lightning.frames import CoordinateFrame
from rft_lightning.rewards import format_reward, giou_reward
from rft_lightning.sample import Answer, GroundingTarget, Target
from rft_lightning.tasks.base import Reward, Task, read_text
from rft_lightning.tasks.detection import solution_size, with_boxes


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
        """The first box that is written; one that is inverted or leaves the frame is no answer."""
        answer, boxes, confidences = read_text(text)
        if not boxes:
            return answer
        first = frame.to_pixels(boxes[:1], image_size)
        if not bool(frame.inside(boxes[:1], image_size)[0]) or not bool(valid_boxes(first)[0]):
            answer.problems += (f"box {boxes[0]} is inverted or leaves the frame",)
            return answer
        return with_boxes(answer, boxes[:1], confidences[:1], frame, image_size)
