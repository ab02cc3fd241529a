"""Presence maps: the categories that a first stage found in each picture, which alone a second stage asks boxes of.

The published form, of the authors' ``exist_map_*.json``, is {image id as text: [category names]}. It says of a picture
that it was looked at, not what was asked about it: a category that is not in its list was ruled out, or never asked.
The predictions of a presence evaluation (``predictions.jsonl``) say both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft_lightning.errors import AnnotationError, DatasetNotFoundError
from rft_lightning.evaluation.rows import decision_of, read_rows
from rft_lightning.placing import write_whole
from rft_lightning.rewards.presence import YES
from rft_lightning.tasks import PresenceTask

ImageId = int | str
_HOW = (
    "`rft evaluate -c CONFIG -c configs/protocol/presence.yaml --output_dir FOLDER` writes presence_map.json and "
    "predictions.jsonl there; either can be given"
)


@dataclass(frozen=True)
class PresenceMap:
    """What a first stage found.

    Attributes:
        present: image id as text -> names of the categories that were found there, of every picture that was looked at.
        answered: the pairs (image id as text, category name) that were asked about; None where nothing says so.
        source: the file it was read from, for messages.
    """

    present: Mapping[str, tuple[str, ...]]
    answered: frozenset[tuple[str, str]] | None = None
    source: str = "the presence map"

    @classmethod
    def load(cls, path: str | Path) -> PresenceMap:
        """Read a map in the published form, or (``.jsonl``) from the predictions of a presence evaluation.

        Raises:
            DatasetNotFoundError: there is no such file.
            AnnotationError: it is neither; the message names the entry or line.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise DatasetNotFoundError(f"The presence map {path} is no file. {_HOW}.")
        if path.suffix == ".jsonl":
            return cls.from_rows((row for _, row in read_rows(path)), source=str(path))
        return cls(_published(path), source=str(path))

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], *, source: str = "the predictions") -> PresenceMap:
        """The map of prediction rows: a category is in a picture where the answer is "yes", in whatever case.

        Args:
            rows: rows with ``task``, ``image_id``, ``asked`` and ``label``; those of other tasks are left out.
            source: where they come from, for messages.

        Raises:
            AnnotationError: there is no presence row, one lacks something or says neither yes nor no, or two about one
                pair contradict each other.
        """
        decisions: dict[tuple[str, str], bool] = {}
        for row in rows:
            if row.get("task") != PresenceTask.name:
                continue
            if "image_id" not in row or not isinstance(row.get("asked"), str) or "label" not in row:
                raise AnnotationError(
                    f"Row {row.get('id')!r} of {source} has the keys {', '.join(row)}; expected image_id, asked (a "
                    "category) and label among them. Run the evaluation again, or take the row out."
                )
            try:
                pair, found = (str(row["image_id"]), row["asked"]), decision_of(row) == YES
            except ValueError as error:
                raise AnnotationError(
                    f"Row {row.get('id')!r} of {source}: {error}. Correct it, or take the row out."
                ) from error
            if decisions.setdefault(pair, found) != found:
                raise AnnotationError(
                    f"{source} says of image {pair[0]} both that it shows {pair[1]!r} and that it does not; expected "
                    "one row for each question. Take one of them out."
                )
        if not decisions:
            raise AnnotationError(f"{source} has no row of a presence task, so it is no presence map. {_HOW}.")
        present: dict[str, list[str]] = {image: [] for image, _ in decisions}
        for (image, name), found in decisions.items():
            if found:
                present[image].append(name)
        return cls({image: tuple(names) for image, names in present.items()}, frozenset(decisions), source)

    def asks(self, image_id: ImageId, category: str) -> bool:
        """Whether the second stage asks about this pair; False for a picture that is not in the map."""
        return category in self.present.get(str(image_id), ())

    def write(self, path: str | Path) -> None:
        """Write the published form in one step: no reader sees half a file."""
        text = json.dumps({image: list(names) for image, names in self.present.items()})
        write_whole(Path(path), text + "\n")


def _published(path: Path) -> dict[str, tuple[str, ...]]:
    """The content of a map in the published form."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # also of bytes that are no text
        raise AnnotationError(f"The presence map {path} is no JSON: {error}. {_HOW}.") from error
    if not isinstance(content, dict):
        raise AnnotationError(
            f"The presence map {path} is a {type(content).__name__}; expected an object of image id -> list of "
            f"category names. {_HOW}."
        )
    for image, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AnnotationError(
                f"The presence map {path} has {str(names)[:80]} for image {image!r}; expected a list of category "
                f"names. {_HOW}."
            )
    return {image: tuple(dict.fromkeys(names)) for image, names in content.items()}


__all__ = ["PresenceMap"]
