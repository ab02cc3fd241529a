"""What the authors' repository (github.com/Liuziyu77/Visual-RFT at 9486633) rewards, quirks included.

Written from a description of its behaviour, for runs that are to be compared with published ones; nobody should train
with these by choice. Everything is computed on the text of the completion and the text of the solution, in the numbers
written there.

Accuracy and both detection rewards begin with a shortcut: where math-verify finds the whole completion and the whole
solution equal, they pay 1. It looks for the first number behind the word "answer" that follows a blank, which in the
published spelling of a box is y1: a wrong box with the right y1 earns everything. math-verify is an optional package
(the extra ``published-code``); without it there is no shortcut, and a warning says so once. The same holds outside of
the main thread, where its limit of five seconds, an alarm, cannot be set: without one, a completion as short as
"9^9^9" is evaluated for ever.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from rft_lightning.errors import ConfigConflictError
from rft_lightning.sample import Answer, Target

_BETWEEN = re.compile(r"</think>\s*<answer>")
_CORNERS = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")

_Box = tuple[float, float, float, float]


def math_verify_available() -> bool:
    """Whether math-verify can be imported; without it the rewards here lack their shortcut."""
    return _math_verify() is not None


def format_reward(answer: Answer, target: Target | None = None) -> float:
    """1 if the published pattern covers the whole text, else 0.

    Whitespace before or after fails; empty tags and repeated blocks pass.
    """
    text, opening, closing = answer.text, "<think>", "</answer>"
    # The published pattern (think block, whitespace, answer block) takes any text within the blocks: all it asks is
    # that they meet somewhere. As a pattern it takes quadratic time on tags that repeat.
    if not (text.startswith(opening) and text.endswith(closing)):
        return 0.0
    return float(_BETWEEN.search(text, len(opening), len(text) - len(closing)) is not None)


def accuracy_reward(answer: Answer, target: Target) -> float:
    """1 if answer or solution contains the other, without spaces and underscores and in lower case, else 0.

    The empty answer is contained in every solution. An answer over several lines counts with its tags and its thought.
    1 too where the shortcut applies, which takes a label with a number behind a blank.

    Raises:
        ConfigConflictError: (a ValueError) the target has no solution_text.
    """
    solution = _solution(target)
    if _verified(answer.text, solution):
        return 1.0
    said, right = _class_name(answer.text), _class_name(solution)
    return float(said in right or right in said)


def detection_iou_reward(answer: Answer, target: Target) -> float:
    """Sum of matched IoU / max(number of true boxes, number of predictions), at most 1.

    1 where the shortcut applies, in practice if the first y1 of both is the same. Otherwise 0 if any entry is malformed
    in a way that is noticed, if the answer spans lines, and if it has no boxes.

    Raises:
        ConfigConflictError: (a ValueError) the target has no solution_text.
    """
    solution = _solution(target)
    if _verified(answer.text, solution):
        return 1.0
    try:
        results, n_gt = _match(answer.text, solution)
        total, _ = _sums(results)
        reward = total / max(n_gt, len(results))
    # The published code catches everything, in the same place; so does this, for the same outcome.
    except Exception:
        return 0.0
    return 1.0 if reward > 1 else float(reward)


def detection_confidence_reward(answer: Answer, target: Target) -> float:
    """Mean over the predictions of c where matched and 1 - c where not, clamped to [0, 1]; 1 and 0 as for the IoU.

    NaN if the model wrote ``NaN`` as a confidence: both comparisons of the clamp are false then.

    Raises:
        ConfigConflictError: (a ValueError) the target has no solution_text.
    """
    solution = _solution(target)
    if _verified(answer.text, solution):
        return 1.0
    try:
        results, _ = _match(answer.text, solution)
        _, total = _sums(results)
        reward = total / len(results)
    except Exception:
        return 0.0
    if reward > 1:
        return 1.0
    return 0.0 if reward < 0 else float(reward)


def giou_reward(answer: Answer, target: Target) -> float:
    """GIoU + 1 of integer corners / 1000; 2 if answer and solution are equal strings, 0 if there is no box.

    Nothing checks the corners: swapped ones give a negative area or a positive one outside of the hull, and the reward
    leaves [0, 2] without bound. Of several boxes, the first corners of the first two are read as one box.

    Raises:
        ConfigConflictError: (a ValueError) the target has no solution_text.
    """
    said, right = (_grounding_text(text) for text in (answer.text, _solution(target)))
    if said == right:
        return 2.0
    try:
        return _giou(_corners(said), _corners(right)) + 1
    except Exception:
        return 0.0


def grounding_iou_reward(answer: Answer, target: Target) -> float:
    """IoU of the first box of the whole text with that of the solution, both / 1000, with 1e-6 in the denominator.

    From the published evaluation (its mIoU); the training code has no IoU reward for grounding. 0 if there is no box.

    Raises:
        ConfigConflictError: (a ValueError) the target has no solution_text.
    """
    solution = _solution(target)
    try:
        a, b = _first_box(answer.text), _first_box(solution)
        intersection = _intersection(a, b)
        return intersection / (_area(a) + _area(b) - intersection + 1e-6)
    except Exception:
        return 0.0


def _solution(target: Any) -> str:
    if target.solution_text is None:
        raise ConfigConflictError(
            "rules='published_code' compares texts, but the target's solution_text is None. Let the PromptEncoder fill "
            "it, or set it to task.solution(target, frame)."
        )
    return target.solution_text


def _verified(text: str, solution: str) -> bool:
    """The shortcut: whether math-verify finds both texts equal."""
    functions = _math_verify()
    if functions is None:
        _warn_once(
            "math-verify is not installed: rules='published_code' are computed without the shortcut of the published "
            "rewards, so they are not theirs. Run `pip install 'rft_lightning[published-code]'`."
        )
        return False
    if threading.current_thread() is not threading.main_thread():
        _warn_once(
            "Outside of the main thread math-verify cannot limit its time: rules='published_code' are computed without "
            "the shortcut of the published rewards. Score in the main thread."
        )
        return False
    parse, verify = functions
    try:
        with _alarm_restored():
            return float(verify(parse(text), parse(solution))) > 0
    # As in the published code: what math-verify cannot take is not equal.
    except Exception:
        return False


@cache
def _math_verify() -> tuple[Callable, Callable] | None:
    """Its parse and verify; imported when first needed, since it takes sympy with it."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None
    return parse, verify


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@contextmanager
def _alarm_restored() -> Iterator[None]:
    """Set the alarm of whoever waits for one (a test's time limit, say) again: those of math-verify replace it."""
    start = time.monotonic()
    seconds, interval = signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        if seconds > 0:
            # One that has come due meanwhile rings now; 0 would switch it off.
            left = max(seconds - (time.monotonic() - start), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def _class_name(text: str) -> str:
    return _one_line_answer(text).replace(" ", "").replace("_", "").lower()


def one_line_answer(text: str) -> str | None:
    """The content of the first answer block that begins and ends in one line; None without one."""
    blocks = (_first_block(line) for line in text.split("\n"))
    return next((block for block in blocks if block is not None), None)


def _one_line_answer(text: str) -> str:
    block = one_line_answer(text)
    return (text if block is None else block).strip()


def _grounding_text(text: str) -> str:
    block = _first_block(text)
    return (text if block is None else block).strip()


def _first_block(text: str) -> str | None:
    """What stands between the first opening tag and the first closing one behind it; None without them."""
    _, _, rest = text.partition("<answer>")
    content, closing, _ = rest.partition("</answer>")
    return content if closing else None


def _match(text: str, solution: str) -> tuple[list[tuple[float, Any]], int]:
    """(IoU or 0, confidence) of each prediction by falling confidence, and the number of true boxes."""
    answer = f"<answer>{_one_line_answer(text)}</answer>"
    answer = answer.replace("[[", "[").replace("]]", "]").replace("\n", "")
    truths, predictions = _load_boxes(solution.strip()), _load_boxes(answer)
    if predictions is None or not isinstance(predictions[0], dict):
        raise ValueError("no list of boxes")
    free = list(range(len(truths)))
    results: list[tuple[float, Any]] = []
    for prediction in sorted(_distinct(predictions), key=lambda entry: entry["Confidence"], reverse=True):
        best, best_iou = -1, 0.0
        for index in free:
            iou = _iou(truths[index]["Position"], prediction["Position"])
            if iou > best_iou:
                best, best_iou = index, iou
        if best_iou > 0.5:
            free.remove(best)
        results.append((best_iou if best_iou > 0.5 else 0, prediction["Confidence"]))
    return results, len(truths)


def _load_boxes(text: str) -> Any:
    """The list in the first answer block, a cut-off end removed; None if it is no JSON."""
    start = text.find("<answer>")
    if start < 0:
        return None
    start += len("<answer>")
    stop = text.find("</answer>")
    content = text[start : stop if stop >= 0 else len(text)]
    if not content.endswith("]"):
        content = content.rsplit("},", 1)[0] + "}]"
    try:
        return json.loads(content.replace("'", '"'))
    except json.JSONDecodeError:
        return None


def _distinct(predictions: list[Any]) -> list[Any]:
    seen, distinct = set(), []
    for prediction in predictions:
        position = tuple(prediction["Position"])
        if position not in seen:
            seen.add(position)
            distinct.append(prediction)
    return distinct


def _sums(results: list[tuple[float, Any]]) -> tuple[float, float]:
    # Both rewards sum both: a confidence that is no number zeroes the IoU reward too.
    iou_sum, confidence_sum = 0.0, 0.0
    for iou, confidence in results:
        iou_sum += iou
        confidence_sum += confidence if iou != 0 else 1 - confidence
    return iou_sum, confidence_sum


def _iou(a: Any, b: Any) -> float:
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    x1, y1, x2, y2 = max(ax1, bx1), max(ay1, by1), min(ax2, bx2), min(ay2, by2)
    if x2 <= x1 or y2 <= y1:
        return 0.0
    intersection = (x2 - x1) * (y2 - y1)
    return intersection / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection)


def _corners(text: str) -> _Box:
    """Items 0 and 1 of a list that holds all first corners and then all second ones (right for one box only)."""
    found = [[int(number) / 1000 for number in match] for match in _CORNERS.findall(text)]
    corners = [box[:2] for box in found] + [box[2:] for box in found]
    (x1, y1), (x2, y2) = corners[0], corners[1]
    return x1, y1, x2, y2


def _first_box(text: str) -> _Box:
    match = _CORNERS.search(text)
    if match is None:
        raise ValueError("no box")
    x1, y1, x2, y2 = (int(number) / 1000 for number in match.groups())
    return x1, y1, x2, y2


def _giou(a: _Box, b: _Box) -> float:
    intersection = _intersection(a, b)
    union = _area(a) + _area(b) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = intersection / union if union > 0 else 0.0
    return iou - (hull - union) / hull


def _intersection(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _area(box: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
