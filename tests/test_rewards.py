"""Rewards: the recorded outputs of the published functions, the paper's equations by hand, and the hardened rules.

Answers of strict and paper rules are read in a frame of 0-1000 on a picture of 1000 x 1000, so numbers are pixels.
The values of the published functions were recorded from them and are rounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft_lightning.answers import parse_answer
from rft_lightning.boxes import valid_boxes
from rft_lightning.rewards import (
    accuracy_reward,
    detection_confidence_reward,
    detection_iou_reward,
    format_reward,
    giou_reward,
    grounding_iou_reward,
)
from rft_lightning.sample import Answer, ClassTarget, DetectionTarget, GroundingTarget, Target, as_boxes

REWARDS = [
    accuracy_reward,
    detection_confidence_reward,
    detection_iou_reward,
    format_reward,
    giou_reward,
    grounding_iou_reward,
]
THINK = "<think>t</think> "
SIZE = (1000, 1000)


def read(text: str) -> Answer:
    """What a task's read does in a frame whose unit is the pixel: invalid boxes dropped, confidences clamped."""
    parsed = parse_answer(text)
    boxes = as_boxes(parsed.boxes)
    keep = valid_boxes(boxes)
    return Answer(
        text=text,
        label=parsed.label,
        boxes=boxes[keep],
        confidences=torch.tensor(parsed.confidences, dtype=torch.float64).clamp(0, 1)[keep],
        well_formed=parsed.well_formed,
        no_objects=parsed.no_objects,
        answer_blocks=parsed.answer_blocks,
        problems=tuple(parsed.problems),
    )


def answered(content: str) -> Answer:
    return read(f"{THINK}<answer>{content}</answer>")


def entry(box: list[float], confidence: float | str = 0.9) -> str:
    return f"{{'Position': {list(box)}, 'Confidence': {confidence}}}"


def entries(*pairs: tuple[list[float], float | str]) -> str:
    return f"[{', '.join(entry(box, confidence) for box, confidence in pairs)}]"


def detection(*boxes: list[float]) -> DetectionTarget:
    found = [{"Position": box, "Confidence": 1} for box in boxes]
    return DetectionTarget(
        as_boxes(list(boxes)), image_size=SIZE, solution_text=f"<answer>{found or 'No Objects'}</answer>"
    )


def grounding(x1: int, y1: int, x2: int, y2: int) -> GroundingTarget:
    text = f"<answer> ({x1},{y1}),({x2},{y2}) </answer>"
    return GroundingTarget(as_boxes([x1, y1, x2, y2]), image_size=SIZE, solution_text=text)


def class_target(label: str, aliases: tuple[str, ...] = ()) -> ClassTarget:
    return ClassTarget(label, aliases, solution_text=f"<answer>{label}</answer>")


TRUTH = [100, 200, 300, 400]
NEAR = [100, 201, 300, 400]  # IoU .995 with TRUTH
FAR = [600, 600, 700, 700]
G1 = detection(TRUTH)
G2 = detection(TRUTH, [600, 600, 800, 900])
NONE = detection()


# ---------------------------------------------------------------- published code, detection: table 2.3

TAGGED = [
    # content of the answer block, target, iou, confidence; all of them are worth the format point
    ("single quotes", entries((NEAR, 0.9)), G1, 0.995, 0.9),
    ("double quotes", entries((NEAR, 0.9)).replace("'", '"'), G1, 0.995, 0.9),
    ("double brackets", f"[{entries((NEAR, 0.9))}]", G1, 0.995, 0.9),
    ("double brackets in Position", "[{'Position': [[100, 201, 300, 400]], 'Confidence': 0.9}]", G1, 0.995, 0.9),
    ("one of two", entries((NEAR, 0.9)), G2, 0.4975, 0.9),
    ("both of two", entries((NEAR, 0.9), ([600, 601, 800, 900], 0.8)), G2, 0.9958, 0.85),
    ("one false positive", entries((NEAR, 0.9), (FAR, 0.8)), G1, 0.4975, 0.55),
    ("exact duplicate", entries((NEAR, 0.9), (NEAR, 0.5)), G1, 0.995, 0.9),
    ("near duplicate", entries((NEAR, 0.5), ([101, 202, 300, 400], 0.9)), G1, 0.4925, 0.7),
    ("wrong box", entries(([100, 201, 900, 900], 0.9)), G1, 0.0, 0.1),
    ("empty list", "[]", G1, 0, 0),
    ("no objects", "No Objects", G1, 0, 0),
    ("empty list against none", "[]", NONE, 0, 0),
    ("no objects against none", "No Objects", NONE, 0, 0),
    ("box against none", entries((NEAR, 0.9)), NONE, 0, 0),
    ("missing confidence", "[{'Position': [100, 201, 300, 400]}]", G1, 0, 0),
    ("confidence as string", entries((NEAR, "'0.9'")), G1, 0, 0),
    ("lower-case key", "[{'position': [100, 201, 300, 400], 'Confidence': 0.9}]", G1, 0, 0),
    ("three numbers", entries(([100, 201, 300], 0.9)), G1, 0, 0),
    ("bare dict", entry(NEAR, 0.9), G1, 0, 0),
    ("trailing comma", f"[{entry(NEAR, 0.9)},]", G1, 0, 0),
    ("trailing dots", f"[{entry(NEAR, 0.9)}, ...]", G1, 0, 0),
    ("second element a string", f"[{entry(NEAR, 0.9)}, 'x']", G1, 0, 0),
    ("confidence 90 matched", entries((NEAR, 90)), G1, 0.995, 1),
    ("confidence 90 unmatched", entries((FAR, 90)), G1, 0, 0),
    ("confidence -3 unmatched", entries((FAR, -3)), G1, 0, 1),
    ("confidence 0.0 unmatched", entries((FAR, 0.0)), G1, 0, 1),
    ("NaN matched", entries((NEAR, "NaN")), G1, 0.995, math.nan),
    ("NaN unmatched", entries((FAR, "NaN")), G1, 0, math.nan),
    ("malformed box after the only truth is used", entries((NEAR, 0.9), ([1, 2, 3], 0.1)), G1, 0.4975, 0.9),
    ("malformed box first", entries((NEAR, 0.1), ([1, 2, 3], 0.9)), G1, 0, 0),
    ("IoU of a half", entries(([100, 250, 300, 350], 0.9)), G1, 0, 0.1),
    ("IoU of three quarters", entries(([100, 225, 300, 375], 0.9)), G1, 0.75, 0.9),
    # Not a row of the table but step 4 of the algorithm: a list cut off inside the tags is repaired.
    ("cut off inside the tags", entries((NEAR, 0.9), (FAR, 0.8))[:-5].replace("}, {", "},{"), G1, 0.995, 0.9),
]
LIST = entries((NEAR, 0.9))
WHOLE = [
    ("bare list", LIST, 0.995, 0.9, 0),
    ("bare list over lines", LIST.replace(", ", ",\n"), 0.995, 0.9, 0),
    ("answer tag only", f"<answer>{LIST}</answer>", 0.995, 0.9, 0),
    ("newline in the answer", f"{THINK}<answer>\n{LIST}\n</answer>", 0, 0, 1),
    ("newline in the answer, no thought", f"<answer>\n{LIST}\n</answer>", 0, 0, 0),
    ("cut off, not closed", f"{THINK}<answer>[{entry(NEAR)}, {{'Pos", 0, 0, 0),
    ("two blocks", f"{THINK}<answer>{LIST}</answer><answer>{entries((FAR, 0.1))}</answer>", 0.995, 0.9, 1),
]
PUBLISHED_DETECTION = [(name, THINK + f"<answer>{c}</answer>", gt, i, p, 1) for name, c, gt, i, p in TAGGED]
PUBLISHED_DETECTION += [(name, text, G1, iou, confidence, form) for name, text, iou, confidence, form in WHOLE]


@pytest.mark.parametrize(
    ("text", "target", "iou", "confidence", "form"),
    [row[1:] for row in PUBLISHED_DETECTION],
    ids=[row[0] for row in PUBLISHED_DETECTION],
)
def test_published_detection(text: str, target: Target, iou: float, confidence: float, form: float):
    answer, rules = Answer(text=text), "published_code"
    assert detection_iou_reward(answer, target, rules=rules) == pytest.approx(iou, abs=5e-5)
    expected = pytest.approx(confidence, abs=5e-5, nan_ok=True)
    assert detection_confidence_reward(answer, target, rules=rules) == expected
    assert format_reward(answer, target, rules=rules) == form


def test_published_detection_pays_a_wrong_box_with_the_right_y1():
    pytest.importorskip("math_verify")
    answer = answered(entries(([100, 200, 900, 900], 0.9)))
    for reward in (detection_iou_reward, detection_confidence_reward, format_reward):
        assert reward(answer, G1, rules="published_code") == 1


@pytest.mark.parametrize("rules", ["paper", "published_code"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think></think><answer></answer>", 1),
        ("<think>a\nb</think>\n<answer>c\nd</answer>", 1),
        ("<think>a</think><think>b</think><answer>c</answer>", 1),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 1),
        (" <think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>\n", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_published_format(text: str, expected: float, rules: str):
    assert format_reward(Answer(text=text), None, rules=rules) == expected


# ---------------------------------------------------------------- published code, classification: table 2.4


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("<answer>p</answer>", "pink primrose", 1),
        ("<answer></answer>", "pink primrose", 1),
        ("", "pink primrose", 1),
        ("<answer>rose or pink primrose or lily</answer>", "pink primrose", 1),
        ("I think this is a Pink_Primrose, surely.", "pink primrose", 1),
        # Over several lines the whole text counts, the thought with it.
        ("<think>pink primrose</think><answer>\nlily\n</answer>", "pink primrose", 1),
        ("<think>a flower</think><answer>\nlily\n</answer>", "pink primrose", 0),
        ("<answer>Sedan</answer>", "2012 Acura RL Sedan", 1),
        ("<answer>2012</answer>", "2012 Acura RL Sedan", 1),
        ("<answer>20</answer>", "2012 Acura RL Sedan", 1),
        ("<answer>Acura RL Sedan 2012</answer>", "2012 Acura RL Sedan", 0),
        ("<answer>7</answer>", "737-200", 1),
        ("<answer>hard leaved pocket orchid</answer>", "hard-leaved pocket orchid", 0),
        ("<answer>tulip</answer>", "pink primrose", 0),
    ],
)
def test_published_accuracy(text: str, label: str, expected: float):
    assert accuracy_reward(Answer(text=text), class_target(label), rules="published_code") == expected


# ---------------------------------------------------------------- published code, grounding: table 2.5


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("(200,200),(800,800)", 2.0),
        ("( 200 , 200 ) , ( 800 , 800 )", 2.0),
        ("(300,300),(900,900)", 1.491),
        ("(0,0),(100,100)", 0.578),
        ("(0,0),(1000,1000)", 1.36),
        ("(500,500),(500,500)", 1.0),
        ("(900,900),(100,100)", 2.78),
        ("(1000,1000),(0,0)", 3.78),
        ("(9000,9000),(0,0)", 226),
        ("(900,200),(100,800)", -0.33),
        ("(200,200),(800,800) (400,400),(900,900)", 1.11),
        ("(200.0,200),(800,800)", 0),
        ("[200,200,800,800]", 0),
        ("nothing", 0),
    ],
)
@pytest.mark.parametrize("wrap", ["{}", "<answer>{}</answer>", "<think>t</think>\n<answer>\n{}\n</answer>"])
def test_published_giou(content: str, expected: float, wrap: str):
    answer = Answer(text=wrap.format(content))
    value = giou_reward(answer, grounding(200, 200, 800, 800), rules="published_code")
    assert value == pytest.approx(expected, abs=5e-3)


def test_published_giou_pays_an_equal_string_that_is_no_box():
    target = GroundingTarget(torch.zeros(0, 4), solution_text="<answer>nothing</answer>")
    assert giou_reward(Answer(text="<answer> nothing </answer>"), target, rules="published_code") == 2.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>(200,200),(800,800)</answer>", 0.36 / (0.36 + 1e-6)),
        ("it is (200,200),(500,800) <answer>(200,200),(800,800)</answer>", 0.18 / (0.36 + 1e-6)),
        ("(900,900),(100,100)", 0),
        ("none", 0),
    ],
)
def test_published_evaluation_iou(text: str, expected: float):
    target = grounding(200, 200, 800, 800)
    value = grounding_iou_reward(Answer(text=text), target, rules="published_code")
    assert value == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["<answer>", "</answer>", "[", "]", "{", "}", LIST, "},", ",", "(1,2),(3,4)", "\n", "9" * 5000])
    )
)
def test_published_code_reads_any_text(parts: list[str]):
    answer = Answer(text="".join(parts))
    for reward, target in [
        (format_reward, G1),
        (accuracy_reward, class_target("rose")),
        (detection_iou_reward, G1),
        (detection_confidence_reward, G2),
        (giou_reward, grounding(1, 2, 3, 4)),
        (grounding_iou_reward, grounding(1, 2, 3, 4)),
    ]:
        assert isinstance(reward(answer, target, rules="published_code"), float)


# ---------------------------------------------------------------- paper


@pytest.mark.parametrize(
    ("content", "target", "iou", "confidence"),
    [
        # Eq. 6 divides by the predictions: a missed box costs nothing, a surplus one does.
        (entries((NEAR, 0.9)), G1, 0.995, 0.9),
        (entries((NEAR, 0.9)), G2, 0.995, 0.9),
        (entries((NEAR, 0.9), (FAR, 0.8)), G1, 0.995 / 2, (0.9 + 0.2) / 2),
        (entries((NEAR, 0.9), (FAR, 0.8), ([0, 0, 9, 9], 0.25)), G2, 0.995 / 3, (0.9 + 0.2 + 0.75) / 3),
        # The second of two equal boxes finds the true one taken.
        (entries((NEAR, 0.9), (NEAR, 0.4)), G1, 0.995 / 2, (0.9 + 0.6) / 2),
        (entries(([100, 200, 300, 300], 0.9)), G1, 0, 0.1),
        (entries((FAR, 0.0)), G1, 0, 1),
        (entries((FAR, 0.3)), NONE, 0, 0.7),
        ("No Objects", NONE, 0, 0),
        ("[]", G1, 0, 0),
    ],
)
def test_paper_detection(content: str, target: Target, iou: float, confidence: float):
    answer = answered(content)
    assert detection_iou_reward(answer, target, rules="paper") == pytest.approx(iou)
    assert detection_confidence_reward(answer, target, rules="paper") == pytest.approx(confidence)


@pytest.mark.parametrize(
    ("label", "expected"),
    [("Pink primrose", 1), ("pink-primrose.", 1), ("primrose", 0), ("", 0), ("evening primrose", 0)],
)
def test_paper_accuracy_is_equality_with_the_label(label: str, expected: float):
    target = class_target("pink primrose", aliases=("primrose",))
    assert accuracy_reward(answered(label), target, rules="paper") == expected


@pytest.mark.parametrize(("content", "expected"), [("(300,300),(900,900)", 25 / 47), ("(0,0),(100,100)", 0), ("no", 0)])
@pytest.mark.parametrize("reward", [giou_reward, grounding_iou_reward])
def test_paper_grounding_is_plain_iou(reward: Callable, content: str, expected: float):
    assert reward(answered(content), grounding(200, 200, 800, 800), rules="paper") == pytest.approx(expected)


# ---------------------------------------------------------------- strict


@pytest.mark.parametrize(
    ("content", "target", "iou", "confidence"),
    [
        (entries((NEAR, 0.9)), G1, 0.995, 0.9),
        (entries((NEAR, 0.9)), G2, 0.995 / 2, 0.9 / 2),
        (entries((NEAR, 0.9), ([600, 601, 800, 900], 0.8)), G2, (0.995 + 299 / 300) / 2, 1.7 / 2),
        (entries((NEAR, 0.9), (FAR, 0.8)), G1, 0.995 / 2, (0.9 - 0.8) / 2),
        (entries((NEAR, 0.2), (FAR, 0.8)), G1, 0.995 / 2, 0),
        (entries((NEAR, 0.9), (NEAR, 0.5)), G1, 0.995, 0.9),
        (entries((NEAR, 0.5), (NEAR, 0.9)), G1, 0.995, 0.9),
        (entries((NEAR, 0.5), ([101, 202, 300, 400], 0.9)), G1, 199 * 198 / 40000 / 2, 0.2),
        (entries(([100, 200, 300, 300], 0.9)), G1, 0, 0),
        (entries(([100, 200, 300, 350], 0.9)), G1, 0.75, 0.9),
        ("No Objects", NONE, 1, 1),
        ("[]", NONE, 1, 1),
        ("No Objects", G1, 0, 0),
        # What the published rules can be cheated with:
        (entries((FAR, 0.0)), G1, 0, 0),
        (entries((FAR, -3)), G1, 0, 0),
        (entries(([100, 200, 900, 900], 0.9)), G1, 0, 0),
        (entries((NEAR, 90)), G1, 0.995, 1),
        (entries((FAR, 90)), G1, 0, 0),
        (entries((NEAR, "NaN")), G1, 0, 0),
        (entries((NEAR, "NaN"), (NEAR, 0.9)), G1, 0.995, 0.9),
        (entries((NEAR, "Infinity")), G1, 0, 0),
        (entries(([300, 400, 100, 201], 0.9)), G1, 0, 0),
        (entries(([300, 400, 100, 201], 0.9)), NONE, 0, 0),
        (entries((NEAR, 0.0)), NONE, 0, 0),
        (entries((FAR, 0.9)), NONE, 0, 0),
        ("", NONE, 0, 0),
        ("", G1, 0, 0),
        ("I cannot say", NONE, 0, 0),
        # What the published parser refuses for its spelling:
        ("[{'position': [100, 201, 300, 400], 'Confidence': '0.9'}, ...]", G1, 0.995, 0.9),
        (f"\n{LIST}\n", G1, 0.995, 0.9),
        (entries((NEAR, 0.1), ([1, 2, 3], 0.9)), G1, 0.995, 0.1),
    ],
)
def test_strict_detection(content: str, target: Target, iou: float, confidence: float):
    answer = answered(content)
    assert detection_iou_reward(answer, target) == pytest.approx(iou)
    assert detection_confidence_reward(answer, target) == pytest.approx(confidence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_boxes_of_any_dtype_are_scored(dtype: torch.dtype):
    """A task of the user's own may put what it likes into an Answer."""
    answer, target = Answer(text="x", boxes=[[0, 0, 100, 100]]), DetectionTarget([[0, 0, 100, 100]])
    answer.boxes = answer.boxes.to(dtype)
    answer.confidences = answer.confidences.to(dtype)
    assert (detection_iou_reward(answer, target), detection_confidence_reward(answer, target)) == (1, 1)


def test_strict_detection_withstands_answers_no_task_would_build():
    odd = torch.tensor([0.9, math.nan, 7.0], dtype=torch.float64)
    answer = Answer(boxes=as_boxes([NEAR, FAR, [math.nan, 0, 1, 1]]), confidences=odd)
    assert detection_iou_reward(answer, G1) == pytest.approx(0.995)
    assert detection_confidence_reward(answer, G1) == pytest.approx(0.9)
    nothing = Answer(boxes=as_boxes([FAR]), confidences=torch.tensor([math.nan]), no_objects=True)
    assert detection_iou_reward(nothing, NONE) == 0


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 12), min_size=4, max_size=4), st.floats(0, 1)), max_size=6),
    st.lists(st.sampled_from([[0, 0, 6, 6], [6, 6, 12, 12], [0, 6, 6, 12], [3, 3, 9, 9]]), max_size=4),
    st.sampled_from(["strict", "paper"]),
)
def test_detection_rewards_stay_in_range(found: list[tuple[list[float], float]], truths: list[list[float]], rules: str):
    answer, target = answered(entries(*found)), detection(*truths)
    for reward in (detection_iou_reward, detection_confidence_reward):
        value = reward(answer, target, rules=rules)
        assert isinstance(value, float)
        assert 0 <= value <= 1


@pytest.mark.parametrize("truths", [[TRUTH], [TRUTH, FAR], []])
def test_the_right_answer_is_worth_everything(truths: list[list[float]]):
    answer = answered(entries(*((box, 1) for box in truths)))
    assert detection_iou_reward(answer, detection(*truths)) == 1
    assert detection_confidence_reward(answer, detection(*truths)) == 1
    assert format_reward(answer, detection(*truths)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>hard-leaved pocket orchid</answer>", 1),
        ("<answer>Hard leaved_Pocket  Orchid.</answer>", 1),
        ("<answer>'hard\u2010leaved\npocket orchid'</answer>", 1),
        ("<answer>slipper orchid</answer>", 1),
        ("<answer>orchid</answer>", 0),
        ("<answer></answer>", 0),
        ("<answer>...</answer>", 0),
        ("", 0),
        ("<answer>rose or hard-leaved pocket orchid</answer>", 0),
        ("<answer>hard-leaved pocket orchid</answer><answer>rose</answer>", 0),
        ("<think>hard-leaved pocket orchid</think><answer>\nrose\n</answer>", 0),
        ("hard-leaved pocket orchid", 1),
    ],
)
def test_strict_accuracy(text: str, expected: float):
    target = class_target("hard-leaved pocket orchid", aliases=("Slipper Orchid",))
    assert accuracy_reward(read(text), target) == expected


@pytest.mark.parametrize(("label", "answer"), [("737-200", "7"), ("737-200", "737"), ("2012 Acura RL Sedan", "2012")])
def test_strict_accuracy_refuses_a_part_of_the_name(label: str, answer: str):
    assert accuracy_reward(answered(answer), class_target(label)) == 0


def test_strict_accuracy_does_not_mind_how_accents_are_composed():
    composed, decomposed = "caf\u00e9 au lait", "cafe\u0301 au lait"
    assert accuracy_reward(answered(composed), class_target(decomposed)) == 1
    assert accuracy_reward(answered(decomposed), class_target(composed)) == 1
    assert accuracy_reward(answered("cafe au lait"), class_target(composed)) == 0


@pytest.mark.parametrize(
    ("label", "answer", "expected"),
    [("C++", "c++.", 1), ("C++", "C#", 0), ("A+", "A-", 0), ("100%", "100", 0), ("?", "?", 1), ("?", "!", 0)],
)
def test_signs_that_are_part_of_a_name_count(label: str, answer: str, expected: float):
    assert accuracy_reward(answered(answer), class_target(label)) == expected


def test_an_empty_alias_is_no_way_in():
    assert accuracy_reward(answered(""), class_target("rose", aliases=("", "-"))) == 0


@pytest.mark.parametrize(
    ("content", "giou", "iou"),
    [
        ("(200,200),(800,800)", 2, 1),
        ("(300,300),(900,900)", 1 + 25 / 47 - 2 / 49, 25 / 47),
        ("(0,0),(100,100)", 1 - 27 / 64, 0),
        ("(0,0),(1000,1000)", 1.36, 0.36),
        ("(900,900),(100,100)", 0, 0),
        ("(9000,9000),(0,0)", 0, 0),
        ("(900,200),(100,800)", 0, 0),
        ("(500,500),(500,500)", 0, 0),
        ("[200,200,800,800]", 2, 1),
        ("(200.0,200),(800,800) (0,0),(1,1)", 2, 1),
        ("(0,0),(1e200,1e200)", 0, 0),
        ("", 0, 0),
    ],
)
def test_strict_grounding(content: str, giou: float, iou: float):
    target = grounding(200, 200, 800, 800)
    assert giou_reward(answered(content), target) == pytest.approx(giou)
    assert grounding_iou_reward(answered(content), target) == pytest.approx(iou)


def test_strict_giou_refuses_an_inverted_box_that_no_task_dropped():
    answer = Answer(boxes=as_boxes([900, 900, 100, 100]))
    assert giou_reward(answer, grounding(200, 200, 800, 800)) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>t</think><answer>a</answer>", 1),
        ("\n<think>t</think>\n\n<answer>a</answer> ", 1),
        ("<think>t</think><answer>a</answer><answer>b</answer>", 0),
        ("<think>t</think><think>t</think><answer>a</answer>", 0),
        ("a", 0),
    ],
)
def test_strict_format(text: str, expected: float):
    assert format_reward(read(text), None) == expected


# ---------------------------------------------------------------- the contract of all of them


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("target", [G1, grounding(1, 2, 3, 4), class_target("rose"), None])
def test_unknown_rules_are_refused_whatever_the_target(reward: Callable, target: Target | None):
    with pytest.raises(ValueError, match=re.escape("strict, paper, published_code, found 'lenient'")):
        reward(Answer(), target, rules="lenient")


@pytest.mark.parametrize("rules", ["strict", "paper", "published_code"])
def test_a_target_of_another_kind_is_not_applicable(rules: str):
    kinds = {
        ClassTarget: [accuracy_reward],
        DetectionTarget: [detection_iou_reward, detection_confidence_reward],
        GroundingTarget: [giou_reward, grounding_iou_reward],
    }
    for target in (class_target("rose"), G1, grounding(1, 2, 3, 4), None):
        for kind, rewards in kinds.items():
            for reward in rewards:
                value = reward(answered("rose"), target, rules=rules, step=3)
                assert isinstance(value, float) if isinstance(target, kind) else value is None
        assert format_reward(answered("rose"), target, rules=rules, step=3) == 1


@pytest.mark.parametrize("reward", [reward for reward in REWARDS if reward is not format_reward])
def test_published_code_needs_the_solution_text(reward: Callable):
    kinds = [ClassTarget("rose"), DetectionTarget(torch.zeros(0, 4)), GroundingTarget(torch.zeros(1, 4))]
    for target in kinds:
        if reward(answered("rose"), target) is not None:
            with pytest.raises(ValueError, match=r"PromptEncoder.*task\.solution"):
                reward(answered("rose"), target, rules="published_code")


def test_strict_and_paper_do_not_read_the_texts():
    blank = Answer(label="rose", boxes=as_boxes([TRUTH]))
    assert (
        accuracy_reward(blank, ClassTarget("rose")) == accuracy_reward(blank, ClassTarget("rose"), rules="paper") == 1
    )
    for rules in ("strict", "paper"):
        assert detection_iou_reward(blank, DetectionTarget(as_boxes([TRUTH])), rules=rules) == 1
        assert grounding_iou_reward(blank, GroundingTarget(as_boxes([TRUTH])), rules=rules) == 1
