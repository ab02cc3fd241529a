"""The published rewards: the recorded outputs, the shortcut of math-verify, and a restatement of the rules.

The tables are those of sections 2.3 to 2.5 of the description that rewards/published.py is written from, obtained by
running the authors' functions and rounded as they are there; the restatement below follows the text of section 2.1.
"""

from __future__ import annotations

import json
import math
import re
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from rft_lightning.errors import ConfigConflictError
from rft_lightning.rewards import published
from rft_lightning.sample import Answer, ClassTarget, DetectionTarget, GroundingTarget

THINK = "<think>t</think> "
TRUTH = [100, 200, 300, 400]
OTHER_TRUTH = [600, 600, 800, 900]
NEAR = [100, 201, 300, 400]  # IoU .995 with TRUTH
FAR = [600, 610, 700, 700]


def entry(box: list, confidence: object = 0.9) -> str:
    return f"{{'Position': {box}, 'Confidence': {confidence}}}"


def listed(*pairs: tuple[list, object]) -> str:
    return f"[{', '.join(entry(box, confidence) for box, confidence in pairs)}]"


def tagged(content: str) -> str:
    return f"{THINK}<answer>{content}</answer>"


def solution(*boxes: list[int]) -> str:
    return f"<answer>{listed(*((box, 1) for box in boxes)) if boxes else 'No Objects'}</answer>"


def scores(text: str, solution_text: str) -> tuple[float, float]:
    answer, target = Answer(text=text), DetectionTarget([], solution_text=solution_text)
    return published.detection_iou_reward(answer, target), published.detection_confidence_reward(answer, target)


G1, G2, NONE = solution(TRUTH), solution(TRUTH, OTHER_TRUTH), solution()
ONE = listed((NEAR, 0.9))
QUARTER_DOWN, HALF_DOWN = [100, 250, 300, 400], [100, 300, 300, 400]


# ---------------------------------------------------------------- detection: table 2.3

TABLE = [
    # completion, solution, IoU reward, confidence reward, format reward
    ("single quotes", tagged(ONE), G1, 0.995, 0.9, 1),
    ("double quotes", tagged(ONE.replace("'", '"')), G1, 0.995, 0.9, 1),
    ("double brackets", tagged(f"[{ONE}]"), G1, 0.995, 0.9, 1),
    ("double brackets in Position", tagged(f"[{entry([NEAR])}]"), G1, 0.995, 0.9, 1),
    ("one box of two", tagged(ONE), G2, 0.4975, 0.9, 1),
    ("both boxes", tagged(listed((NEAR, 0.9), ([600, 601, 800, 900], 0.8))), G2, 0.9958, 0.85, 1),
    ("a false positive", tagged(listed((NEAR, 0.9), (FAR, 0.8))), G1, 0.4975, 0.55, 1),
    ("exact duplicate", tagged(listed((NEAR, 0.9), (NEAR, 0.5))), G1, 0.995, 0.9, 1),
    ("near duplicate", tagged(listed((NEAR, 0.5), ([101, 202, 300, 400], 0.9))), G1, 0.4925, 0.7, 1),
    ("wrong box, y1 of the truth", tagged(listed(([100, 200, 900, 900], 0.9))), G1, 1.0, 1.0, 1),
    ("wrong box, another y1", tagged(listed(([100, 201, 900, 900], 0.9))), G1, 0, 0.1, 1),
    ("empty list", tagged("[]"), G1, 0, 0, 1),
    ("no objects", tagged("No Objects"), G1, 0, 0, 1),
    ("empty list, none there", tagged("[]"), NONE, 0, 0, 1),
    ("no objects, none there", tagged("No Objects"), NONE, 0, 0, 1),
    ("box, none there", tagged(ONE), NONE, 0, 0, 1),
    ("missing confidence", tagged(f"[{{'Position': {NEAR}}}]"), G1, 0, 0, 1),
    ("confidence as string", tagged(listed((NEAR, "'0.9'"))), G1, 0, 0, 1),
    ("key in lower case", tagged(ONE.replace("P", "p")), G1, 0, 0, 1),
    ("three numbers", tagged(listed((NEAR[:3], 0.9))), G1, 0, 0, 1),
    ("bare dict", tagged(entry(NEAR)), G1, 0, 0, 1),
    ("trailing comma", tagged(f"[{entry(NEAR)},]"), G1, 0, 0, 1),
    ("trailing dots", tagged(f"[{entry(NEAR)}, ...]"), G1, 0, 0, 1),
    ("second element a string", tagged(f"[{entry(NEAR)}, 'x']"), G1, 0, 0, 1),
    ("confidence 90, matched", tagged(listed((NEAR, 90))), G1, 0.995, 1, 1),
    ("confidence 90, unmatched", tagged(listed((FAR, 90))), G1, 0, 0, 1),
    ("confidence -3, unmatched", tagged(listed((FAR, -3))), G1, 0, 1, 1),
    ("confidence 0, unmatched", tagged(listed((FAR, 0.0))), G1, 0, 1, 1),
    ("confidence NaN, matched", tagged(listed((NEAR, "NaN"))), G1, 0.995, math.nan, 1),
    ("confidence NaN, unmatched", tagged(listed((FAR, "NaN"))), G1, 0, math.nan, 1),
    ("malformed box, truth used up", tagged(listed((NEAR, 0.9), ([1, 2, 3], 0.1))), G1, 0.4975, 0.9, 1),
    ("malformed box first", tagged(listed((NEAR, 0.1), ([1, 2, 3], 0.9))), G1, 0, 0, 1),
    ("bare list", ONE, G1, 0.995, 0.9, 0),
    ("answer tag only", f"<answer>{ONE}</answer>", G1, 0.995, 0.9, 0),
    ("newline in the answer", tagged(f"\n{ONE}\n"), G1, 0, 0, 1),
    ("newline in the answer, no thought", f"<answer>\n{ONE}\n</answer>", G1, 0, 0, 0),
    ("truncated", f"{THINK}<answer>[{entry(NEAR)}, {{'Pos", G1, 0, 0, 0),
    ("two blocks", f"{tagged(ONE)}<answer>{listed((FAR, 0.1))}</answer>", G1, 0.995, 0.9, 1),
    ("IoU of a half", tagged(listed((HALF_DOWN, 0.9))), G1, 0, 0.1, 1),
    ("IoU of three quarters", tagged(listed((QUARTER_DOWN, 0.9))), G1, 0.75, 0.9, 1),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_detection_table(row: tuple):
    _, text, solution_text, iou, confidence, form = row
    expected = (pytest.approx(iou, abs=5e-5), pytest.approx(confidence, abs=5e-5, nan_ok=True))
    assert scores(text, solution_text) == expected
    assert published.format_reward(Answer(text=text)) == form


# ---------------------------------------------------------------- the shortcut: section 2.1, step 1

COORDINATE = st.integers(0, 1000)
BOX = st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE)


@settings(deadline=None, max_examples=150)
@given(BOX, st.lists(BOX, max_size=2), st.lists(BOX, min_size=1, max_size=2), st.booleans())
def test_the_shortcut_compares_the_first_y1(first: tuple, rest: list[tuple], truths: list[tuple], equal: bool):
    first = (first[0], truths[0][1] if equal else first[1], *first[2:])
    text = tagged(listed(*((list(box), 0.9) for box in [first, *rest])))
    assert published._verified(text, solution(*map(list, truths))) == (first[1] == truths[0][1])


@pytest.mark.parametrize("confidence", [1, 0.3])
def test_the_shortcut_compares_confidences_of_compact_boxes(confidence: float):
    compact = [f"[{{'Position':{box},'Confidence': {c}}}]" for box, c in (("[1,2,3,4]", confidence), ("[5,6,9,9]", 1))]
    said, right = (f"<answer>{content}</answer>" for content in compact)
    assert published._verified(said, right) == (confidence == 1)


def test_the_shortcut_pays_classification_for_a_number_behind_a_blank():
    target = ClassTarget("737", solution_text="<answer> 737 </answer>")
    assert published.accuracy_reward(Answer(text="<answer>I say 737 to everything else</answer>"), target) == 1
    far = ClassTarget("x", solution_text="<answer>Boeing 737</answer>")
    assert published.accuracy_reward(Answer(text="<answer>Airbus 737</answer>"), far) == 1
    assert published.accuracy_reward(Answer(text="<answer>Airbus 320</answer>"), far) == 0


def test_the_shortcut_does_not_reach_grounding():
    target = GroundingTarget([], solution_text="<answer> (200, 200),(800,800) </answer>")
    answer = Answer(text="<answer> (0, 200),(10,10) </answer>")
    assert published._verified(answer.text, target.solution_text)
    assert published.giou_reward(answer, target) < 1


@pytest.fixture
def without_math_verify(monkeypatch: pytest.MonkeyPatch):
    """As if math-verify were not installed."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    published._math_verify.cache_clear()
    published._warn_once.cache_clear()


def test_without_math_verify_there_is_no_shortcut_and_one_warning(without_math_verify: None):
    assert not published.math_verify_available()
    text = tagged(listed(([100, 200, 900, 900], 0.9)))
    with pytest.warns(UserWarning, match=r"pip install 'rft_lightning\[published-code\]'") as caught:
        found = [scores(text, G1) for _ in range(2)]
    assert found == [(0, pytest.approx(0.1))] * 2
    assert len(caught) == 1


def test_with_math_verify_nothing_is_warned_of():
    assert published.math_verify_available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores(tagged(ONE), G1) == (0.995, 0.9)


TAGGED = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "x"]), max_size=12)


@settings(deadline=None, max_examples=500)
@given(TAGGED.map("".join))
def test_tags_are_found_as_by_the_published_patterns(text: str):
    pattern = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    assert published.format_reward(Answer(text=text)) == (pattern.fullmatch(text) is not None)
    one_line, any_line = (re.search(r"<answer>(.*?)</answer>", text, flags) for flags in (0, re.DOTALL))
    assert published._one_line_answer(text) == (one_line.group(1) if one_line else text).strip()
    assert published._grounding_text(text) == (any_line.group(1) if any_line else text).strip()


@pytest.mark.parametrize("unit", ["<answer>", "<think></think><answer>", "</think>", "<think></think>\n<answer>"])
def test_repeated_tags_take_no_quadratic_time(unit: str):
    text = "<think>" + unit * (200_000 // len(unit)) + "</answer>x"
    begun = time.process_time()
    published.format_reward(Answer(text=text))
    published._one_line_answer(text)
    published._grounding_text(text)
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize("text", ["\ud800 answer 200", "answer $\\frac{", "9" * 5000, "\x00", "", "answer 1e400"])
def test_what_math_verify_cannot_take_is_not_equal(text: str):
    assert not published._verified(text, solution([1, 2, 3, 4]))


def test_an_exception_of_math_verify_is_swallowed(monkeypatch: pytest.MonkeyPatch):
    def fail(text: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(published, "_math_verify", lambda: (fail, verify))
    assert scores(tagged(ONE), G1) == (0.995, 0.9)


def test_an_alarm_that_runs_goes_on_running():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    seconds, interval = signal.setitimer(signal.ITIMER_REAL, 60, 7)
    try:
        assert published._verified(tagged(ONE), solution(NEAR))
        left, again = signal.getitimer(signal.ITIMER_REAL)
        assert 30 < left <= 60
        assert again == pytest.approx(7)
        # One that comes due in the meantime rings afterwards.
        signal.setitimer(signal.ITIMER_REAL, 1e-4)
        with published._alarm_restored():
            signal.setitimer(signal.ITIMER_REAL, 0)
            time.sleep(0.01)
        time.sleep(0.01)
        assert len(rung) == 1
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, seconds, interval)


def test_no_alarm_is_left_where_none_was():
    seconds, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        assert published._verified(tagged(ONE), solution(NEAR))
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, seconds, interval)


def test_outside_of_the_main_thread_there_is_no_shortcut():
    published._warn_once.cache_clear()
    text = tagged(listed(([100, 200, 900, 900], 0.9)))
    with pytest.warns(UserWarning, match="main thread"):
        found = ThreadPoolExecutor(1).submit(scores, text, G1).result(timeout=60)
    assert found == (0, pytest.approx(0.1))


@pytest.mark.parametrize(
    "reward",
    [
        published.accuracy_reward,
        published.detection_iou_reward,
        published.detection_confidence_reward,
        published.giou_reward,
        published.grounding_iou_reward,
    ],
)
def test_a_missing_solution_text_is_a_conflict(reward):
    with pytest.raises(ConfigConflictError, match="solution_text is None"):
        reward(Answer(text="rose"), ClassTarget("rose"))


# ---------------------------------------------------------------- detection: the rules restated from 2.1


def restated(text: str, truth: str) -> tuple[float, float]:
    """Both rewards, number by number from the text of section 2.1 (its steps in the comments)."""
    try:  # 1
        if float(verify(parse(text), parse(truth))) > 0:
            return 1.0, 1.0
    except Exception:
        pass
    try:
        outcomes, n_truths = _outcomes(text, truth)
        # 8: the sums of both are taken for either reward.
        overlap = sum((iou for iou, _ in outcomes), 0.0)
        honesty = sum((c if iou != 0 else 1 - c for iou, c in outcomes), 0.0)
        iou_reward, confidence_reward = overlap / max(n_truths, len(outcomes)), honesty / len(outcomes)
    except Exception:  # 5
        return 0.0, 0.0
    iou_reward = 1.0 if iou_reward > 1 else iou_reward
    if not math.isnan(confidence_reward):
        confidence_reward = sorted([0.0, confidence_reward, 1.0])[1]
    return iou_reward, confidence_reward


def _outcomes(text: str, truth: str) -> tuple[list[tuple[float, float]], int]:
    blocks = re.findall("<answer>(.*?)</answer>", text)  # 2
    said = "<answer>" + (blocks[0] if blocks else text).strip() + "</answer>"
    for old, new in (("[[", "["), ("]]", "]"), ("\n", "")):  # 3
        said = said.replace(old, new)
    predictions, truths = _boxes(said), _boxes(truth.strip())
    assert isinstance(predictions[0], dict)  # 5
    unique: dict[tuple, dict] = {}
    for prediction in predictions:  # 6
        unique.setdefault(tuple(prediction["Position"]), prediction)
    remaining = list(unique.values())
    outcomes = []
    # 7
    remaining.sort(key=lambda prediction: prediction["Confidence"], reverse=True)
    taken: set[int] = set()
    for prediction in remaining:
        overlaps = [
            (_overlap(box["Position"], prediction["Position"]), -i) for i, box in enumerate(truths) if i not in taken
        ]
        best, index = max(overlaps, default=(0.0, 0))  # the first of equal ones
        if best > 0.5:
            taken.add(-index)
        outcomes.append((best if best > 0.5 else 0, prediction["Confidence"]))
    return outcomes, len(truths)


def _boxes(text: str) -> list:
    content = text.split("<answer>", 1)[1].split("</answer>", 1)[0]  # 4
    if content[-1:] != "]":
        end = content.rfind("},")
        content = (content if end < 0 else content[:end]) + "}]"
    return json.loads(content.replace("'", '"'))


def _overlap(a: list, b: list) -> float:
    (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) = a, b
    width = min(right, other_right) - max(left, other_left)
    height = min(bottom, other_bottom) - max(top, other_top)
    if width <= 0 or height <= 0:
        return 0.0
    areas = (right - left) * (bottom - top) + (other_right - other_left) * (other_bottom - other_top)
    return width * height / (areas - width * height)


BIG = "9" * 400
# Few values, so that boxes overlap (by a half at least, most of them), repeat and tie.
EDGES = [st.sampled_from(values) for values in ([0, 1], [0, 1, 2, 3, 6], [11, 12], [9, 10, 11, 12])]
TIDY = st.tuples(*EDGES).map(list) | st.tuples(*[st.integers(0, 12)] * 4).map(list)
CONFIDENCE = st.sampled_from(["0", "0.0", "1", "0.5", "0.50", "0.9", "0.91", "90", "-3", "1e3"])
ODD_CONFIDENCE = st.sampled_from(["NaN", "Infinity", "-Infinity", "true", "false", "null", "None", "'0.9'", "[1]", BIG])
ODD_POSITIONS = ["[1, 2, 3]", "[]", "null", "7", "'1, 2, 3, 4'", "'abcd'", "[[1, 2, 9, 9]]", "[[1], 2, 3, 4]"]
ODD_POSITIONS += ["(1, 2, 3, 4)", "[1, 2, 'a', 4]", "[1, 2, NaN, 9]", "[0.0, 0.5, 9.25, 9]", "[0, 0, Infinity, 9]"]
ODD_POSITIONS += ["{'x': 1}", f"[0, 0, {BIG}, 9]"]
LISTS = ["[{}]"] * 30 + ["[[{}]]", "{}", "[{},]", "[{}, ...]", "[{}]]", "[{}] ", "\n[{}]\n"]
TAGGED = ["<think>t</think> <answer>{}</answer>"] * 4 + [
    "<answer>{}</answer>",
    "{}",
    "  {}\n",
    "<answer>{}",
    "{}</answer>",
]
TAGGED += ["<answer> {} </answer><answer>[]</answer>", "<answer>\n</answer><answer>{}</answer>"]
TAGGED += ["<answer><answer>{}</answer></answer>", "I answer 3 <answer>{}</answer>"]


@st.composite
def entries(draw) -> str:
    """A dict, now and then with something odd about it."""
    odd = draw(st.integers(0, 7))
    position = draw(st.sampled_from(ODD_POSITIONS)) if odd == 0 else str(draw(TIDY))
    confidence = draw(ODD_CONFIDENCE) if odd == 1 else draw(CONFIDENCE)
    if odd == 2:
        return draw(st.sampled_from(["'x'", "7", "null", "{}", "[]", f"{{'Position': {position}}}", "..."]))
    return f"{{'Position': {position}, 'Confidence': {confidence}}}"


@st.composite
def completions(draw) -> str:
    """Box lists that are nearly right: quotes, nesting, tails, line breaks, tags and truncation vary."""
    content = draw(st.sampled_from([", ", ",", ",\n"])).join(draw(st.lists(entries(), max_size=5)))
    content = draw(st.sampled_from(LISTS)).format(content)
    if draw(st.booleans()):
        content = content.replace("'", '"')
    text = draw(st.sampled_from(TAGGED)).format(content)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 5)) == 0 else text


ODD_SOLUTIONS = [NONE, "<answer>[]</answer>", "<answer>[7]</answer>", "<answer>[[0, 0, 9, 9]]</answer>"]
ODD_SOLUTIONS += [f" <answer>{listed(([0, 0, 9, 9], 1))}</answer>\n", listed(([0, 0, 9, 9], 1))]
SOLUTIONS = st.lists(TIDY, min_size=1, max_size=4).map(lambda boxes: solution(*boxes)) | st.sampled_from(ODD_SOLUTIONS)
PIECES = ["<answer>", "</answer>", "<think>", "</think>", "\n", " ", " 4", entry([0, 0, 9, 9]), *"[]{},:'\"1.", "},"]
PIECES += ["Position", "Confidence", "'Position': [0, 0, 9, 9]", "'Confidence': 1", "NaN", "answer"]


def equal(found: tuple[float, float], expected: tuple[float, float]) -> bool:
    """To the last bit, NaN included."""
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, expected, strict=True))


@settings(deadline=None, max_examples=400)
@given(completions() | st.lists(st.sampled_from(PIECES), max_size=25).map("".join), SOLUTIONS)
# Equal confidences keep their order: the second box would overlap more.
@example(tagged(listed(([0, 2, 12, 9], 0.5), ([0, 1, 12, 9], 0.5))), solution([0, 0, 12, 9]))
# Of two truths of equal overlap the first one is taken, and the second prediction needs it.
@example(tagged(listed(([0, 1, 9, 8], 0.5), ([0, 2, 9, 9], 0.4))), solution([0, 0, 9, 8], [0, 1, 9, 9]))
# An IoU of a half takes no truth away.
@example(tagged(listed((HALF_DOWN, 0.9), (NEAR, 0.5))), G1)
@example(tagged(listed((QUARTER_DOWN, 0.5), (NEAR, 0.9))), G1)
@example(tagged(f"[{ONE}]"), G1)
@example(ONE.replace("Position", "Posi\ntion"), G1)
@example(tagged(f"[{entry(NEAR)},{entry(FAR)},{entry(FAR)[:-4]}"), G1)
@example(tagged(listed((NEAR, True))), G1)
@example(tagged(listed((NEAR, "true"))), G1)
@example(tagged(listed((NEAR, "9" * 400))), G1)
@example(tagged(listed((NEAR, "9" * 5000))), G1)
@example(tagged(listed((NEAR, 0.9), (NEAR, "NaN"))), G1)
@example(tagged(listed((NEAR, 0.9), (FAR, "null"))), G1)
@example(tagged(f"{entry(NEAR)},{entry(FAR)}"), G1)
@example("</answer>" + tagged(ONE), G1)
@example(tagged(f"[[{entry(NEAR)}], [{entry(FAR)}]]"), G1)
@example(tagged("[" * 3000), G1)
def test_published_detection_is_what_the_description_says(text: str, truth: str):
    found = scores(text, truth)
    assert all(isinstance(value, float) for value in found)
    assert equal(found, restated(text, truth)), (found, restated(text, truth))


# ---------------------------------------------------------------- classification: table 2.4

SEDAN, ORCHID, PRIMROSE = "2012 Acura RL Sedan", "hard-leaved pocket orchid", "pink primrose"


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("<answer>p</answer>", PRIMROSE, 1),
        ("<answer></answer>", PRIMROSE, 1),
        ("", PRIMROSE, 1),
        ("<answer>rose or pink primrose or lily</answer>", PRIMROSE, 1),
        ("I would say that it is a pink primrose, surely.", PRIMROSE, 1),
        ("<think>Pink_primrose?</think><answer>\nlily\n</answer>", PRIMROSE, 1),
        ("<think>a flower</think><answer>\nlily\n</answer>", PRIMROSE, 0),
        ("<answer>Sedan</answer>", SEDAN, 1),
        ("<answer>2012</answer>", SEDAN, 1),
        ("<answer>20</answer>", SEDAN, 1),
        ("<answer>Acura RL Sedan 2012</answer>", SEDAN, 0),
        ("<answer>7</answer>", "737-200", 1),
        ("<answer>hard leaved pocket orchid</answer>", ORCHID, 0),
        ("<answer>Hard-Leaved_pocket orchid</answer>", ORCHID, 1),
    ],
)
def test_classification_table(text: str, label: str, expected: float):
    target = ClassTarget(label, solution_text=f"<answer>{label}</answer>")
    assert published.accuracy_reward(Answer(text=text), target) == expected


WORDS = st.lists(st.sampled_from(["rose", "Rose", "pink", "_", " ", "-", "20", " 12", "lily"]), max_size=5).map("".join)
FRAMES = st.sampled_from(
    ["<answer>{}</answer>", "<think>pink</think> <answer> {} </answer>", "<answer>\n{}</answer>", "{}"]
)


@settings(deadline=None)
@given(WORDS, FRAMES, WORDS)
def test_published_accuracy_is_what_the_description_says(words: str, frame: str, label: str):
    text, truth = frame.format(words), f"<answer>{label}</answer>"
    said, right = (re.search("<answer>(.*?)</answer>", side) for side in (text, truth))
    names = [match[1] if match else side for match, side in ((said, text), (right, truth))]
    a, b = (re.sub("[ _]", "", name.strip()).lower() for name in names)
    shortcut = bool(verify(parse(text), parse(truth)))
    target = ClassTarget(label, solution_text=truth)
    assert published.accuracy_reward(Answer(text=text), target) == float(shortcut or a in b or b in a)


# ---------------------------------------------------------------- grounding: table 2.5


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("(200,200),(800,800)", 2.0),
        ("(300,300),(900,900)", 1.491),
        ("(0,0),(100,100)", 0.578),
        ("(0,0),(1000,1000)", 1.36),
        ("(500,500),(500,500)", 1.0),
        ("(900,900),(100,100)", 2.78),
        ("(1000,1000),(0,0)", 3.78),
        ("(9000,9000),(0,0)", 226),
        ("(900,200),(100,800)", -0.33),
        ("(200,200),(800,800) (400,400),(900,900)", 1.11),
        ("(200.0,200.0),(800.0,800.0)", 0),
        ("[200,200,800,800]", 0),
        ("nothing", 0),
    ],
)
@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", "<think>t</think>\n<answer>\n{}\n</answer>"])
def test_grounding_table(content: str, expected: float, frame: str):
    target = GroundingTarget([], solution_text="<answer> (200,200),(800,800) </answer>")
    value = published.giou_reward(Answer(text=frame.format(content)), target)
    assert value == pytest.approx(expected, abs=5e-3)
