"""parse_answer: what a completion says, in the numbers it was written in.

The only parser of model text (rewards/published.py excepted, which reproduces the authors' own). It never raises and
takes time linear in the length of the text: no two neighbouring quantifiers of a pattern can match the same character.
Nothing here knows pixels; :class:`rft_lightning.frames.CoordinateFrame` turns what is written into pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_WELL_FORMED = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)

_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_POINT = rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)"
_PAIR = re.compile(rf"{_POINT}\s*(?:,\s*)?{_POINT}")
_LIST = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*(?:,\s*)?\]")
_WHOLE_NUMBER = re.compile(_NUMBER)

# Innermost braces: entries inside {"objects": [{...}]} are found, and a list that is cut off keeps its whole entries.
_ENTRY = re.compile(r"\{[^{}]*\}")
_BOX_KEY = re.compile(r"(?<![a-z0-9_])(?:position|bbox_2d|bbox|box)[\"']?\s*[:=]\s*", re.IGNORECASE)
_CONFIDENCE = re.compile(
    r"(?<![a-z0-9_])(?:confidence|score)[\"']?\s*[:=]\s*[\"']?\s*([^\s\"',{}]*)",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_DOUBLE_BRACKETS = re.compile(r"\[\s*\[([^\[\]]*)\]\s*(?:,\s*)?\]")

# Integers up to here are exact in float64; beyond it torch cannot even hold them, so they become floats.
_MAX_EXACT_INTEGER = 2**53
_MAX_PROBLEMS = 10


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
        problems: what was wrong with the text, in words; at most 10 and a line that counts the rest.
        points: K' lists of two finite numbers (x, y) in the unit of the model.
    """

    thought: str | None = None
    label: str | None = None
    boxes: list[list[float]] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    well_formed: bool = False
    no_objects: bool = False
    answer_blocks: int = 0
    problems: list[str] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)


def parse_answer(text: str) -> ParsedAnswer:
    """Read a completion: thought, answer text, and the boxes in it. Never raises, whatever the text.

    The answer is the text of the first ``<answer>`` block, over any number of lines; an unclosed block runs to the end,
    and without a block the text around the think block counts. Boxes are looked for as entries
    ``{'Position': [x1, y1, x2, y2], 'Confidence': c}`` first (keys in any case; also box, bbox, bbox_2d and score;
    single or double quotes or none), each kept or dropped on its own. Only where no entry names a box,
    ``(x1,y1),(x2,y2)`` pairs are read, and where there are none either, plain lists of four numbers, with confidence 1.

    Args:
        text: a completion, special tokens left in or out.

    Returns:
        The parts, with ``boxes`` and ``confidences`` of equal length and every number finite.
    """
    problems: list[str] = []
    thought = _read_thought(text, problems)
    label = _read_label(text, problems)
    boxes, confidences = _read_boxes(label, problems) if label else ([], [])
    return ParsedAnswer(
        thought=thought,
        label=label or None,
        boxes=boxes,
        confidences=confidences,
        well_formed=_is_well_formed(text),
        no_objects=_says_no_objects(label),
        answer_blocks=text.count("<answer>"),
        problems=_capped(problems),
    )


def _is_well_formed(text: str) -> bool:
    # Counting first keeps the pattern linear: repeated tags would make it try every pair of them.
    return all(text.count(tag) == 1 for tag in _TAGS) and _WELL_FORMED.fullmatch(text.strip()) is not None


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


def _read_thought(text: str, problems: list[str]) -> str | None:
    span = _think_span(text)
    if span is None:
        return None
    _, inner, stop, end = span
    if stop == end:
        problems.append("think block not closed")
    return text[inner:stop].strip()


def _read_label(text: str, problems: list[str]) -> str:
    start = text.find("<answer>")
    if start < 0:
        problems.append("no answer block")
        span = _think_span(text)
        return (text if span is None else text[: span[0]] + text[span[3] :]).strip()
    blocks = text.count("<answer>")
    if blocks > 1:
        problems.append(f"{blocks} answer blocks, the first one counts")
    start += len("<answer>")
    stop = text.find("</answer>", start)
    if stop < 0:
        problems.append("answer block not closed")
        stop = len(text)
    label = text[start:stop].strip()
    if not label:
        problems.append("empty answer")
    return label


def _says_no_objects(label: str) -> bool:
    words = " ".join(label.strip(" \t\r\n.\"'`").lower().split())
    return words in ("no object", "no objects", "none") or words.replace(" ", "") == "[]"


def _read_boxes(label: str, problems: list[str]) -> tuple[list[list[float]], list[float]]:
    boxes: list[list[float]] = []
    confidences: list[float] = []
    named = False
    for number, match in enumerate(_ENTRY.finditer(label), start=1):
        entry = match.group()
        named = named or _BOX_KEY.search(entry) is not None
        box, confidence, problem = _read_entry(entry)
        if problem:
            problems.append(f"entry {number}: {problem}")
        if box is not None:
            boxes.append(box)
            confidences.append(confidence)
    opened = label.rfind("{")
    if opened > label.rfind("}"):
        problems.append("the last entry is cut off")
        named = named or _BOX_KEY.search(label, opened) is not None
    # An entry that names a box and was dropped must not come back, with confidence 1, as a plain list.
    if not named:
        boxes = _read_bare_boxes(_PAIR, label, problems) or _read_bare_boxes(_LIST, label, problems)
        confidences = [1.0] * len(boxes)
    return boxes, confidences


def _read_entry(entry: str) -> tuple[list[float] | None, float, str]:
    """Box (None: dropped), confidence and what is wrong (empty: nothing) of the text of one ``{...}``."""
    key = _BOX_KEY.search(entry)
    if key is None:
        return None, 0.0, "no Position, dropped"
    value = _DOUBLE_BRACKETS.match(entry, key.end()) or _BRACKETS.match(entry, key.end())
    box = _box(_split(value.group(1))) if value is not None else None
    if box is None:
        return None, 0.0, "Position is not 4 finite numbers, dropped"
    match = _CONFIDENCE.search(entry)
    if match is None:
        return box, 1.0, "no Confidence, taken as 1"
    confidence = _number(match.group(1))
    if confidence is None:
        return None, 0.0, f"Confidence {match.group(1)[:20]!r} is not a finite number, dropped"
    return box, float(confidence), ""


def _read_bare_boxes(pattern: re.Pattern[str], label: str, problems: list[str]) -> list[list[float]]:
    boxes = []
    for match in pattern.finditer(label):
        box = _box(match.groups())
        if box is None:
            problems.append("a box has a number that is not finite, dropped")
        else:
            boxes.append(box)
    return boxes


def _split(value: str) -> list[str]:
    parts = [part.strip() for part in value.split(",")]
    return parts[:-1] if parts[-1] == "" else parts


def _box(parts: Iterable[str]) -> list[float] | None:
    numbers = [_number(part) for part in parts]
    finite = [number for number in numbers if number is not None]
    return finite if len(numbers) == len(finite) == 4 else None


def _number(text: str) -> float | None:
    """A number as written, integers as int; None for anything else, NaN and infinity (1e999 too) included."""
    if _WHOLE_NUMBER.fullmatch(text) is None:
        return None
    value = float(text)
    if not math.isfinite(value):
        return None
    # The size is tested on the float: int() of thousands of digits raises.
    return int(text) if abs(value) <= _MAX_EXACT_INTEGER and text.lstrip("+-").isdigit() else value


def _capped(problems: list[str]) -> list[str]:
    if len(problems) <= _MAX_PROBLEMS:
        return problems
    return [*problems[:_MAX_PROBLEMS], f"and {len(problems) - _MAX_PROBLEMS} more"]
