"""Ways to be paid for nothing: under strict none of them earns, and where the published code pays, it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from rft_lightning.frames import CoordinateFrame
from rft_lightning.rewards import (
    accuracy_reward,
    ap50_reward,
    average_precision_reward,
    completeness_reward,
    detection_confidence_reward,
    detection_iou_reward,
    format_reward,
    giou_reward,
    grounding_iou_reward,
    grounding_iou_squared_reward,
    od_length_reward,
    point_in_box_reward,
    precision_reward,
    recall_reward,
    repetition_reward,
)
from rft_lightning.sample import Answer, ClassTarget, DetectionTarget, GroundingTarget
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask

DETECTION = [
    detection_iou_reward,
    detection_confidence_reward,
    completeness_reward,
    average_precision_reward,
    ap50_reward,
    od_length_reward,
    recall_reward,
    precision_reward,
]
GROUNDING = [grounding_iou_reward, grounding_iou_squared_reward, giou_reward, point_in_box_reward]

# In a frame of 0-1000 on a picture of 1000 x 1000, what is written is the pixel.
FRAME, SIZE = CoordinateFrame(), (1000, 1000)
TRUTH = [100, 200, 300, 400]
CROWD = [[x, y, x + 40, y + 40] for x in range(100, 900, 200) for y in range(150, 900, 200)]


def text(content: str) -> str:
    return f"<think>t</think> <answer>{content}</answer>"


def entries(*rows: tuple[list[int], Any]) -> str:
    parts = [f"{{'Position': {box}, 'Confidence': {confidence}}}" for box, confidence in rows]
    return f"[{', '.join(parts)}]"


def detection(*boxes: list[int]) -> DetectionTarget:
    target = DetectionTarget(list(boxes), image_size=SIZE)
    target.solution_text = DetectionTask().solution(target, FRAME)
    return target


def detected(*rows: tuple[list[int], Any]) -> Answer:
    return DetectionTask().read(text(entries(*rows)), FRAME, SIZE)


def pointed_at(content: str) -> tuple[Answer, GroundingTarget]:
    target = GroundingTarget([200, 200, 800, 800], image_size=SIZE)
    target.solution_text = GroundingTask().solution(target, FRAME)
    return GroundingTask().read(text(content), FRAME, SIZE), target


def named(content: str, label: str) -> tuple[Answer, ClassTarget]:
    target = ClassTarget(label, solution_text=f"<answer>{label}</answer>")
    return ClassificationTask().read(text(content), FRAME, SIZE), target


def published(reward: Callable, answer: Answer, target: Any) -> float:
    return reward(answer, target, rules="published_code")


# ---------------------------------------------------------------- saying nothing, or everything


def test_an_empty_answer():
    answer, target = named("", "rose")
    assert accuracy_reward(answer, target) == 0
    assert published(accuracy_reward, answer, target) == 1
    for blank in (DetectionTask().read("", FRAME, SIZE), DetectionTask().read(text(""), FRAME, SIZE)):
        assert [reward(blank, detection(TRUTH)) for reward in DETECTION] == [0] * len(DETECTION)
        assert [reward(blank, detection()) for reward in DETECTION] == [0] * len(DETECTION)
    answer, target = pointed_at("")
    assert [reward(answer, target) for reward in GROUNDING] == [0] * len(GROUNDING)


@pytest.mark.parametrize("content", ["rose", "tulip or rose or lily", "rose, tulip", "r", "a rose is what I see"])
def test_naming_many_classes_or_a_part_of_one(content: str):
    answer, target = named(content, "rose")
    assert accuracy_reward(answer, target) == (content == "rose")
    assert published(accuracy_reward, answer, target) == 1


def test_a_second_answer_block():
    twice = "<think>t</think><answer>rose</answer><answer>tulip</answer>"
    for label in ("rose", "tulip"):
        answer = ClassificationTask().read(twice, FRAME, SIZE)
        assert accuracy_reward(answer, ClassTarget(label)) == 0
    assert published(accuracy_reward, answer, named("", "rose")[1]) == 1


def test_repeated_tags():
    answer = Answer(text="<think>a</think><answer>b</answer>" * 2)
    assert format_reward(answer, None) == 0
    assert published(format_reward, answer, None) == 1
    # Boxes in a second block count neither as right nor as another try.
    block = f"<answer>{entries(([0, 1, 9, 9], 0.9))}</answer>"
    answer = DetectionTask().read(f"<think>t</think>{block}<answer>{entries((TRUTH, 0.9))}</answer>", FRAME, SIZE)
    assert [reward(answer, detection(TRUTH)) for reward in DETECTION] == [0] * len(DETECTION)


def test_the_same_sentence_over_and_over():
    assert repetition_reward(Answer(text="I see a box. " * 200), None) < -0.99


# ---------------------------------------------------------------- detection


def test_a_wrong_box_that_is_not_meant():
    answer, target = detected(([600, 601, 700, 700], 0.0)), detection(TRUTH)
    assert [reward(answer, target) for reward in DETECTION] == [0] * len(DETECTION)
    assert published(detection_confidence_reward, answer, target) == 1


def test_a_right_box_among_wrong_ones_that_are_not_meant():
    right = [101, 201, 300, 400]
    alone = detected((right, 0.5))
    hedged = detected((right, 0.5), *(([600, 601, 700 + n, 700], 0.0) for n in range(9)))
    target = detection(TRUTH)
    for reward in DETECTION:
        assert reward(hedged, target) <= reward(alone, target), reward
    assert published(detection_confidence_reward, alone, target) == 0.5
    assert published(detection_confidence_reward, hedged, target) == pytest.approx(0.95)


def test_a_wrong_box_with_the_y1_of_the_truth():
    answer, target = detected(([500, TRUTH[1], 900, 900], 0.9)), detection(TRUTH)
    assert [reward(answer, target) for reward in DETECTION] == [0] * len(DETECTION)
    pytest.importorskip("math_verify")
    assert published(detection_iou_reward, answer, target) == 1
    assert published(detection_confidence_reward, answer, target) == 1


def test_a_box_over_the_whole_picture():
    answer, target = detected(([0, 0, 1000, 1000], 1.0)), detection(*CROWD)
    assert [reward(answer, target) for reward in DETECTION] == [0] * len(DETECTION)
    answer, target = pointed_at("(0,0),(1000,1000)")
    # Overlap with a large object is real, and worth no more than it is.
    assert grounding_iou_reward(answer, target) == pytest.approx(0.36)
    assert grounding_iou_squared_reward(answer, target) == pytest.approx(0.36**2)


def test_thousands_of_boxes():
    carpet = [([x, y, x + 40, y + 40], 0.0) for x in range(0, 1000, 20) for y in range(1, 1000, 20)]
    answer, target = detected(*carpet), detection(*CROWD)
    assert len(answer.boxes) == 2500
    assert [reward(answer, target) for reward in DETECTION] == [0] * len(DETECTION)
    assert published(detection_confidence_reward, answer, target) > 0.99


def test_a_carpet_below_the_cap_earns_what_its_share_of_right_boxes_is():
    carpet = [([x, y, x + 40, y + 40], 1.0) for x in range(0, 1000, 100) for y in range(30, 950, 40)]
    answer, target = detected(*carpet), detection(*CROWD)
    share = 16 / len(answer.boxes)
    assert recall_reward(answer, target) == 1
    for reward in (detection_iou_reward, precision_reward, od_length_reward, average_precision_reward):
        assert reward(answer, target) <= share + 1e-9, reward
    assert detection_confidence_reward(answer, target) == 0


@pytest.mark.parametrize("reward", DETECTION)
def test_exact_copies(reward: Callable):
    right, target = [101, 201, 300, 400], detection(TRUTH, CROWD[-1])
    once = reward(detected((right, 0.9)), target)
    assert once > 0
    for copies in ([0.9] * 50, [0.1, 0.9], [0.9, 0.1, 0.0]):
        assert reward(detected(*((right, confidence) for confidence in copies)), target) == once


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_confidence_that_is_no_number(written: str):
    answer, target = detected(([101, 201, 300, 400], written)), detection(TRUTH)
    assert [reward(answer, target) for reward in DETECTION] == [0] * len(DETECTION)
    by_hand = Answer(text=answer.text, boxes=TRUTH, confidences=[float(written)])
    assert [reward(by_hand, target) for reward in DETECTION] == [0] * len(DETECTION)
    if written == "NaN":
        assert math.isnan(published(detection_confidence_reward, answer, target))


@pytest.mark.parametrize("confidence", [90, 2.5])
def test_a_confidence_above_one(confidence: float):
    answer, target = detected(([101, 201, 300, 400], 0.9), (CROWD[3], confidence)), detection(TRUTH)
    assert detection_confidence_reward(answer, target) == 0
    alone = detected(([101, 201, 300, 400], confidence))
    assert detection_confidence_reward(alone, target) == 1


def test_boxes_without_area_cost_what_any_wrong_box_costs():
    right, target = ([101, 201, 300, 400], 0.9), detection(TRUTH)
    for odd in ([300, 400, 100, 200], [150, 250, 150, 250], [300, 201, 100, 400]):
        answer, wrong = detected(right, (odd, 0.9)), detected(right, (CROWD[3], 0.9))
        for reward in DETECTION:
            assert reward(answer, target) == reward(wrong, target), reward


def test_saying_that_there_is_nothing():
    answer = DetectionTask().read(text("No Objects"), FRAME, SIZE)
    assert [reward(answer, detection(TRUTH)) for reward in DETECTION] == [0] * len(DETECTION)
    hedged = DetectionTask().read(text(f"No Objects {entries((TRUTH, 0.5))}"), FRAME, SIZE)
    assert [reward(hedged, detection()) for reward in DETECTION] == [0] * len(DETECTION)


# ---------------------------------------------------------------- grounding


@pytest.mark.parametrize(
    ("content", "paid"),
    [("(900,900),(100,100)", 2.78), ("(1000,1000),(0,0)", 3.78), ("(9000,9000),(0,0)", 226)],
)
def test_inverted_corners(content: str, paid: float):
    answer, target = pointed_at(content)
    x2, y2, x1, y1 = (int(number) for number in content.strip("()").replace("),(", ",").split(","))
    by_hand = Answer(boxes=[x2, y2, x1, y1])
    for one in (answer, by_hand):
        assert [reward(one, target) for reward in GROUNDING] == [0] * len(GROUNDING)
    assert published(giou_reward, answer, target) == pytest.approx(paid, abs=5e-3)


def test_a_point_for_a_box():
    answer, target = pointed_at("(500,500),(500,500)")
    assert [reward(answer, target) for reward in GROUNDING] == [0] * len(GROUNDING)
    assert published(giou_reward, answer, target) == 1


def test_boxes_after_the_first_are_not_tries():
    answer, target = pointed_at("(0,0),(9,9) (200,200),(800,800)")
    for reward in (grounding_iou_reward, grounding_iou_squared_reward, point_in_box_reward):
        assert reward(answer, target) == 0
