"""Detection: all boxes of one category, each with a confidence."""

from __future__ import annotations

import torch

from rft_lightning.boxes import valid_boxes
from rft_lightning.frames import CoordinateFrame
from rft_lightning.rewards import detection_confidence_reward, detection_iou_reward, format_reward
from rft_lightning.sample import Answer, DetectionTarget, GroundingTarget, Target
from rft_lightning.tasks.base import Reward, Task, read_text


class DetectionTask(Task):
    """Detect all objects of a category (paper Table 1).

    `template` may use {category} and {range} (the frame's own range in words); other braces are doubled.
    """

    name = "detection"
    default_template = (
        "Detect all objects belonging to the category '{category}' in the image, and provide the bounding boxes "
        "({range}) and confidence (between 0 and 1, with two decimal places).\n"
        "If no object belonging to the category '{category}' in the image, return 'No Objects'.\n"
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
        "The output answer format should be as follows:\n"
        "<think> ... </think> <answer>[{{'Position': [x1, y1, x2, y2], 'Confidence': number}}, ...]</answer>\n"
        "Please strictly follow the format."
    )

    def default_rewards(self) -> dict[str, Reward]:
        return {
            "format": format_reward,
            "iou": detection_iou_reward,
            "confidence": detection_confidence_reward,
        }

    def question(self, target: Target | None, frame: CoordinateFrame) -> str:
        category = target.category if isinstance(target, DetectionTarget) else "object"
        return self.template.format(category=category, range=frame.describe())

    def solution(self, target: DetectionTarget, frame: CoordinateFrame) -> str:
        if len(target.boxes) == 0:
            return "<answer>No Objects</answer>"
        boxes = frame.from_pixels(target.boxes, solution_size(target)).tolist()
        return f"<answer>{[{'Position': box, 'Confidence': 1} for box in boxes]}</answer>"

    def thought(self, target: DetectionTarget) -> str:
        return f"I see {len(target.boxes)} {target.category}."

    def read(self, text: str, frame: CoordinateFrame, image_size: tuple[int, int]) -> Answer:
        answer, boxes, confidences = read_text(text)
        return with_boxes(answer, boxes, confidences, frame, image_size)


def with_boxes(
    answer: Answer,
    boxes: list[list[float]],
    confidences: list[float],
    frame: CoordinateFrame,
    image_size: tuple[int, int],
) -> Answer:
    """Put the boxes as written into `answer`, in pixels, with confidences clamped to [0, 1].

    A box without area stays: dropping it would make a wrong box free.
    """
    answer.boxes = frame.to_pixels(boxes, image_size)
    answer.confidences = torch.tensor(confidences, dtype=torch.float64).clamp(0, 1)
    flat = int((~valid_boxes(answer.boxes)).sum())
    if flat:
        answer.problems += (f"{flat} boxes without area (x1 >= x2 or y1 >= y2)",)
    answer.parsed = len(boxes) > 0 or bool(answer.no_objects)
    return answer


def solution_size(target: DetectionTarget | GroundingTarget) -> tuple[int, int]:
    """The image size, without which boxes cannot be written.

    Raises:
        ValueError: the target has none.
    """
    if target.image_size is None:
        raise ValueError("A solution with boxes needs the image size; set the target's image_size=(width, height).")
    return target.image_size
