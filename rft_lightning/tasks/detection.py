"""Detection: all boxes of one category, each with a confidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rft_lightning.answers import ParsedAnswer, Problem
from rft_lightning.frames import CoordinateFrame
from rft_lightning.rewards import detection_confidence_reward, detection_iou_reward, format_reward
from rft_lightning.rewards.matching import prepare_scenes
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

    def prepare(self, answers: Sequence[Answer], target: Target) -> None:
        if isinstance(target, DetectionTarget):
            prepare_scenes(answers, target, hardened=self.rules == "strict")

    def read(self, text: str, frame: CoordinateFrame, image_size: tuple[int, int]) -> Answer:
        """All boxes and points that are written; a box without area or outside of the frame stays, as a wrong one."""
        answer, parsed = read_text(text)
        answer = with_points(with_boxes(answer, parsed, frame, image_size), parsed, frame, image_size)
        answer.parsed = len(answer.boxes) > 0 or bool(answer.no_objects)
        return answer


def with_boxes(answer: Answer, parsed: ParsedAnswer, frame: CoordinateFrame, image_size: tuple[int, int]) -> Answer:
    """Put the boxes as written into `answer`, in pixels, with confidences clamped to [0, 1].

    A box without area stays, and so does one outside of the frame: dropping them would make wrong boxes free.
    """
    if not parsed.boxes:
        return answer
    # Of so few numbers, lists and arrays are made and compared in a fraction of the time that tensors take.
    answer.boxes = frame.to_pixels(torch.from_numpy(np.array(parsed.boxes, dtype=np.float64)), image_size)
    answer.confidences = torch.from_numpy(np.minimum(np.maximum(np.array(parsed.confidences, dtype=np.float64), 0), 1))
    width, height = frame.size(image_size)
    wrong = [
        (x1, y1, x2, y2) for x1, y1, x2, y2 in parsed.boxes if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height)
    ]
    flat = sum(not (x1 < x2 and y1 < y2) for x1, y1, x2, y2 in wrong)
    if flat:
        answer.problems += (Problem("box_without_area", f"{flat} boxes without area (x1 >= x2 or y1 >= y2)"),)
    outside = sum(min(box) < 0 or max(box[::2]) > width or max(box[1::2]) > height for box in wrong)
    if outside:
        answer.problems += (Problem("box_outside_frame", f"{outside} boxes leave the frame"),)
    return answer


def with_points(answer: Answer, parsed: ParsedAnswer, frame: CoordinateFrame, image_size: tuple[int, int]) -> Answer:
    """Put the points as written into `answer`, in pixels; one outside of the frame is dropped."""
    if not parsed.points:
        return answer
    corners = [[*point, *point] for point in parsed.points]  # to the frame, a point is a box without extent
    inside = frame.inside(corners, image_size)
    answer.points = frame.to_pixels(corners, image_size)[inside, :2]
    outside = int((~inside).sum())
    if outside:
        answer.problems += (Problem("point_outside_frame", f"{outside} points outside of the frame, dropped"),)
    return answer


def solution_size(target: DetectionTarget | GroundingTarget) -> tuple[int, int]:
    """The image size, without which boxes cannot be written.

    Raises:
        ValueError: the target has none.
    """
    if target.image_size is None:
        raise ValueError("A solution with boxes needs the image size; set the target's image_size=(width, height).")
    return target.image_size
