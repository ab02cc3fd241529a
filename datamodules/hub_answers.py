"""What the rows of published training sets say: questions and solutions as texts, read once more for what they mean."""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["detection", "classification", "grounding"]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_CATEGORY = re.compile(r"category '(.+?)'(?= in the image)|category ['\"](.+?)['\"]")
_INSTRUCTION = re.compile(
    r"(?:corresponding to the instruction|this sentence describes):\s*(.+?)(?:\.?\s+Output the thinking process.*)?$",
    re.DOTALL,
)
_PLACEHOLDERS = re.compile(r"<image>|<img>.*?</img>", re.DOTALL)
_FENCE = re.compile(r"^```(?:json)?\s*|\s*```$")
_BOX_KEYS = ("Position", "position", "bbox_2d", "bbox", "box")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a row says.

    Attributes:
        kind: the kind of its answer.
        asked: the category (detection) or expression (grounding) of the question; "" for classification.
        boxes: the boxes of the solution, four numbers each, in the unit of the file.
        label: the class that the solution names; the category for detection; "" for grounding.
    """

    kind: Kind
    asked: str
    boxes: tuple[tuple[float, ...], ...]
    label: str


def plain_question(problem: str) -> str:
    """A question without the placeholders of its image, which the chat template writes itself."""
    return _PLACEHOLDERS.sub("", problem).strip()


def tagged(solution: str) -> str:
    """A solution in its answer tags."""
    text = solution.strip()
    return text if _ANSWER.search(text) else f"<answer>{text}</answer>"


def read_row(problem: str, solution: str, kind: Kind | None = None) -> Reading:
    """What a question asks and its solution answers.

    Without a `kind`, a question about a category is detection, one about an instruction is grounding; else a solution
    of boxes decides, and what is left is classification.

    Raises:
        ValueError: the solution cannot be read as an answer of its kind; says why.
    """
    match = _ANSWER.search(solution)
    text = (match.group(1) if match else solution).strip()
    category, instruction = _CATEGORY.search(problem), _INSTRUCTION.search(plain_question(problem))
    value = None if kind == "classification" else _value(text)
    kind = kind or _kind(category is not None, instruction is not None, value)
    if kind == "classification":
        if not text:
            raise ValueError("the class name is empty")
        return Reading(kind, "", (), text)
    boxes, labels = _boxes(value)
    if kind == "detection":
        asked = (category.group(1) or category.group(2)) if category else _only(labels)
        return Reading(kind, asked, boxes, asked)
    if len(boxes) != 1:
        raise ValueError(f"an instruction is answered by one box, found {len(boxes)}")
    return Reading(kind, instruction.group(1).strip() if instruction else plain_question(problem), boxes, "")


def _kind(names_category: bool, names_instruction: bool, value: Any) -> Kind:
    if names_category:
        return "detection"
    if names_instruction or _is_box(value):
        return "grounding"
    is_boxes = isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict | list | tuple)
    return "detection" if is_boxes else "classification"


def _value(text: str) -> Any:
    """The Python (or JSON) literal of an answer; [] for "No Objects", None for other text."""
    text = _FENCE.sub("", text)
    if " ".join(text.lower().split()).rstrip(".") in ("no object", "no objects", "none"):
        return []
    for parse in (ast.literal_eval, json.loads):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _boxes(value: Any) -> tuple[tuple[tuple[float, ...], ...], list[str]]:
    """Boxes, and the labels that stand beside them."""
    if _is_box(value) or isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError("expected a list of {'Position': [x1, y1, x2, y2], ...}, a box or 'No Objects'")
    boxes, labels = [], []
    for entry in value:
        box = entry
        if isinstance(entry, dict):
            box = next((entry[key] for key in _BOX_KEYS if key in entry), None)
            labels += [str(entry["label"])] if "label" in entry else []
        if not _is_box(box):
            raise ValueError(f"{entry!r} is no box of four numbers")
        numbers = [number for part in box for number in (part if isinstance(part, list | tuple) else [part])]
        boxes.append(tuple(numbers))
    return tuple(boxes), labels


def _is_box(value: Any) -> bool:
    """Four finite numbers, or two points of two."""
    if not isinstance(value, list | tuple):
        return False
    if len(value) == 2 and all(isinstance(point, list | tuple) and len(point) == 2 for point in value):
        value = [*value[0], *value[1]]
    numbers = [v for v in value if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    return len(numbers) == len(value) == 4


def _only(labels: list[str]) -> str:
    names = sorted(set(labels))
    if len(names) != 1:
        raise ValueError(
            "the question names no category ('... of the category 'NAME' in the image') and the solution "
            + (f"labels {', '.join(names)}" if names else "labels none")
            + "; one row asks for one category"
        )
    return names[0]


__all__ = ["Kind", "Reading", "plain_question", "read_row", "tagged"]
