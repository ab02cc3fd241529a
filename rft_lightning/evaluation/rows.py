"""Predictions as rows of a file, one JSON object per line, and back: all that scoring needs, without the data set.

The keys of a row, in this order; those of what a task does not have are empty or null:

- ``id``, ``image_id``, ``image`` (path, or null for a rendered picture), ``image_size`` [width, height];
- ``labelled``, ``task`` (by the kind of target: classification, detection, grounding, presence), ``asked`` (class or
  expression), ``question``;
- ``text`` (as written), ``thought``, ``label``, ``boxes`` (xyxy in pixels of the original image), ``confidences``,
  ``parsed``, ``well_formed``, ``no_objects``, ``answer_blocks``, ``problems`` (in words), ``problem_kinds`` (of each),
  ``num_tokens``, ``truncated``;
- ``target``: the right answer, null where it is not known. classification: ``label``, ``aliases``; detection:
  ``category``, ``category_id``, ``boxes``, ``areas``, ``ignore_boxes``, ``ignore_areas``, ``not_exhaustive``,
  ``frequency``; grounding: ``expression``, ``boxes``, ``regions`` (``points``, ``value``); presence: ``present``,
  ``category``, ``category_id``;
- where they apply: ``mask`` (COCO's RLE: ``size`` [height, width], ``counts``), ``texts`` (all answers, where one of
  several was chosen), ``unasked`` (true: a presence map ruled the question out, which counts as an empty answer).

A row from elsewhere needs ``id``, ``task``, ``target`` and what was answered: ``label``, or ``boxes``, and as far as
they are known ``confidences``, ``mask`` and ``image_id``. The ``label`` of a presence question is yes or no (or Yes, or
NO).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rft_lightning.answers import Problem
from rft_lightning.errors import AnnotationError
from rft_lightning.evaluation.targets import (
    TARGETS,
    check_boxes,
    is_number,
    read_boxes,
    read_numbers,
    read_target,
    target_row,
)
from rft_lightning.rewards.presence import NO, YES
from rft_lightning.run_lengths import encode_mask, read_mask
from rft_lightning.sample import Answer, DetectionTarget, GroundingTarget, Prediction, PresenceTarget, Sample
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask, PresenceTask

# Task by its name in a row, for rows that are read: with the paper's rewards, which scoring does not use.
_TASKS = {task.name: task() for task in (ClassificationTask, DetectionTask, GroundingTask, PresenceTask)}
# Keys of a row, what they hold, and how that is called.
_KINDS: tuple[tuple[tuple[str, ...], type, str], ...] = (
    (("text", "label", "thought", "question", "asked"), str, "a string"),
    (("parsed", "well_formed", "no_objects", "unasked", "truncated", "labelled"), bool, "true or false"),
    (("target", "mask"), dict, "an object"),
    (("problems", "problem_kinds", "texts"), list, "a list"),
)
_PLAIN = ("text", "label", "thought", "well_formed", "no_objects", "answer_blocks", "parsed", "num_tokens", "truncated")


def row_of(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain data; see the description of the module.

    Raises:
        ValueError: it was read as an answer to a presence question, and is neither yes nor no.
    """
    sample, answer = prediction.sample, prediction.answer
    row = {
        "id": sample.id,
        "image_id": sample.image_id,
        "image": str(sample.image) if isinstance(sample.image, Path) else None,
        "image_size": list(sample.image_size),
        "labelled": sample.target is not None,
        "task": task_of(sample),
        "asked": asked_of(sample),
        "question": sample.question,
        "text": prediction.text,
        "thought": answer.thought,
        "label": answer.label,
        "boxes": answer.boxes.tolist(),
        "confidences": answer.confidences.tolist(),
        "parsed": bool(answer.parsed),
        "well_formed": answer.well_formed,
        "no_objects": bool(answer.no_objects),
        "answer_blocks": answer.answer_blocks,
        "problems": list(answer.problems),
        "problem_kinds": [getattr(problem, "kind", "more") for problem in answer.problems],
        "num_tokens": answer.num_tokens,
        "truncated": answer.truncated,
        "target": None if sample.target is None else target_row(sample.target),
    }
    if row["task"] == PresenceTask.name:
        row["label"] = decision_of(row)
    if answer.mask is not None:
        row["mask"] = encode_mask(answer.mask)
    if prediction.texts:
        row["texts"] = list(prediction.texts)
    if prediction.unasked:
        row["unasked"] = True
    return row


def prediction_of(row: Mapping[str, Any]) -> Prediction:
    """The prediction of a row, without its picture.

    Raises:
        KeyError, TypeError, ValueError: the row lacks what its task needs, or something in it is of another kind;
            :func:`read_predictions` says where.
    """
    name = row["task"]
    if not isinstance(name, str) or name not in _TASKS:
        raise ValueError(f"task is {name!r}, expected one of {', '.join(_TASKS)}")
    _check(row, name)
    target = row.get("target")
    sample = Sample(
        id=str(row["id"]),
        image=Path(row.get("image") or "."),
        target=None if target is None else read_target(name, target, _size(row)),
        task=_TASKS[name],
        image_size=_size(row) or (0, 0),
        image_id=row["id"] if row.get("image_id") is None else row["image_id"],
        question=row.get("question"),
        asked=row.get("asked"),
    )
    answer = Answer(
        boxes=read_boxes(row.get("boxes")),
        confidences=read_numbers(row.get("confidences")),
        problems=_problems(row),
        mask=read_mask(row["mask"]) if row.get("mask") is not None else None,
        **{key: row[key] for key in _PLAIN if row.get(key) is not None},
    )
    if name == PresenceTask.name:
        answer.label = decision_of(row)
    texts, unasked = tuple(row.get("texts") or ()), bool(row.get("unasked", False))
    return Prediction(sample, answer.text, answer, texts=texts, unasked=unasked)


def check_confidences(found: Any, count: int) -> list[float]:
    """The confidences of so many boxes; raises a ValueError unless they are numbers from 0 to 1."""
    if found is None:
        return []
    if not isinstance(found, list) or not all(is_number(value) and 0 <= value <= 1 for value in found):
        raise ValueError(f"confidences is {found!r}, expected a list of numbers from 0 to 1")
    if len(found) != count:
        raise ValueError(f"found {len(found)} confidences for {count} boxes, expected as many")
    return found


def decision_of(row: Mapping[str, Any]) -> str | None:
    """The ``label`` of a presence row in small letters.

    Raises:
        ValueError: it is neither yes nor no, and the row does not say that the answer could not be read or was never
            asked for.
    """
    label = row.get("label")
    said = label.lower() if isinstance(label, str) else None
    if said not in (YES, NO) and row.get("parsed") is not False and not row.get("unasked"):
        raise ValueError(f"label is {label!r}, expected {YES} or {NO}, or parsed false where the answer is neither")
    return said


def _check(row: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError or KeyError where a row is not of the form that the description of the module has."""
    for keys, kind, words in _KINDS:
        for key in keys:
            value = row.get(key)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{key} is {value!r}, expected {words}")
    for key in ("id", "image_id"):
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise ValueError(f"{key} is {value!r}, expected a string or a whole number")
    size = row.get("image_size")
    if size is not None and not (
        isinstance(size, list) and len(size) == 2 and all(is_number(side) and side >= 1 for side in size)
    ):
        raise ValueError(f"image_size is {size!r}, expected [width, height]")
    if row.get("boxes") is not None:
        check_boxes(row["boxes"])
    check_confidences(row.get("confidences"), len(row.get("boxes") or ()))
    needed = ("label",) if name in ("classification", "presence") else ("boxes", "mask")
    if row.get("parsed") is not False and not row.get("unasked") and all(row.get(key) is None for key in needed):
        raise ValueError(f"there is no answer: expected {' or '.join(needed)}, or parsed false where it was unreadable")


def _problems(row: Mapping[str, Any]) -> tuple[str, ...]:
    words, kinds = row.get("problems") or (), row.get("problem_kinds") or ()
    return tuple(Problem(*pair) for pair in zip(kinds, words, strict=True)) if kinds else tuple(words)


def read_rows(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with the numbers of their lines, from 1; empty lines are left out.

    Raises:
        AnnotationError: there is no such file, or a line is no JSON object.
    """
    try:
        with Path(file).open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it is a {type(row).__name__}")
                yield number, row
    except OSError as error:
        raise AnnotationError(f"The predictions {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise AnnotationError(f"{file}, line {number}: expected one JSON object per line, but {error}.") from error


def read_predictions(file: str | Path) -> list[Prediction]:
    """The predictions of a file.

    Raises:
        AnnotationError: there is no such file or nothing in it, a row cannot be used, or an id comes twice.
    """
    predictions: list[Prediction] = []
    seen: dict[str, int] = {}
    categories: dict[int, tuple[str, str | None]] = {}
    for number, row in read_rows(file):
        where = f"{file}, line {number}"
        try:
            prediction = prediction_of(row)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise AnnotationError(
                f"{where}: {problem}. Expected a row as `rft evaluate` writes it, with at least id, task, target and "
                "label or boxes; all keys are in the description of rft_lightning.evaluation.rows."
            ) from error
        if prediction.sample.id in seen:
            raise AnnotationError(
                f"{where}: the sample {prediction.sample.id!r} is in line {seen[prediction.sample.id]} too; expected "
                "one answer per sample."
            )
        target = prediction.target
        if isinstance(target, DetectionTarget | PresenceTarget):
            known = target.category, getattr(target, "frequency", None)
            first = categories.setdefault(target.category_id, known)
            if first != known:
                raise AnnotationError(
                    f"{where}: category {target.category_id} is {_named(*known)}, and {_named(*first)} before; "
                    "expected one name and frequency for each category_id."
                )
        seen[prediction.sample.id] = number
        predictions.append(prediction)
    if not predictions:
        raise AnnotationError(f"{file} has no predictions; expected one JSON object per line.")
    return predictions


def _named(category: str, frequency: str | None) -> str:
    return repr(category) if frequency is None else f"{category!r} of frequency {frequency}"


def line_of(row: Mapping[str, Any]) -> str:
    """A row as its line of the file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def task_of(sample: Sample) -> str:
    """What a row calls the task of a sample: by the kind of its target, whatever a task of a user's own is called."""
    return next((name for name, kind in TARGETS.items() if isinstance(sample.target, kind)), sample.task.name)


def asked_of(sample: Sample) -> str | None:
    """The class or expression that a sample asks for; None where it asks for no particular one."""
    if isinstance(sample.target, DetectionTarget | PresenceTarget):
        return sample.target.category
    return sample.target.expression if isinstance(sample.target, GroundingTarget) else sample.asked


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    size = row.get("image_size")
    return None if size is None else (int(size[0]), int(size[1]))


__all__ = [
    "asked_of",
    "check_confidences",
    "decision_of",
    "line_of",
    "prediction_of",
    "read_predictions",
    "read_rows",
    "row_of",
    "task_of",
]
