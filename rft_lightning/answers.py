"""parse_answer: what a completion says, in the numbers it was written in.

The only parser of model text (rewards/published.py excepted, which reproduces the authors' own). It never raises and
takes time linear in the length of the text: no two neighbouring quantifiers of a pattern can match the same character.
Nothing here knows pixels; :class:`rft_lightning.frames.CoordinateFrame` turns what is written into pixels.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

ProblemKind = Literal[
    "no_answer_block",
    "repeated_answer_block",
    "answer_not_closed",
    "think_not_closed",
    "empty_answer",
    "entry_without_box",
    "entry_cut_off",
    "box_malformed",
    "box_not_finite",
    "box_without_area",
    "box_outside_frame",
    "confidence_missing",
    "confidence_malformed",
    "point_malformed",
    "point_outside_frame",
    "no_decision",
    "more",
]
PROBLEM_KINDS: tuple[ProblemKind, ...] = get_args(ProblemKind)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Models trained on Chinese text write full-width brackets, digits and commas, and typographic quotes.
_TO_ASCII = {0xFF01 + offset: 0x21 + offset for offset in range(94)} | str.maketrans(
    "\u201c\u201d\u2018\u2019", "\"\"''"
)


def _key(*names: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z0-9_])(?:{'|'.join(names)})[\"']?\s*[:=]\s*", re.IGNORECASE)


def _bracketed(count: int) -> str:
    """Pattern of so many numbers in round or in square brackets, a group for each."""
    numbers = r"\s*,\s*".join([f"({_NUMBER})"] * count) + r"\s*(?:,\s*)?"
    return rf"\(\s*{numbers}\)|\[\s*{numbers}\]"


_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_WHOLE_NUMBER = re.compile(_NUMBER)
_NOT_FINITE = re.compile(r"[-+]?(?:nan|inf|infinity)", re.IGNORECASE)
_CORNER = rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)"
_CORNERS = re.compile(rf"{_CORNER}\s*(?:,\s*)?{_CORNER}")
_FOUR_NUMBERS = re.compile(_bracketed(4))
_TWO_NUMBERS = re.compile(_bracketed(2))

# Innermost braces: entries inside {"objects": [{...}]} are found, and a list that is cut off keeps its whole entries.
_ENTRY = re.compile(r"\{[^{}]*\}")
_BOX_NAMES, _POINT_NAMES = ("position", "bbox_2d", "bbox", "box"), ("point_2d", "point")
_BOX_KEY, _POINT_KEY, _ANY_KEY = _key(*_BOX_NAMES), _key(*_POINT_NAMES), _key(*_BOX_NAMES, *_POINT_NAMES)
_CONFIDENCE = re.compile(_key("confidence", "score").pattern + r"[\"']?\s*([^\s\"',{}]*)", re.IGNORECASE)
_BRACKETS = r"(?:\[([^\[\]()]*)\]|\(([^\[\]()]*)\))"
_VALUE = re.compile(rf"[\"']?\s*(?:{_BRACKETS}|[\[(]\s*{_BRACKETS}\s*(?:,\s*)?[\])])")

_FENCE = re.compile(r"\A```\w*[ \t]*\r?\n")
# Beyond it integers are not exact in float64, and products of larger ones overflow: no coordinate, no confidence.
_MAX_NUMBER = 2**53
_MAX_PROBLEMS = 10


class Problem(str):
    """What is wrong with an answer, in words; `kind` is one of :data:`PROBLEM_KINDS`, to count by."""

    __slots__ = ("kind",)
    kind: ProblemKind

    def __new__(cls, kind: ProblemKind, text: str) -> Problem:
        problem = super().__new__(cls, text)
        problem.kind = kind
        return problem

    def __getnewargs__(self) -> tuple[ProblemKind, str]:  # type: ignore[override]
        # Copies and pickles call __new__ with these.
        return self.kind, str(self)


@dataclass
class ParsedAnswer:
    """A completion taken apart; coordinates and confidences are the numbers as written.

    Attributes:
        thought: the text of the (first) think block, stripped; None without one.
        label: the text of the answer, stripped; None where there is none.
        boxes: K lists of four finite numbers (x1, y1, x2, y2) in the unit of the model; integers stay integers.
        confidences: K finite numbers, not clamped; 1.0 where none was written.
        well_formed: exactly one think block followed by exactly one answer block and nothing else but whitespace.
        no_objects: the answer is "No Object(s)", "None" or an empty list.
        answer_blocks: number of ``<answer>`` tags; 0 for an untagged answer.
        problems: what was wrong with the text, why something was dropped; at most 10 (but one of every kind that
            occurs) and one of kind ``more`` that counts the rest.
        points: K' lists of two finite numbers (x, y) in the unit of the model.
    """

    thought: str | None = None
    label: str | None = None
    boxes: list[list[float]] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    well_formed: bool = False
    no_objects: bool = False
    answer_blocks: int = 0
    problems: list[Problem] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)


def parse_answer(text: str) -> ParsedAnswer:
    """Read a completion: thought, answer text, and the boxes and points in it. Never raises, whatever the text.

    The answer is the text of the first ``<answer>`` block, over any number of lines; an unclosed block runs to the next
    one or to the end, and without a block the text around the think block counts. Tags are lower case, as the question
    asks for them: ``<ANSWER>`` is text.

    Boxes are looked for as entries ``{'Position': [x1, y1, x2, y2], 'Confidence': c}`` first (JSON or Python; keys in
    any case; also box, bbox, bbox_2d and score; single or double quotes or none, around numbers too; tuples or lists),
    each kept or dropped on its own. Points are entries with Point or point_2d and two numbers. Only where no entry
    names a box or a point, ``(x1,y1),(x2,y2)`` pairs are read, where there are none plain lists of four numbers, and
    where there are none either plain points ``(x,y)`` or ``[x,y]``, boxes with confidence 1.

    Numbers are ASCII; full-width digits, brackets and commas are read as theirs, other digits are not numbers. NaN,
    infinity and whatever is beyond 2**53 is no coordinate and no confidence.

    Args:
        text: a completion, special tokens left in or out.

    Returns:
        The parts, with ``boxes`` and ``confidences`` of equal length and every number finite.
    """
    parsed = ParsedAnswer(well_formed=_is_well_formed(text), answer_blocks=text.count("<answer>"))
    parsed.thought = _read_thought(text, parsed.problems)
    label = _read_label(text, parsed.problems)
    if label:
        parsed.label = label
        content = label if label.isascii() else label.translate(_TO_ASCII)
        parsed.no_objects = _says_no_objects(content)
        # An entry that names a box and was dropped must not come back, with confidence 1, as a plain list.
        if not _read_clean_entries(content, parsed) and not _read_entries(content, parsed):
            _read_bare(content, parsed)
    parsed.problems = _capped(parsed.problems)
    return parsed


def _is_well_formed(text: str) -> bool:
    text = text.strip()
    if not (text.startswith("<think>") and text.endswith("</answer>") and all(text.count(tag) == 1 for tag in TAGS)):
        return False
    # What remains of the order: the thought ends before the answer begins, and nothing but whitespace is between.
    between = text[text.index("</think>") + len("</think>") : text.index("<answer>")]
    return between.isspace() if between else text.index("</think>") < text.index("<answer>")


def _think_span(text: str) -> tuple[int, int, int, int] | None:
    """Start of the think block, start and end of its content, end of the block; None without one."""
    start = text.find("<think>")
    if start < 0:
        return None
    inner = start + len("<think>")
    stop = text.find("</think>", inner)
    if stop >= 0:
        return start, inner, stop, stop + len("</think>")
    stop = text.find("<answer>", inner)
    stop = stop if stop >= 0 else len(text)
    return start, inner, stop, stop


def _read_thought(text: str, problems: list[Problem]) -> str | None:
    span = _think_span(text)
    if span is None:
        return None
    _, inner, stop, end = span
    if stop == end:
        problems.append(Problem("think_not_closed", "think block not closed"))
    return text[inner:stop].strip()


def _read_label(text: str, problems: list[Problem]) -> str:
    _, opening, rest = text.partition("<answer>")
    if not opening:
        problems.append(Problem("no_answer_block", "no answer block"))
        span = _think_span(text)
        # The line break keeps what stood around the thought from growing together, into a tag even.
        around = text if span is None else f"{text[: span[0]]}\n{text[span[3] :]}"
        return around.partition("</answer>")[0].strip()
    blocks = text.count("<answer>")
    if blocks > 1:
        problems.append(Problem("repeated_answer_block", f"{blocks} answer blocks, the first one counts"))
    content, closing, _ = rest.partition("</answer>")
    content, next_opening, _ = content.partition("<answer>")
    if next_opening or not closing:
        problems.append(Problem("answer_not_closed", "answer block not closed"))
    label = content.strip()
    if not label:
        problems.append(Problem("empty_answer", "empty answer"))
    return label


def _says_no_objects(content: str) -> bool:
    if "{" in content:
        return False
    words = " ".join(_FENCE.sub("", content).strip(" \t\r\n.\"'`").lower().split())
    return words in ("no object", "no objects", "none") or words.replace(" ", "") == "[]"


def _read_clean_entries(content: str, parsed: ParsedAnswer) -> bool:
    """Entries exactly as the question asks for them, which most are, in a fraction of the time; False for others.

    Whatever the slower way would read differently, or report, is left to it.
    """
    if not content.startswith("[{") or "\\" in content:
        return False
    numbers: list[Any] = []
    try:
        for entry in _JSON.decode(content.replace("'", '"')):
            (position, box), (confidence, value) = entry
            if type(entry) is list or position != "Position" or confidence != "Confidence" or len(box) != 4:
                return False
            numbers += box
            numbers.append(value)
        if not set(map(type, numbers)) <= {int, float} or max(max(numbers), -min(numbers)) > _MAX_NUMBER:
            return False
    except (ValueError, TypeError, RecursionError):
        return False
    parsed.boxes = [numbers[start : start + 4] for start in range(0, len(numbers), 5)]
    parsed.confidences = list(map(float, numbers[4::5]))
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


# Tuples of pairs, since a dict would keep the last of two equal keys; NaN and Infinity are no JSON.
_JSON = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=_refuse)


def _read_entries(content: str, parsed: ParsedAnswer) -> bool:
    """Read every ``{...}``; True if one of them, whole or cut off, names a box or a point."""
    for number, match in enumerate(_ENTRY.finditer(content), start=1):
        _read_entry(match.group(), f"entry {number}", parsed)
    if content.rfind("{") > content.rfind("}"):
        parsed.problems.append(Problem("entry_cut_off", "the last entry is cut off"))
    opened = content.find("{")
    return opened >= 0 and _ANY_KEY.search(content, opened) is not None


def _read_entry(entry: str, where: str, parsed: ParsedAnswer) -> None:
    box, point = _value(_BOX_KEY, entry), _value(_POINT_KEY, entry)
    if box is not None:
        _read_box(box, entry, where, parsed)
    if point is not None:
        numbers = _numbers(point.split(","), 2)
        if numbers is not None and _finite(numbers):
            parsed.points.append(numbers)
        else:
            parsed.problems.append(Problem("point_malformed", f"{where}: Point is not 2 finite numbers, dropped"))
    if box is None and point is None:
        parsed.problems.append(Problem("entry_without_box", f"{where}: no Position, dropped"))


def _read_box(value: str, entry: str, where: str, parsed: ParsedAnswer) -> None:
    box = _numbers(value.split(","), 4)
    match = _CONFIDENCE.search(entry)
    confidence = 1.0 if match is None else _number(match.group(1))
    if box is None:
        parsed.problems.append(Problem("box_malformed", f"{where}: Position is not 4 numbers, dropped"))
    elif not _finite(box):
        parsed.problems.append(Problem("box_not_finite", f"{where}: Position has a number that is not finite, dropped"))
    elif confidence is None or not _finite([confidence]):
        said = repr(match.group(1)[:20]) if match else ""
        problem = f"{where}: Confidence {said} is not a finite number, dropped"
        parsed.problems.append(Problem("confidence_malformed", problem))
    else:
        parsed.boxes.append(box)
        parsed.confidences.append(float(confidence))
        if match is None:
            parsed.problems.append(Problem("confidence_missing", f"{where}: no Confidence, taken as 1"))


def _value(key: re.Pattern[str], entry: str) -> str | None:
    """The text in the brackets behind a key; empty where there are none, None without the key."""
    found = None
    for match in key.finditer(entry):
        found = ""
        value = _VALUE.match(entry, match.end())
        if value is not None:
            return value[value.lastindex or 0]
    return found


def _read_bare(content: str, parsed: ParsedAnswer) -> None:
    """Boxes, or else points, that stand in no entry. The first way of writing that occurs is that of the answer."""
    pattern = next((pattern for pattern in (_CORNERS, _FOUR_NUMBERS, _TWO_NUMBERS) if pattern.search(content)), None)
    if pattern is None:
        return
    kept, count = (parsed.points, 2) if pattern is _TWO_NUMBERS else (parsed.boxes, 4)
    for match in pattern.finditer(content):
        numbers = _numbers([number for number in match.groups() if number], count)
        if numbers is not None and _finite(numbers):
            kept.append(numbers)
        elif count == 4:
            parsed.problems.append(Problem("box_not_finite", "a box has a number that is not finite, dropped"))
        else:
            parsed.problems.append(Problem("point_malformed", "a point has a number that is not finite, dropped"))
    parsed.confidences = [1.0] * len(parsed.boxes)


def _numbers(parts: list[str], count: int) -> list[float] | None:
    """So many numbers, which may be NaN; None if there are more or fewer, or if one is no number."""
    if len(parts) == count + 1 and not parts[-1].strip():
        parts = parts[:-1]
    if len(parts) != count:
        return None
    numbers = [_number(part.strip().strip("\"'").strip()) for part in parts]
    found = [number for number in numbers if number is not None]
    return found if len(found) == count else None


def _number(text: str) -> float | None:
    """A number as written, integers as int; NaN for all that is not finite or too large, None for anything else."""
    if _NOT_FINITE.fullmatch(text) is not None:
        return math.nan
    if _WHOLE_NUMBER.fullmatch(text) is None:
        return None
    value = float(text)
    if abs(value) > _MAX_NUMBER:
        return math.nan
    # Not int(text), which refuses more than 4300 digits, leading zeros included; the float is exact here.
    return int(value) if text.lstrip("+-").isdigit() else value


def _finite(numbers: list[float]) -> bool:
    return all(math.isfinite(number) for number in numbers)


def _capped(problems: list[Problem]) -> list[Problem]:
    """At most 10 problems in their order, the first of every kind among them, and one that counts the rest."""
    if len(problems) <= _MAX_PROBLEMS:
        return problems
    first = {problem.kind: index for index, problem in reversed(list(enumerate(problems)))}.values()
    others = [index for index in range(len(problems)) if index not in first]
    kept = sorted([*first, *others[: max(0, _MAX_PROBLEMS - len(first))]])
    rest = Problem("more", f"and {len(problems) - len(kept)} more")
    return [*(problems[index] for index in kept), rest]
