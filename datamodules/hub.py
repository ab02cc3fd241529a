"""HubDataModule: training sets of questions and solutions, as Visual-RFT and other trainers publish them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from rft_lightning.datamodules.hub_answers import Kind, Reading, plain_question, read_row, tagged
from rft_lightning.datamodules.hub_sources import (
    Identity,
    Source,
    digest,
    open_source,
    place_identity,
    split_off,
    tell_apart,
)
from rft_lightning.datamodules.labelled import LabelledDataModule
from rft_lightning.datamodules.rows import Row
from rft_lightning.datamodules.selection import select_classes
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import ClassTarget, DetectionTarget, GroundingTarget, Sample, Target, as_boxes
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask, Task

_FRAMES = {"norm1000": CoordinateFrame("relative", extent=1000), "pixel": CoordinateFrame("pixel")}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a row lies and what it says."""

    source: Source
    index: int
    reading: Reading
    row: Row


class HubDataModule(LabelledDataModule):
    """Rows of a picture, a question and its solution: ``laolao77/ViRFT_*`` and the formats of other trainers.

    A place is one of

    - an id on the Hugging Face Hub (columns image, problem, solution), or a folder or file with its parquet files;
    - a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote;
    - a .json or .jsonl file: rows of ``image``, ``image_path`` or ``images`` (one picture), ``problem``, and
      ``solution`` or ``answer`` (Visual-RFT, EasyR1); or conversations of one question and one answer (VLM-R1, LISA's
      supervised set);

    with ``@SPLIT`` behind it where it has several splits ("train" otherwise), and several of them joined by ":".
    Row ids begin with the name of the file or folder, and picture ids are the paths in the rows; where two have the
    same, the folders above are added.

    Detection rows ask for a category and are answered by ``[{'Position': [x1, y1, x2, y2], 'Confidence': 1}, ...]`` or
    ``No Objects``, grounding rows follow an instruction with one box, everything else names a class; solutions stand in
    ``<answer>`` tags or bare. Pictures are decoded when a sample is encoded; their sizes come from the file headers.

    Args:
        root: the place of the training rows.
        val_root: the place of the validation rows; ``@SPLIT`` alone is another split of `root`. null: `val_shots`
            training pictures per class, or the test rows.
        test_root: the place of the test rows; null: the training rows, with a warning.
        image_folders: folder that image paths are relative to, one per place of `root`, joined by ":"; null: the folder
            of each file.
        columns: names of the columns (image, problem, solution) where they are other than the above.
        coordinates: the unit of the boxes in the solutions: ``norm1000`` (0 to 1000 over width and height, as
            Visual-RFT has them) or ``pixel`` (of the original picture, as VLM-R1 has them).
        question: ``verbatim`` asks the question of the row and takes its solution as it stands; ``task`` words both
            anew for the policy's own frame.
        task: the task of all rows; null: told from each row.
        **kwargs: see :class:`LabelledDataModule`. `classes` are categories or class names; grounding rows have none.

    Raises:
        ConfigConflictError: (in `samples`) the questions state another range than the policy's frame.
        DatasetNotFoundError: (in `samples`) there is nothing at a place, or the Hub cannot be reached.
        AnnotationError: (in `samples`) a column is missing, a solution cannot be read, or a place is named twice.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        val_root: str | None = None,
        test_root: str | None = None,
        image_folders: str | None = None,
        columns: dict[str, str] | None = None,
        coordinates: Literal["norm1000", "pixel"] = "norm1000",
        question: Literal["verbatim", "task"] = "verbatim",
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        self.place, self.val_root, self.test_root = str(root), val_root, test_root
        self.image_folders, self.columns = image_folders, columns
        self.coordinates, self.question, self.task = coordinates, question, task
        # Unlike other sets this one has the splits it is given.
        self.has_val = val_root is not None
        self._entries: dict[str, dict[str, Entry]] = {}
        self._pictures: dict[Identity, str] = {}  # of the training rows

    @property
    def class_names(self) -> list[str]:
        """The categories or classes of the training rows that are asked for, in alphabetical order.

        Raises:
            ConfigConflictError: a wanted class has no row.
        """
        return list(select_classes(dict(enumerate(self._all_classes())), self.classes, Path(self.place)).values())

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class."""
        wanted = None if self.classes is None else set(self.class_names)
        return [entry.row for entry in self._read(split).values() if wanted is None or entry.row.label in wanted]

    def maker(self, split: str, rows: Sequence[Row]) -> Callable[[Row], Sample]:
        """See the base class."""
        entries = self._read(split)
        chosen = {row.id: entries[row.id] for row in rows}
        tasks = dict.fromkeys(_TASKS, self.task) if self.task is not None else {k: t() for k, t in _TASKS.items()}
        self._check_frame(chosen.values())
        return HubSamples(chosen, tasks, self._all_classes(), self.coordinates, self.question == "verbatim")

    def _all_classes(self) -> list[str]:
        return sorted({entry.row.label for entry in self._read("train").values()} - {""})

    def _read(self, split: str) -> dict[str, Entry]:
        """The rows of a split by their ids, read once."""
        place = self._place(split)
        if place not in self._entries:
            if place != self.place:
                self._read("train")  # its pictures have the first choice of names
            self._entries[place] = self._read_place(place)
        return self._entries[place]

    def _read_place(self, place: str) -> dict[str, Entry]:
        found = [(source, i, source.identity(i)) for source in self._sources(place) for i in range(len(source))]
        pictures = tell_apart(
            (identity for _, _, identity in found), [(name, path) for (_, path), name in self._pictures.items()]
        )
        if place == self.place:
            self._pictures = pictures
        entries: dict[str, Entry] = {}
        for source, index, identity in found:
            entry = self._entry(source, index, pictures[identity])
            if entry.row.id in entries:
                raise AnnotationError(f"{place} has the row {entry.row.id} twice: name each file or folder once.")
            entries[entry.row.id] = entry
        return entries

    def _entry(self, source: Source, index: int, picture: str) -> Entry:
        reading = self._reading(source, index)
        content = digest(source.problems[index].encode(), source.solutions[index].encode())
        objects = 1 if reading.kind == "classification" else len(reading.boxes)
        row = Row(f"hub/{source.name}/{index}-{content}", picture, reading.label, objects)
        return Entry(source, index, reading, row)

    def _place(self, split: str) -> str:
        place = {"train": self.place, "val": self.val_root, "test": self.test_root}[split]
        if place is not None:
            return ":".join(split_off(p)[0] + place for p in self.place.split(":")) if place[:1] == "@" else place
        warnings.warn(
            f"data.test_root is null: {self.place} has no rows of its own for evaluation, so the training rows are "
            "used. Their scores say nothing about unseen pictures.",
            stacklevel=2,
        )
        return self.place

    def _sources(self, place: str) -> list[Source]:
        places = place.split(":")
        folders = [None] * len(places) if self.image_folders is None else self.image_folders.split(":")
        if len(folders) != len(places):
            raise ConfigConflictError(
                f"data.image_folders names {len(folders)} folders for the {len(places)} places of {place}; expected "
                "one for each, joined by ':'."
            )
        names = self._names()
        return [
            open_source(p, name=names[p], folder=Path(f).expanduser() if f else None, columns=self.columns)
            for p, f in zip(places, folders, strict=True)
        ]

    def _names(self) -> dict[str, str]:
        """What each place is called; those of `root` have the first choice, so that their rows keep their ids."""
        names: dict[str, str] = {}
        for split in ("train", "val", "test"):
            if (split, None) in (("val", self.val_root), ("test", self.test_root)):
                continue
            places = {place: place_identity(place) for place in self._place(split).split(":")}
            told = tell_apart(places.values(), [(name, place_identity(place)[1]) for place, name in names.items()])
            names |= {place: told[identity] for place, identity in places.items()}
        return names

    def _reading(self, source: Source, index: int) -> Reading:
        problem, solution = source.problems[index], source.solutions[index]
        try:
            reading = read_row(problem, solution, None if self.task is None else _kind_of(self.task))
        except ValueError as error:
            raise AnnotationError(
                f"{source.name}, row {index}: the solution {solution[:200]!r} cannot be read: {error}. The question: "
                f"{problem[:200]!r}"
            ) from error
        greatest = max((number for box in reading.boxes for number in box), default=0)
        if self.coordinates == "norm1000" and greatest > 1000:
            raise AnnotationError(
                f"{source.name}, row {index}: the solution {solution[:200]!r} goes beyond 1000. If its boxes are in "
                "pixels, set data.coordinates to pixel (and data.question to task, if its questions do not say so)."
            )
        return reading

    def _check_frame(self, entries: Iterable[Entry]) -> None:
        """Questions that stand as they are state a range, which has to be the policy's."""
        with_boxes = any(entry.reading.kind != "classification" for entry in entries)
        if self.processor is None or self.question == "task" or self.coordinates != "norm1000" or not with_boxes:
            return
        frame = self.encoder.frame
        if (frame.kind, frame.extent) != ("relative", 1000):
            raise ConfigConflictError(
                f"The rows of {self.place} ask for boxes between 0 and 1000, but {self.processor} writes "
                f"boxes {frame.describe()}. Word the questions anew with data.question task, or have the policy write "
                "0 to 1000 with data.frame '{kind: relative, extent: 1000}'."
            )


@dataclass(frozen=True)
class HubSamples:
    """Samples of rows.

    Attributes:
        entries: where each row lies and what it says, by its id.
        tasks: the task of each kind of row.
        names: the categories, in the order of their ids.
        coordinates: the unit of the boxes.
        verbatim: whether question and solution text stay as they are.
    """

    entries: Mapping[str, Entry]
    tasks: Mapping[str, Task]
    names: Sequence[str]
    coordinates: str
    verbatim: bool

    def __call__(self, row: Row) -> Sample:
        entry = self.entries[row.id]
        source, index, reading = entry.source, entry.index, entry.reading
        picture = source.picture(index)
        opened = open_picture(picture, f"{source.name}, row {index}")
        target = self._target(reading, opened.size)
        target.image_size = opened.size
        question = None
        if self.verbatim:
            question = plain_question(source.problems[index])
            # Pixels of the original picture are no policy's way to write; the task writes those boxes.
            if self.coordinates == "norm1000" or reading.kind == "classification":
                target.solution_text = tagged(source.solutions[index])
        image = picture if isinstance(picture, Path) else opened
        return Sample(
            row.id, image, target, self.tasks[reading.kind], opened.size, image_id=row.image, question=question
        )

    def _target(self, reading: Reading, size: tuple[int, int]) -> Target:
        if reading.kind == "classification":
            return ClassTarget(reading.label)
        boxes = _FRAMES[self.coordinates].to_pixels(as_boxes(reading.boxes), size)
        if reading.kind == "grounding":
            return GroundingTarget(boxes, expression=reading.asked)
        number = self.names.index(reading.label) + 1 if reading.label in self.names else len(self.names) + 1
        return DetectionTarget(boxes, category=reading.asked, category_id=number)


def open_picture(picture: bytes | Path, where: str) -> Image.Image:
    """A picture of which only the header is read so far.

    Raises:
        DatasetNotFoundError: it is not there or is no picture.
    """
    try:
        if isinstance(picture, Path):
            with Image.open(picture) as opened:
                return opened
        return Image.open(io.BytesIO(picture))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # all of them Pillow's
        raise DatasetNotFoundError(
            f"{where}: the picture {picture if isinstance(picture, Path) else 'in the row'} cannot be read ({error}). "
            "Paths are relative to data.image_folders."
        ) from error


_TASKS: dict[Kind, type[Task]] = {
    "detection": DetectionTask,
    "classification": ClassificationTask,
    "grounding": GroundingTask,
}


def _kind_of(task: Task) -> Kind:
    for kind, task_class in _TASKS.items():
        if isinstance(task, task_class):
            return kind
    raise ConfigConflictError(
        f"HubDataModule reads rows of detection, classification and grounding, found {type(task).__name__}."
    )


__all__ = ["HubDataModule", "HubSamples"]
