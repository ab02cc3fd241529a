"""Predictions as rows of a file, one JSON object per line, and back: all that scoring needs, without the data set.

The keys of a row, in this order; those of what a task does not have are empty or null:

- ``id``, ``image_id``, ``image`` (path, or null for a rendered picture), ``image_size`` [width, height];
- ``labelled``, ``task`` (classification, detection, grounding, presence), ``asked`` (class or expression),
  ``question``;
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
they are known ``confidences``, ``mask`` and ``image_id``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rft_lightning.answers import Problem
from rft_lightning.errors import AnnotationError
from rft_lightning.masks import Region
from rft_lightning.sample import (
    Answer,
    ClassTarget,
    DetectionTarget,
    GroundingTarget,
    Prediction,
    PresenceTarget,
    Sample,
    Target,
    as_boxes,
)
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
    """A prediction as plain data; see the description of the module."""
    sample, answer = prediction.sample, prediction.answer
    row = {
        "id": sample.id,
        "image_id": sample.image_id,
        "image": str(sample.image) if isinstance(sample.image, Path) else None,
        "image_size": list(sample.image_size),
        "labelled": sample.target is not None,
        "task": sample.task.name,
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
        "target": None if sample.target is None else _target_row(sample.target),
    }
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
        target=None if target is None else _TARGETS[name](target, _size(row)),
        task=_TASKS[name],
        image_size=_size(row) or (0, 0),
        image_id=row.get("image_id", row["id"]),
        question=row.get("question"),
        asked=row.get("asked"),
    )
    answer = Answer(
        boxes=as_boxes(row.get("boxes")),
        confidences=torch.tensor(row.get("confidences") or [], dtype=torch.float64),
        problems=_problems(row),
        mask=decode_mask(row["mask"]) if row.get("mask") is not None else None,
        **{key: row[key] for key in _PLAIN if row.get(key) is not None},
    )
    texts, unasked = tuple(row.get("texts") or ()), bool(row.get("unasked", False))
    return Prediction(sample, answer.text, answer, texts=texts, unasked=unasked)


def check_boxes(boxes: Any) -> None:
    """Raise a ValueError unless it is a list of boxes as JSON has them."""
    if not isinstance(boxes, list):
        raise ValueError(f"boxes is {boxes!r}, expected a list of [x1, y1, x2, y2]")
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise ValueError(f"the box {box!r} is not of four finite numbers [x1, y1, x2, y2]")


def check_confidences(found: Any, count: int) -> list[float]:
    """The confidences of so many boxes; raises a ValueError unless they are numbers from 0 to 1."""
    if found is None:
        return []
    if not isinstance(found, list) or not all(_is_number(value) and 0 <= value <= 1 for value in found):
        raise ValueError(f"confidences is {found!r}, expected a list of numbers from 0 to 1")
    if len(found) != count:
        raise ValueError(f"found {len(found)} confidences for {count} boxes, expected as many")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(row: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError or KeyError where a row is not of the form that the description of the module has."""
    for keys, kind, words in _KINDS:
        for key in keys:
            if row.get(key) is not None and not isinstance(row[key], kind):
                raise ValueError(f"{key} is {row[key]!r}, expected {words}")
    size = row.get("image_size")
    if size is not None and not (isinstance(size, list) and len(size) == 2 and all(map(_is_number, size))):
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
        with Path(file).open(encoding="utf-8", errors="surrogateescape") as lines:
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
    categories: dict[int, str] = {}
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
            first = categories.setdefault(target.category_id, target.category)
            if first != target.category:
                raise AnnotationError(
                    f"{where}: category {target.category_id} is called {target.category!r}, and {first!r} before; "
                    "expected one name for each category_id."
                )
        seen[prediction.sample.id] = number
        predictions.append(prediction)
    if not predictions:
        raise AnnotationError(f"{file} has no predictions; expected one JSON object per line.")
    return predictions


def line_of(row: Mapping[str, Any]) -> str:
    """A row as its line of the file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def asked_of(sample: Sample) -> str | None:
    """The class or expression that a sample asks for; None where it asks for no particular one."""
    if isinstance(sample.target, DetectionTarget | PresenceTarget):
        return sample.target.category
    return sample.target.expression if isinstance(sample.target, GroundingTarget) else sample.asked


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W] in COCO's run-length encoding, as JSON holds it."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def decode_mask(encoded: Mapping[str, Any]) -> np.ndarray:
    """The mask [H, W] bool of COCO's run-length encoding, compressed (a string) or not (a list of runs).

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    size, counts = [int(side) for side in encoded["size"]], encoded["counts"]
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"the size of a mask is {encoded['size']}, expected [height, width]")
    runs = np.asarray(_runs(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    if runs.sum() != size[0] * size[1] or (runs < 0).any():
        raise ValueError(f"the runs of a mask cover {runs.sum()} pixels, expected {size[0]} x {size[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def _runs(counts: str) -> list[int]:
    """The runs of COCO's compressed encoding, so that they can be counted: pycocotools reads ones that do not add up.

    A run is written in characters of 5 bits, the lowest first, each 48 above its value with a sixth bit where more
    follow; the last one's highest bit is the sign. From the fourth run on it is the difference to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the counts of a mask hold {character!r}, which COCO's compressed encoding does not use")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _target_row(target: Target) -> dict[str, Any]:
    if isinstance(target, ClassTarget):
        return {"label": target.label, "aliases": list(target.aliases)}
    if isinstance(target, PresenceTarget):
        return {"present": target.present, "category": target.category, "category_id": target.category_id}
    if isinstance(target, GroundingTarget):
        regions = [{"points": [list(point) for point in r.points], "value": r.value} for r in target.regions]
        return {"expression": target.expression, "boxes": target.boxes.tolist(), "regions": regions}
    lists = {name: _list(getattr(target, name)) for name in ("boxes", "areas", "ignore_boxes", "ignore_areas")}
    words = {name: getattr(target, name) for name in ("not_exhaustive", "frequency")}
    return {"category": target.category, "category_id": target.category_id, **lists, **words}


def _list(values: Any) -> list[Any]:
    return [] if values is None else values.tolist()


def _class_target(row: Mapping[str, Any], size: tuple[int, int] | None) -> ClassTarget:
    return ClassTarget(str(row["label"]), aliases=tuple(row.get("aliases") or ()), image_size=size)


def _detection_target(row: Mapping[str, Any], size: tuple[int, int] | None) -> DetectionTarget:
    check_boxes(row["boxes"])
    return DetectionTarget(
        row["boxes"],
        category=str(row.get("category") or ""),
        category_id=int(row["category_id"]),
        areas=row.get("areas"),
        ignore_boxes=row.get("ignore_boxes"),
        ignore_areas=row.get("ignore_areas"),
        image_size=size,
        not_exhaustive=bool(row.get("not_exhaustive", False)),
        frequency=row.get("frequency"),
    )


def _grounding_target(row: Mapping[str, Any], size: tuple[int, int] | None) -> GroundingTarget:
    regions = tuple(
        Region(tuple((int(x), int(y)) for x, y in region["points"]), int(region.get("value", 1)))
        for region in row.get("regions") or ()
    )
    return GroundingTarget(row["boxes"], expression=str(row.get("expression") or ""), image_size=size, regions=regions)


def _presence_target(row: Mapping[str, Any], size: tuple[int, int] | None) -> PresenceTarget:
    if not isinstance(row["present"], bool):
        raise ValueError(f"present is {row['present']!r}, expected true or false")
    return PresenceTarget(row["present"], str(row.get("category") or ""), int(row["category_id"]), size)


_TARGETS: dict[str, Any] = {
    "classification": _class_target,
    "detection": _detection_target,
    "grounding": _grounding_target,
    "presence": _presence_target,
}


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    size = row.get("image_size")
    return None if size is None else (int(size[0]), int(size[1]))


__all__ = [
    "asked_of",
    "check_boxes",
    "check_confidences",
    "decode_mask",
    "encode_mask",
    "line_of",
    "prediction_of",
    "read_predictions",
    "read_rows",
    "row_of",
]
