"""PredictionsFile: the answers of any other system, read from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from rft_lightning.baselines.base import BaselineModule, SampleBatch
from rft_lightning.collectives import gather_objects
from rft_lightning.errors import AnnotationError, ConfigConflictError
from rft_lightning.evaluation.rows import asked_of, check_confidences, decision_of, read_rows, task_of
from rft_lightning.evaluation.targets import check_boxes
from rft_lightning.run_lengths import read_mask
from rft_lightning.sample import Answer, Sample, as_boxes
from rft_lightning.segmenter import box_of_mask
from rft_lightning.tasks import PresenceTask

MATCHED_BY, ANSWERED = ("id", "image_id", "asked"), ("label", "boxes", "confidences", "mask", "text")

Key = tuple[str, str | None]


class PredictionsFile(BaselineModule):
    """Answers of a system that this package does not run (X-Decoder, for one), scored like all others.

    The file holds one JSON object per line. It names its sample by ``id``, or by ``image_id`` and ``asked`` (the class
    or expression; left out where the task asks for no particular one), and holds the answer:

    - ``label``: the class; for presence questions yes or no, in whatever case;
    - ``boxes``: a list of [x1, y1, x2, y2] in pixels of the original picture; [] where nothing was found;
    - ``confidences``: as many numbers in [0, 1]; 1 where left out;
    - ``mask``: of grounding, in COCO's run-length encoding, {"size": [height, width], "counts": ...}, compressed or
      not. Without ``boxes`` the box of the answer is the one around the mask. If any line has a mask, lines without one
      count as empty masks;
    - ``text``: what the system wrote, for the record; it is not read.

    A line has at least one of ``label``, ``boxes``, ``mask`` and ``text``, and no other keys. docs/baselines.md has
    examples.

    Args:
        path: the file.
        name: what tables call the system.
        missing: what a sample without a line is: ``error``, or ``empty``: an answer that could not be read.

    Raises:
        ConfigConflictError: an argument is out of its range.
    """

    tasks = ("classification", "detection", "grounding", "presence")
    needs_images = False

    def __init__(self, path: str | Path, name: str, *, missing: Literal["error", "empty"] = "error") -> None:
        super().__init__()
        if missing not in ("error", "empty"):
            raise ConfigConflictError(f"Expected missing to be error or empty, found {missing!r}.")
        if not name.strip():
            raise ConfigConflictError("Expected a name, by which tables call the system; found none.")
        self.path, self.missing = Path(path), missing
        self._name = name
        self._answers: dict[Key, tuple[int, Answer]] | None = None
        self._has_masks = False
        self._absent = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        return self._name

    def configure_model(self) -> None:
        """Read the file; Lightning may call this more than once.

        Raises:
            AnnotationError: there is no such file, or a line cannot be used; names the line.
        """
        if self._answers is None:
            self._answers = read_answers(self.path)
            self._has_masks = any(answer.has_mask for _, answer in self._answers.values())

    def answers(self, batch: SampleBatch) -> list[Answer]:
        """See the base class.

        Raises:
            AnnotationError: a sample has no line, its mask is of another size than its picture, or a presence question
                is answered with neither yes nor no.
        """
        return [self._answer(sample) for sample in batch.samples]

    def _answer(self, sample: Sample) -> Answer:
        assert self._answers is not None
        asked = asked_of(sample)
        found = self._answers.get((sample.id, "")) or self._answers.get((str(sample.image_id), asked))
        width, height = sample.image_size
        if found is None:
            if self.missing == "error":
                raise AnnotationError(
                    f"{self.path} has no answer for sample {sample.id!r} (image_id {sample.image_id!r}, asked "
                    f"{asked!r}) among its {len(self._answers)}. Expected a line with this id, or with this image_id "
                    "and asked. Add it, or set model.missing to empty."
                )
            self._absent += 1
            number, answer = 0, Answer(no_objects=False, parsed=False)
        else:
            # A copy: callbacks add to answers, and several samples may share a line.
            number, answer = found[0], replace(found[1])
            if task_of(sample) == PresenceTask.name:
                answer.label = self._decision(number, answer, sample)
        if not answer.has_mask and self._has_masks:
            answer.mask = np.zeros((height, width), dtype=bool)
        if answer.mask is not None and answer.mask.shape != (height, width):
            raise AnnotationError(
                f"{self.path}, line {number}: the mask has {list(answer.mask.shape)} [height, width], but the picture "
                f"of sample {sample.id!r} has {[height, width]}. Expected masks at the size of the original picture."
            )
        return answer

    def _decision(self, number: int, answer: Answer, sample: Sample) -> str | None:
        try:
            return decision_of({"label": answer.label, "parsed": answer.parsed})
        except ValueError as error:
            raise AnnotationError(
                f"{self.path}, line {number}: label is {answer.label!r}, but sample {sample.id!r} is a presence "
                "question; expected yes or no, or text alone where the answer could not be read."
            ) from error

    def on_validation_epoch_end(self) -> None:
        """Say how many samples had no line, so that a wrong file does not look like a bad system."""
        absent = sum(gather_objects(self._absent))
        if absent:
            rank_zero_warn(
                f"{absent} samples have no answer in {self.path}; they count as answers that could not be read."
            )
        self._absent = 0

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end


def read_answers(path: Path) -> dict[Key, tuple[int, Answer]]:
    """The answers of a file with their lines, by (id, "") or by (image_id, asked).

    Raises:
        AnnotationError: there is no such file or no answer in it, a line cannot be used, or two answer one question.
    """
    answers: dict[Key, tuple[int, Answer]] = {}
    for number, row in read_rows(path):
        try:
            key, answer = _key(row), _answer_of(row)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise AnnotationError(
                f"{path}, line {number}: {problem}. See docs/baselines.md for the keys and their form."
            ) from error
        if key in answers:
            raise AnnotationError(
                f"{path}, line {number}: the same question is answered in line {answers[key][0]}; expected one answer "
                "per sample. Remove one."
            )
        answers[key] = number, answer
    if not answers:
        raise AnnotationError(f"{path} has no answers; expected one JSON object per line (docs/baselines.md).")
    return answers


def _key(row: Mapping[str, Any]) -> Key:
    unknown = sorted(set(row) - {*MATCHED_BY, *ANSWERED})
    if unknown:
        raise ValueError(f"unknown keys {unknown}, expected some of {', '.join((*MATCHED_BY, *ANSWERED))}")
    if "id" in row:
        return str(row["id"]), ""
    if "image_id" not in row:
        raise ValueError(f"found {sorted(row)}, expected id, or image_id and asked, to name the sample")
    asked = row.get("asked")
    if asked is not None and not (isinstance(asked, str) and asked):
        raise ValueError(f"asked is {asked!r}, expected the class or expression")
    return str(row["image_id"]), asked


def _answer_of(row: Mapping[str, Any]) -> Answer:
    if all(row.get(name) is None for name in ("label", "boxes", "mask", "text")):
        raise ValueError(f"found {sorted(row)}, expected an answer: label, boxes, mask or text")
    for name in ("label", "text"):
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{name} is {row[name]!r}, expected a string")
    mask = None if row.get("mask") is None else _mask(row["mask"])  # decoded where it is read
    boxes = row.get("boxes")
    if boxes is None and mask is not None:
        boxes = box_of_mask(mask())
    elif boxes is not None:
        check_boxes(boxes)
    count = 0 if boxes is None else len(boxes)
    return Answer(
        text=row.get("text") or "",
        label=row.get("label"),
        boxes=as_boxes(boxes),
        confidences=torch.tensor(check_confidences(row.get("confidences"), count), dtype=torch.float64),
        mask=mask,
    )


def _mask(found: Any) -> Callable[[], np.ndarray]:
    if not isinstance(found, dict) or set(found) != {"size", "counts"}:
        raise ValueError(f'mask is {str(found)[:80]}, expected {{"size": [height, width], "counts": ...}}')
    return read_mask(found)


__all__ = ["PredictionsFile", "read_answers"]
