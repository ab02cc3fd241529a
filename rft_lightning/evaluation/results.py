"""What an evaluation found: the files of its folder, made of its rows and of nothing else.

``metrics.json`` holds `version` (1), `experiment` (what was evaluated, see
:func:`rft_lightning.evaluation.experiment.describe`), `samples` (questions asked), `metrics` (by the names that the
metric callbacks log, without prefix), `per_class` (class -> value, the largest value being 1) and `parse_failures`
(`count`, `share` of the questions asked, `kinds`: how many of them have a problem of that kind).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft_lightning.boxes import valid_boxes
from rft_lightning.errors import AnnotationError
from rft_lightning.evaluation.rows import line_of, prediction_of
from rft_lightning.placing import write_whole
from rft_lightning.presence_map import PresenceMap
from rft_lightning.sample import ClassTarget, DetectionTarget, Prediction, PresenceTarget

VERSION = 1
PREDICTIONS, METRICS, FAILURES, RESULTS = "predictions.jsonl", "metrics.json", "failures.jsonl", "results.json"
PRESENCE_MAP, CONFIG = "presence_map.json", "config.yaml"
SCORES = ("confidence", "one", "area", "rank")
# What an answer with swapped corners counts as: the evaluators would ignore it for its area, and it is wrong.
_NOWHERE = (-2.0, -2.0, -1.0, -1.0)


def write_results(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    metrics: Iterable[Any],
    experiment: Mapping[str, Any],
    config: str | None = None,
) -> dict[str, Any]:
    """Score the rows of an evaluation and write the files of its folder, ``metrics.json`` last.

    Args:
        folder: of the evaluation.
        rows: of all questions, in order.
        metrics: metric callbacks.
        experiment: what was evaluated.
        config: its configuration as YAML.

    Returns:
        what ``metrics.json`` holds.
    """
    predictions = [prediction_of(row) for row in rows]
    failures = [row for row in rows if not row["parsed"] and not row.get("unasked")]
    callbacks = list(metrics)
    record = {"version": VERSION, "experiment": dict(experiment), **scores_of(predictions, callbacks)}
    detections = [p for p in predictions if isinstance(p.target, DetectionTarget)]
    write_whole(folder / PREDICTIONS, map(line_of, rows))
    write_whole(folder / FAILURES, map(line_of, failures))
    if detections:
        score_from = next((callback.score_from for callback in callbacks if hasattr(callback, "score_from")), SCORES[0])
        write_whole(folder / RESULTS, json.dumps(coco_results(detections, score_from)) + "\n")
    if any(isinstance(prediction.target, PresenceTarget) for prediction in predictions):
        PresenceMap.from_rows(row for row in rows if row["task"] == "presence").write(folder / PRESENCE_MAP)
    if config:
        write_whole(folder / CONFIG, config)
    write_whole(folder / METRICS, json.dumps(record, indent=1) + "\n")
    return record


def scores_of(predictions: Sequence[Prediction], callbacks: Iterable[Any]) -> dict[str, Any]:
    """Numbers of predictions by metric callbacks, and what could not be read."""
    asked = [prediction for prediction in predictions if not prediction.unasked]
    failed = [prediction for prediction in asked if not prediction.answer.parsed]
    found = {callback.kind: callback.score(predictions) for callback in callbacks}
    metrics = _joined({kind: results for kind, (results, _) in found.items()})
    if asked:
        # Of all questions: a callback knows those of its own kind alone.
        metrics = {name: value for name, value in metrics.items() if not name.endswith("parse_rate")}
        metrics["parse_rate"] = 1 - len(failed) / len(asked)
    kinds = Counter(kind for prediction in failed for kind in sorted(kinds_of(prediction)))
    return {
        "samples": len(asked),
        "metrics": metrics,
        "per_class": _joined({kind: classes for kind, (_, classes) in found.items()}, whole=True),
        "parse_failures": {
            "count": len(failed),
            "share": len(failed) / max(len(asked), 1),
            "kinds": dict(sorted(kinds.items())),
        },
    }


def _joined(parts: Mapping[str, Mapping[str, float]], *, whole: bool = False) -> dict[str, float]:
    """The values of several kinds of answers; a name that two of them have stands with its kind before it.

    Args:
        parts: kind -> name -> value.
        whole: where more than one kind has values, all names stand with their kinds.
    """
    counts = Counter(name for values in parts.values() for name in values)
    mixed = whole and sum(bool(values) for values in parts.values()) > 1
    return {
        f"{kind}/{name}" if mixed or counts[name] > 1 else name: value
        for kind, values in parts.items()
        for name, value in values.items()
    }


def record_table(record: Mapping[str, Any], *, per_class: bool = False) -> list[str]:
    """Lines about what was measured: numbers, what could not be read, and the value of each class."""
    lines = [f"{name:<24} {value:10.4f}" for name, value in record["metrics"].items()]
    failures = record["parse_failures"]
    kinds = ", ".join(f"{kind} {count}" for kind, count in failures["kinds"].items())
    lines.append(
        f"{failures['count']} of {record['samples']} answers could not be read{f' ({kinds})' if kinds else ''}"
    )
    if per_class:
        lines += [f"{value:>6.3f}  {name}" for name, value in record["per_class"].items()]
    return lines


def class_of(prediction: Prediction) -> str | None:
    """The class that a question is about."""
    target = prediction.target
    if isinstance(target, ClassTarget):
        return target.label
    return target.category if isinstance(target, DetectionTarget | PresenceTarget) else None


def kinds_of(prediction: Prediction) -> set[str]:
    """The kinds of problems of an answer, see :data:`rft_lightning.answers.PROBLEM_KINDS`; ``other`` of mere words."""
    return {getattr(problem, "kind", "other") for problem in prediction.answer.problems}


def evaluated_boxes(boxes: Tensor) -> Tensor:
    """[K, 4] the boxes of an answer as they are evaluated: one without area is an answer too, and wrong anywhere."""
    if not len(boxes):
        return boxes
    return torch.where(valid_boxes(boxes)[:, None], boxes, boxes.new_tensor(_NOWHERE))


def box_scores(prediction: Prediction, score_from: str) -> Tensor:
    """[K] what ranks the boxes of an answer among those of all pictures; see the callback DetectionMAP.

    Raises:
        AnnotationError: their share of the picture is asked for, whose size is not known.
    """
    boxes = prediction.answer.boxes
    if score_from == "confidence":
        return prediction.answer.confidences
    if score_from == "one":
        return torch.ones(len(boxes), dtype=torch.float64)
    if score_from == "rank":
        return 1 / torch.arange(1, len(boxes) + 1, dtype=torch.float64)
    width, height = prediction.sample.image_size
    if len(boxes) and min(width, height) < 1:
        raise AnnotationError(
            f"Sample {prediction.sample.id!r} has the image_size {[width, height]}, expected [width, height]: scores "
            "from area are shares of the picture. Add it to the rows, or take other scores (score_from)."
        )
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) / (width * height)


def coco_results(predictions: Iterable[Prediction], score_from: str) -> list[dict[str, Any]]:
    """Detections in the results format of COCO and LVIS: one entry per box, its corner, width and height in pixels."""
    entries = []
    for prediction in predictions:
        if not len(prediction.answer.boxes):
            continue
        target = prediction.target
        assert isinstance(target, DetectionTarget)
        corners = evaluated_boxes(prediction.answer.boxes)
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
        for box, score in zip(boxes.tolist(), box_scores(prediction, score_from).tolist(), strict=True):
            entry = {"image_id": prediction.sample.image_id, "category_id": target.category_id}
            entries.append({**entry, "bbox": box, "score": score})
    return entries


__all__ = [
    "METRICS",
    "PREDICTIONS",
    "SCORES",
    "box_scores",
    "class_of",
    "coco_results",
    "evaluated_boxes",
    "record_table",
    "scores_of",
    "write_results",
]
