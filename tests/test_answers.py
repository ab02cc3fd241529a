"""The parser of model text: what it reads, what it drops, and that nothing makes it raise or crawl."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft_lightning import answers
from rft_lightning.answers import PROBLEM_KINDS, ParsedAnswer, Problem, parse_answer
from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import Answer
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask, PresenceTask

ENTRY = "{'Position': [1, 2, 30, 40], 'Confidence': 0.9}"
# The same in the digits and signs of a Chinese keyboard.
FULL_WIDTH = (
    "\uff3b\uff5b\u2018Position\u2019\uff1a\uff3b\uff11\uff0c2\uff0c\uff13\uff10\uff0c40\uff3d, "
    "\u201cConfidence\u201d\uff1a0\uff0e9\uff5d\uff3d"
)
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
        "[{'Position': (1, 2, 30, 40), 'Confidence': 0.9}]",
        "[{'Position': [(1, 2, 30, 40)], 'Confidence': 0.9}]",
        "[{'Position': ['1', '2', \"30\", \"40\"], 'Confidence': '0.9'}]",
        "[{'Position': '[1, 2, 30, 40]', 'Confidence': 0.9}]",
        "[{'label': 'box: red', 'Position': [1, 2, 30, 40], 'Confidence': 0.9}]",
        FULL_WIDTH,
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
        "{'Position': [1, 2, 3, 1e308], 'Confidence': 0.9}",
        "{'Position': [1, 2, 3, 9007199254740994], 'Confidence': 0.9}",
        "{'Position': [1, 2, 3, \u0664], 'Confidence': 0.9}",
        "{'Position': [1, 2, 3, \u00b2], 'Confidence': 0.9}",
        "{'Position': [1, 2, 3, None], 'Confidence': 0.9}",
        "{'Position': None, 'Confidence': 0.9}",
        "{'Position': [1, 2, 3, 4], 'Confidence': 1e308}",
        "{'Position': [1, 2, 3, 4], 'Confidence': }",
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
        ("(1, 2, 30, 40)", [[1, 2, 30, 40]]),
        ("\uff3b\uff11\uff10\uff10\uff0c\uff12\uff0c\uff13\uff10\uff10\uff0c40\uff3d", [[100, 2, 300, 40]]),
        ("[\u0661\u0660, 2, 30, 40]", []),
        ("```json\n[1, 2, 30, 40]\n```", [[1, 2, 30, 40]]),
        (f"[{'0' * 5000}1, 2, 30, 40]", [[1, 2, 30, 40]]),
        (f"[{'9' * 5000}, 2, 30, 40]", []),
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
    [
        *("No Objects", "no object.", "'No Objects'", ' "NO\n OBJECTS." ', "none", "None.", "[]", "[ ]"),
        *("```json\n[]\n```", "```\nNo Objects\n```", "\uff3b\uff3d", "\u201cNo Objects\u201d"),
    ],
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
        ("<answer>rose<answer>tulip</answer>", "rose", 2, "answer block not closed"),
        ("<answer>rose<answer>tulip</answer>", "rose", 2, "2 answer blocks, the first one counts"),
        ("<think>t</think>rose</answer>", "rose", 0, "no answer block"),
        ("<ans<think></think>wer>rose", "<ans\nwer>rose", 0, "no answer block"),
        # Tags are lower case, as the question asks for them.
        ("<ANSWER>rose</ANSWER>", "<ANSWER>rose</ANSWER>", 0, "no answer block"),
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


def test_a_fence_around_the_tags_changes_no_box():
    text = f"```json\n<answer>[{ENTRY}]</answer>\n```"
    assert parse_answer(text).boxes == [[1, 2, 30, 40]]
    assert not parse_answer(text).well_formed
    assert parse_answer(f"<think>t</think>\n```json\n[{ENTRY}]\n```").boxes == [[1, 2, 30, 40]]


def test_a_full_width_answer_is_kept_as_written():
    assert answered("\uff3b\uff11\uff0c\uff12\uff3d").label == "\uff3b\uff11\uff0c\uff12\uff3d"


def test_an_entry_in_the_text_of_another_gives_no_box_of_confidence_1():
    parsed = answered("[{'label': 'a {b}', 'Position': [1, 2, 3, 4], 'Confidence': 0.1}]")
    assert (parsed.boxes, [problem.kind for problem in parsed.problems]) == ([], ["entry_without_box"])


# ---------------------------------------------------------------- points


@pytest.mark.parametrize(
    ("content", "points"),
    [
        ("[{'Point': [1, 2]}]", [[1, 2]]),
        ('[{"point_2d": [1, 2], "label": "cat"}, {"point": (3.5, "4")}]', [[1, 2], [3.5, 4]]),
        ("{point: [1, 2]}, {'POINT': [1, 2, 3]}, {'point': [1, NaN]}, {'point': 'here'}", [[1, 2]]),
        ("(1,2)", [[1, 2]]),
        ("[1, 2] and [3, 4]", [[1, 2], [3, 4]]),
        ("[[1, 2], (3, 4,)]", [[1, 2], [3, 4]]),
        ("\uff08\uff11\uff0c\uff12\uff09", [[1, 2]]),
        ("(1,1e999)", []),
        ("(1,2,3)", []),
        # Parts of a box, read or dropped, and leftovers beside one.
        ("(1,2),(3,4)", []),
        ("(1,2),(3,1e999)", []),
        ("(1,2),(3,4),(5,6)", []),
        ("[1,2,3,4] (5,6)", []),
        ("[{'Position': [1, 2]}]", []),
        ("[{'Position': [1, NaN, 2, 3]}] (5,6)", []),
        ("[{'point': [1, NaN]}] (5,6)", []),
        ("[{'point': [5,6]", []),
    ],
)
def test_points(content: str, points: list[list[float]]):
    assert answered(content).points == points


def test_an_entry_may_have_a_box_and_a_point():
    parsed = answered("[{'bbox_2d': [1, 2, 30, 40], 'score': 0.5, 'point_2d': [5, 6]}]")
    assert (parsed.boxes, parsed.confidences, parsed.points) == ([[1, 2, 30, 40]], [0.5], [[5, 6]])
    assert parsed.problems == []


def test_a_point_needs_no_confidence():
    assert answered("[{'Point': [1, 2]}]").problems == []


# ---------------------------------------------------------------- problems

KINDS = {
    "no_answer_block": "rose",
    "repeated_answer_block": "<answer>a</answer><answer>b</answer>",
    "answer_not_closed": "<answer>a",
    "think_not_closed": "<think>t <answer>a</answer>",
    "empty_answer": "<answer></answer>",
    "entry_without_box": "<answer>{'Confidence': 1}</answer>",
    "entry_cut_off": "<answer>[{'Posi</answer>",
    "box_malformed": "<answer>{'Position': [1, 2, 3], 'Confidence': 1}</answer>",
    "box_not_finite": "<answer>[1, 2, 3, 1e400]</answer>",
    "confidence_missing": "<answer>{'Position': [1, 2, 3, 4]}</answer>",
    "confidence_malformed": "<answer>{'Position': [1, 2, 3, 4], 'Confidence': 'high'}</answer>",
    "point_malformed": "<answer>{'Point': [1]}</answer>",
    "box_without_area": "<answer>{'Position': [5, 5, 1, 9], 'Confidence': 1}</answer>",
    "box_outside_frame": "<answer>{'Position': [5, 5, 1001, 9], 'Confidence': 1}</answer>",
    "point_outside_frame": "<answer>(5,-1)</answer>",
    "no_decision": "<answer>perhaps</answer>",
    "more": f"<answer>{'{}' * 30}</answer>",
}


def test_every_kind_of_problem_has_its_text():
    for kind, text in KINDS.items():
        task = PresenceTask() if kind == "no_decision" else DetectionTask()
        problems = task.read(text, CoordinateFrame(), (640, 480)).problems
        others = {"entry_without_box"} if kind == "more" else set()
        assert {problem.kind for problem in problems} == {kind} | others
    assert set(KINDS) == set(PROBLEM_KINDS)


@pytest.mark.parametrize("content", ["rose", "(1,2),(3,4)", "[1,2,3,4]", "No Objects", "(1,2)"])
def test_an_answer_without_entries_is_no_problem(content: str):
    assert answered(content).problems == []


def test_the_list_of_problems_is_capped():
    problems = answered("{'Position': [1]}" * 30).problems
    assert len(problems) == 11
    assert problems[-1] == "and 20 more"
    assert problems[-1].kind == "more"


def test_the_cap_keeps_one_problem_of_every_kind():
    entries = [
        *["{'Position': [1]}"] * 30,
        "{'Position': [1, 2, 3, NaN], 'Confidence': 1}",
        "{'Position': [1, 2, 3, 4]}",
        "{'Position': [1, 2, 3, 4], 'Confidence': x}",
        "{'Point': [1]}",
        "{}",
        "{'Position'",
    ]
    problems = parse_answer(f"<think><answer>{', '.join(entries)}<answer>").problems
    kinds = ["think_not_closed", "repeated_answer_block", "answer_not_closed", "box_malformed", "box_not_finite"]
    kinds += ["confidence_missing", "confidence_malformed", "point_malformed", "entry_without_box", "entry_cut_off"]
    assert [problem.kind for problem in problems] == [*kinds, "more"]
    assert problems[-1] == "and 29 more"


def test_a_problem_is_its_text_and_survives_copies():
    problem = Problem("empty_answer", "empty answer")
    for other in (problem, copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert (other, other.kind, isinstance(other, str)) == ("empty answer", "empty_answer", True)


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("text", "label", "parsed"),
    [
        ("<think>t</think><answer>rose</answer>", "rose", True),
        # The label as it is: the reward refuses the hedge.
        ("<answer>A or B or C</answer>", "A or B or C", True),
        ("<answer>Rose (1,2)</answer> done", "Rose (1,2)", True),
        ("<answer>{rose}</answer>", "{rose}", True),
        ("<answer>rose</answer><answer>tulip</answer>", "rose", False),
        ("rose", "rose", False),
        ("<answer>rose", "rose", False),
        ("<answer></answer>", None, False),
        ("", None, False),
    ],
)
def test_classification_reads_one_closed_block(text: str, label: str | None, parsed: bool):
    answer = ClassificationTask().read(text, CoordinateFrame(), (640, 480))
    assert (answer.label, answer.parsed, len(answer.boxes), len(answer.points)) == (label, parsed, 0, 0)


def grounded(content: str, frame: CoordinateFrame | None = None) -> Answer:
    return GroundingTask().read(f"<answer>{content}</answer>", frame or CoordinateFrame(), (640, 480))


def detected(content: str) -> Answer:
    return DetectionTask().read(f"<answer>{content}</answer>", CoordinateFrame(), (640, 480))


def test_points_are_pixels_of_the_original_image():
    content = "[{'point_2d': [500, 250]}, {'point_2d': [1000, 1000]}, {'point_2d': [0, 1001]}]"
    for answer in (grounded(content), detected(content)):
        assert answer.points.tolist() == [[320.0, 120.0], [640.0, 480.0]]
        assert [problem.kind for problem in answer.problems] == ["point_outside_frame"]
    # A processor that halves the picture: what it shows at (320, 240) is at the far corner of the original.
    resized = CoordinateFrame("resized", factor=20, min_pixels=400, max_pixels=320 * 240)
    assert grounded("(320,240)", resized).points.tolist() == [[640.0, 480.0]]


@pytest.mark.parametrize(
    ("content", "boxes", "points", "parsed", "kinds"),
    [
        ("(0,0),(500,500)", 1, 0, True, []),
        ("(500,500)", 0, 1, True, []),
        ("(500,1001)", 0, 0, False, ["point_outside_frame"]),
        ("[{'bbox_2d': [0,0,9,9], 'score': 1, 'point_2d': [4,4]}, {'bbox_2d': [0,0,1,1], 'score': 1}]", 1, 1, True, []),
        ("(500,500),(0,0)", 0, 0, False, ["box_without_area"]),
        ("(0,0),(500,1001)", 0, 0, False, ["box_outside_frame"]),
        ("No Objects", 0, 0, False, []),
        ("the cat", 0, 0, False, []),
    ],
)
def test_grounding_reads_one_box_or_points(content: str, boxes: int, points: int, parsed: bool, kinds: list[str]):
    answer = grounded(content)
    assert (len(answer.boxes), len(answer.confidences), len(answer.points), answer.parsed) == (
        *(boxes, boxes, points),
        parsed,
    )
    assert [problem.kind for problem in answer.problems] == kinds


def test_detection_keeps_wrong_boxes_and_says_so():
    answer = detected("[{'Position': [9, 9, 1, 1], 'Confidence': 2}, {'Position': [0, 0, 2000, 9], 'Confidence': 0.5}]")
    assert answer.boxes.shape == (2, 4)
    assert answer.confidences.tolist() == [1.0, 0.5]
    assert answer.parsed
    assert [problem.kind for problem in answer.problems] == ["box_without_area", "box_outside_frame"]


@pytest.mark.parametrize(
    ("content", "parsed"), [("No Objects", True), ("[]", True), ("(1,2),(3,4)", True), ("(1,2)", False), ("cat", False)]
)
def test_detection_is_parsed_with_boxes_or_no_objects(content: str, parsed: bool):
    assert detected(content).parsed is parsed


# ---------------------------------------------------------------- any text


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
TOKENS = [*FRAGMENTS, "Point", "1e308", "```json\n", "<ANSWER>", "\uff3b", "\uff11", "\uff0c", "\x00", "\ud800", "\\"]
TOKENS += ["\U0001f600", "{'Position': [", "{'Position': (1, 2, 30, 40)}", "(1,2)", "[1,2]", "\u201c", "0" * 5000]


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from(TOKENS), max_size=60).map("".join)))
def test_any_text_is_read(text: str):
    parsed = parse_answer(text)
    assert parse_answer(text) == parsed
    assert len(parsed.boxes) == len(parsed.confidences)
    assert all(len(box) == 4 and all(math.isfinite(number) for number in box) for box in parsed.boxes)
    assert all(isinstance(number, float) and math.isfinite(number) for number in parsed.confidences)
    assert parsed.label is None or (parsed.label and parsed.label == parsed.label.strip())
    assert len(parsed.problems) <= 11
    assert all(len(point) == 2 and all(math.isfinite(number) for number in point) for point in parsed.points)
    assert all(problem.kind in PROBLEM_KINDS for problem in parsed.problems)
    assert not (parsed.no_objects and (parsed.boxes or parsed.points))
    # What was read, put into a clean answer, is read as the same.
    if parsed.label is not None:
        again = parse_answer(f"<answer>{parsed.label}</answer>")
        assert (again.label, again.no_objects, again.points) == (parsed.label, parsed.no_objects, parsed.points)
        assert (again.boxes, again.confidences) == (parsed.boxes, parsed.confidences)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(TOKENS), max_size=40).map("".join))
def test_tasks_read_any_text(text: str):
    for task in (ClassificationTask(), DetectionTask(), GroundingTask(), PresenceTask()):
        answer = task.read(text, CoordinateFrame(), (640, 480))
        assert answer.text == text
        assert answer.boxes.isfinite().all()
        assert answer.points.isfinite().all()
        assert ((answer.confidences >= 0) & (answer.confidences <= 1)).all()


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


EDITS = [*FRAGMENTS, "Infinity", "null", "true", "1e999", "1" + "0" * 5000, "\\", "\\u0031", "01", "-0", "1.", ", {}"]
EDITS += [
    "'Position': [5, 5, 6, 6], ",
    "'Confidence': 1, ",
    "'label': 'cat', ",
    "{'Position': 1234, 'Confidence': 1}, ",
]


@settings(deadline=None, max_examples=400)
@given(BOXES, st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.sampled_from(EDITS)), max_size=3))
def test_the_shorter_way_of_reading_clean_entries_reads_what_the_longer_one_does(found, edits):
    text = str([{"Position": box, "Confidence": confidence} for box, confidence in found])
    for place, deleted, edit in edits:
        start = int(place * len(text))
        text = text[:start] + edit + text[start + deleted :]
    shorter = answered(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "_read_clean_entries", lambda *arguments: False)
        assert repr(answered(text)) == repr(shorter)


def test_lists_in_the_place_of_entries_are_none():
    content = "[{'Position': [1, 2, 3, 4], 'Confidence': 1}, [['Position', [5, 6, 7, 8]], ['Confidence', 0.5]]]"
    assert answered(content).boxes == [[1, 2, 3, 4]]


def test_clean_entries_take_the_shorter_way(monkeypatch):
    monkeypatch.setattr(answers, "_read_entries", None)
    assert answered(str([{"Position": [1, 2.5, 3, 4], "Confidence": 0.9}] * 2)).boxes == [[1, 2.5, 3, 4]] * 2


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
    start = time.process_time()
    parse_answer(text)
    parse_answer(text + "}</answer>")
    # Linear takes 0.05 to 1 s, quadratic minutes.
    assert time.process_time() - start < 4


HOSTILE = ["[", "{", "(", "<think>", "<answer>", "<answer><think>", "{{{{", "[[[[", "7", "1e308,", "-", " ", "\n", "'"]
HOSTILE += ['"', "\\", "{'Position': [", "\uff3b", "\uff5b", "\uff11", "\x00", "\ud800", "\U0001f600", "[1,2]", "}{"]
HOSTILE += ["{'Position': [1,2,3,4]}", "{'point': (1,2)}", "position:[", "position: ", "(1,2),(", "[ 1 , 2 ,", "```\n"]


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("opening", ["", "<answer>", "<answer>{'Position': [1,"])
def test_time_grows_as_the_text_does(opening: str, unit: str):
    texts = [opening + unit * (size // len(unit)) for size in (50_000, 200_000)]
    assert any(_grows_linearly(*texts) for _ in range(6))


def _grows_linearly(short: str, long: str) -> bool:
    """Whether a text four times as long takes less than eight times as long: linear is 4, quadratic 16.

    A busy machine spoils one measurement or another; what is quadratic is so in each.
    """
    return _seconds(long) < 8 * max(_seconds(short), 0.02)


def _seconds(text: str) -> float:
    """In processor time and without garbage collection, which grows with what lives elsewhere."""
    gc.disable()
    try:
        start = time.process_time()
        parse_answer(text)
        return time.process_time() - start
    finally:
        gc.enable()
