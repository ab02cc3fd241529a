"""The parser of model text: what it reads, what it drops, and that nothing makes it raise or crawl."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft_lightning.answers import ParsedAnswer, parse_answer

ENTRY = "{'Position': [1, 2, 30, 40], 'Confidence': 0.9}"
OTHER = "{'Position': [5, 6, 70, 80], 'Confidence': 0.25}"


def answered(content: str) -> ParsedAnswer:
    return parse_answer(f"<think>t</think> <answer>{content}</answer>")


def test_clean_answer_is_read_without_problems():
    parsed = parse_answer(f"<think> I look. </think>\n<answer> [{ENTRY}, {OTHER}] </answer>\n")
    assert parsed.thought == "I look."
    assert parsed.label == f"[{ENTRY}, {OTHER}]"
    assert parsed.boxes == [[1, 2, 30, 40], [5, 6, 70, 80]]
    assert parsed.confidences == [0.9, 0.25]
    assert parsed.well_formed
    assert not parsed.no_objects
    assert parsed.answer_blocks == 1
    assert parsed.problems == []


def test_integers_stay_integers_and_floats_floats():
    box = answered("[{'Position': [1, 2.0, +3, 4.5e1], 'Confidence': 1}]").boxes[0]
    assert [type(number) for number in box] == [int, float, int, float]
    assert box == [1, 2.0, 3, 45.0]


@pytest.mark.parametrize(
    "content",
    [
        '[{"Position": [1, 2, 30, 40], "Confidence": 0.9}]',
        "[{'position': [1, 2, 30, 40], 'confidence': 0.9}]",
        "[{'POSITION': [1, 2, 30, 40], 'CONFIDENCE': '0.9'}]",
        "[{'bbox_2d': [1, 2, 30, 40], 'label': 'box', 'score': \"0.9\"}]",
        "[{'box': [1, 2, 30, 40], 'score': 0.9}]",
        "[{bbox: [1,2,30,40], score: .9}]",
        "[{'Confidence': 0.9, 'Position': [[1, 2, 30, 40]]}]",
        f"[[{ENTRY}]]",
        f"[{ENTRY},]",
        f"[{ENTRY}, ...]",
        "[{'Position': [1, 2, 30, 40,], 'Confidence': 0.9,},]",
        "[\n  {\n'Position':\n[1,\n2, 30,\n40],\n'Confidence':\n0.9\n}\n]",
        ENTRY,
        f"```json\n[{ENTRY}]\n```",
        '{"objects": [{"Position": [1, 2, 30, 40], "Confidence": 0.9}]}',
    ],
)
def test_spellings_of_one_box(content: str):
    parsed = answered(content)
    assert (parsed.boxes, parsed.confidences, parsed.problems) == ([[1, 2, 30, 40]], [0.9], [])


@pytest.mark.parametrize(
    "bad",
    [
        "{'Position': [1, 2, 3], 'Confidence': 0.9}",
        "{'Position': [1, 2, 3, 4, 5], 'Confidence': 0.9}",
        "{'Position': [1, 2, 3, NaN], 'Confidence': 0.9}",
        "{'Position': [1, 2, 3, 1e999], 'Confidence': 0.9}",
        "{'Position': [1, 2, 3, 4), 'Confidence': 0.9}",
        "{'Position': [[1, 2, 3, 4], [5, 6, 7, 8]], 'Confidence': 0.9}",
        "{'Position': [x1, y1, x2, y2], 'Confidence': number}",
        "{'Position': [1, 2, 3, 4], 'Confidence': NaN}",
        "{'Position': [1, 2, 3, 4], 'Confidence': -Infinity}",
        "{'Position': [1, 2, 3, 4], 'Confidence': 'high'}",
        "{'Confidence': 0.9}",
    ],
)
def test_a_malformed_box_is_dropped_alone_and_named(bad: str):
    parsed = answered(f"[{ENTRY}, {bad}, {OTHER}]")
    assert parsed.boxes == [[1, 2, 30, 40], [5, 6, 70, 80]]
    assert parsed.confidences == [0.9, 0.25]
    assert len(parsed.problems) == 1
    assert parsed.problems[0].startswith("entry 2:")


@pytest.mark.parametrize("confidence", ["NaN", "nan", "inf", "1e400"])
def test_a_dropped_box_does_not_come_back_as_a_plain_list(confidence: str):
    parsed = answered(f"[{{'Position': [1, 2, 30, 40], 'Confidence': {confidence}}}]")
    assert parsed.boxes == []
    assert parsed.confidences == []
    assert parsed.problems


def test_missing_confidence_is_one_and_a_problem():
    parsed = answered("[{'Position': [1, 2, 30, 40]}]")
    assert (parsed.boxes, parsed.confidences) == ([[1, 2, 30, 40]], [1.0])
    assert len(parsed.problems) == 1


def test_confidences_are_kept_as_written():
    parsed = answered("[{'Position': [1, 2, 30, 40], 'Confidence': 90}, {'Position': [1, 2, 3, 4], 'score': -3}]")
    assert parsed.confidences == [90, -3]


def test_a_list_that_is_cut_off_keeps_whole_entries():
    parsed = parse_answer(f"<think>t</think><answer>[{ENTRY}, {OTHER}, {{'Position': [1, 2, 3, 4], 'Conf")
    assert parsed.boxes == [[1, 2, 30, 40], [5, 6, 70, 80]]
    assert "answer block not closed" in parsed.problems
    assert not parsed.well_formed


def test_a_single_entry_that_is_cut_off_is_no_box():
    assert parse_answer("<answer>[{'Position': [1, 2, 3, 4], 'Conf").boxes == []


@pytest.mark.parametrize(
    ("content", "boxes"),
    [
        ("(1,2),(30,40)", [[1, 2, 30, 40]]),
        ("( 1 , 2.5 ) , ( 30 , 40 )", [[1, 2.5, 30, 40]]),
        ("<|box_start|>(1,2),(30,40)<|box_end|><|box_start|>(5,6),(7,8)<|box_end|>", [[1, 2, 30, 40], [5, 6, 7, 8]]),
        ("The box: (1,2),(30,40).", [[1, 2, 30, 40]]),
        ("[1, 2, 30, 40]", [[1, 2, 30, 40]]),
        ("[[1, 2, 30, 40], [5, 6, 7, 8]]", [[1, 2, 30, 40], [5, 6, 7, 8]]),
        ("[1, 2, 30]", []),
        ("[1, 2, 30, 40, 50]", []),
        ("(1,2),(30,1e999)", []),
        ("(1,2)", []),
    ],
)
def test_boxes_without_entries(content: str, boxes: list[list[float]]):
    parsed = answered(content)
    assert parsed.boxes == boxes
    assert parsed.confidences == [1.0] * len(boxes)


def test_entries_come_before_pairs_and_pairs_before_lists():
    assert answered(f"(9,9),(10,10) [7,7,8,8] {ENTRY}").boxes == [[1, 2, 30, 40]]
    assert answered("(9,9),(10,10) [7,7,8,8]").boxes == [[9, 9, 10, 10]]


@pytest.mark.parametrize(
    "content",
    ["No Objects", "no object.", "'No Objects'", ' "NO\n OBJECTS." ', "none", "None.", "[]", "[ ]"],
)
def test_no_objects(content: str):
    parsed = answered(content)
    assert parsed.no_objects
    assert parsed.boxes == []


@pytest.mark.parametrize(
    "content", ["", "No", "no objects but [1,2,3,4]", "There are no objects", f"[{ENTRY}]", "[[]]x"]
)
def test_not_no_objects(content: str):
    assert not answered(content).no_objects


@pytest.mark.parametrize(
    ("text", "label", "blocks", "problem"),
    [
        ("<answer>rose", "rose", 1, "answer block not closed"),
        ("rose", "rose", 0, "no answer block"),
        ("<think>a tulip?</think> rose", "rose", 0, "no answer block"),
        ("<think>a tulip", None, 0, "think block not closed"),
        ("<answer>rose</answer><answer>tulip</answer>", "rose", 2, "2 answer blocks, the first one counts"),
        ("<answer> \n </answer>", None, 1, "empty answer"),
        ("", None, 0, "no answer block"),
    ],
)
def test_labels_of_broken_blocks(text: str, label: str | None, blocks: int, problem: str):
    parsed = parse_answer(text)
    assert (parsed.label, parsed.answer_blocks, parsed.well_formed) == (label, blocks, False)
    assert problem in parsed.problems


def test_label_over_several_lines():
    parsed = parse_answer("<think>a\nb</think>\n\n<answer>\nSea king\n</answer>")
    assert (parsed.thought, parsed.label, parsed.well_formed) == ("a\nb", "Sea king", True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think></think><answer></answer>", True),
        ("  <think>t</think>\n <answer>a</answer>\n", True),
        ("<think>t</think> so <answer>a</answer>", False),
        ("<think>t</think><answer>a</answer> done", False),
        ("<think>t</think><think>t</think><answer>a</answer>", False),
        ("<think>t</think><answer>a</answer><answer>b</answer>", False),
        ("<think>t</think><answer>a</answer></answer>", False),
        ("<answer>a</answer><think>t</think>", False),
        ("<answer>a</answer>", False),
    ],
)
def test_well_formed(text: str, expected: bool):
    assert parse_answer(text).well_formed is expected


def test_the_list_of_problems_is_capped():
    problems = answered("{'Position': [1]}" * 30).problems
    assert len(problems) == 11
    assert problems[-1] == "and 20 more"


FRAGMENTS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    ",",
    "'",
    '"',
    ":",
    " ",
    "\n",
]
FRAGMENTS += [
    "Position",
    "Confidence",
    "bbox_2d",
    "score",
    "NaN",
    "Infinity",
    "1e999",
    "9" * 400,
    "...",
    "1",
    "-2.5",
    "0.9",
]
FRAGMENTS += [ENTRY, "(1,2),(3,4)", "No Objects", "[]", "<|box_start|>", "\u0661", "\u00b2"]


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join)))
def test_any_text_is_read(text: str):
    parsed = parse_answer(text)
    assert len(parsed.boxes) == len(parsed.confidences)
    assert all(len(box) == 4 and all(math.isfinite(number) for number in box) for box in parsed.boxes)
    assert all(isinstance(number, float) and math.isfinite(number) for number in parsed.confidences)
    assert parsed.label is None or (parsed.label and parsed.label == parsed.label.strip())
    assert len(parsed.problems) <= 11
    assert not (parsed.no_objects and parsed.boxes)


NUMBER = st.one_of(st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6, allow_nan=False))
BOXES = st.lists(st.tuples(st.lists(NUMBER, min_size=4, max_size=4), st.floats(0, 1)), max_size=8)
# A thought may hold anything but the tags themselves.
THOUGHT = st.text(st.characters(exclude_characters="<>", codec="utf-8"))


@settings(deadline=None)
@given(THOUGHT, BOXES, st.sampled_from(["'", '"']))
def test_a_rendered_answer_comes_back(thought: str, found: list[tuple[list[float], float]], quote: str):
    entries = [{"Position": box, "Confidence": confidence} for box, confidence in found]
    parsed = parse_answer(f"<think>{thought}</think> <answer>{entries}</answer>".replace("'", quote))
    assert parsed.thought == thought.strip().replace("'", quote)
    assert parsed.boxes == [box for box, _ in found]
    assert parsed.confidences == [confidence for _, confidence in found]
    assert parsed.no_objects is not bool(found)
    assert parsed.well_formed
    assert parsed.problems == []


@settings(deadline=None)
@given(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER))
def test_a_rendered_pair_comes_back(box: tuple[float, float, float, float]):
    assert answered("({},{}),({},{})".format(*box)).boxes == [list(box)]


@pytest.mark.parametrize(
    "unit",
    [
        *FRAGMENTS[:27],
        *("{}", "[[", "(1", "[1,", "{'Position': [", "{'Position': [1,2,3,4],", "(1,1)", "(1,1)  ", "box ", "box:"),
        *(
            "</think><answer></answer>",
            "<answer></answer>",
            "<think></think>",
            ENTRY,
            "{x",
            "'Confidence': ",
            "1.",
            "1e",
        ),
        *("score: ' ", "[1,2,3,4", "[1,2,3,4]", "(1,2),(3,4)"),
    ],
)
@pytest.mark.parametrize(
    "opening", ["", "<answer>(", "<answer>[1,", "<answer>{'Position': [", "<answer>{'Position'", "<think>"]
)
def test_adversarial_text_takes_linear_time(opening: str, unit: str):
    text = opening + unit * (100_000 // len(unit))
    start = time.perf_counter()
    parse_answer(text)
    parse_answer(text + "}</answer>")
    # Linear takes 0.05 to 0.5 s, quadratic minutes.
    assert time.perf_counter() - start < 2
