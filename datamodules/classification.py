"""ClassificationDataModule: pictures of one class each."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from rft_lightning.datamodules.labelled import LabelledDataModule
from rft_lightning.datamodules.rows import Row
from rft_lightning.datamodules.selection import with_close_matches
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.rewards.accuracy import normalise_label
from rft_lightning.sample import ClassTarget, Sample
from rft_lightning.tasks import ClassificationTask


@dataclass(frozen=True, slots=True)
class Labelled:
    """A picture and its class: path in the data set, with forward slashes and the same everywhere, and class name."""

    path: str
    label: str


class ClassificationDataModule(LabelledDataModule):
    """What the classification sets share; a set says where its pictures are and what they show.

    Args:
        task: the task; a ClassificationTask in the words of the data set by default.
        **kwargs: see :class:`LabelledDataModule`. `classes` may name a class in any spelling that counts as right.

    Raises:
        ConfigConflictError: an argument is out of its range, or (in `samples`) a class is not in the data set.
        DatasetNotFoundError: (in `samples`) files or pictures are missing, or a picture cannot be read.
        AnnotationError: (in `samples`) files cannot be used, or list a picture twice.
    """

    # Prefix of sample ids.
    name: ClassVar[str]
    # Words of the default question: "This is an image containing {subject}. Please identify {noun} based on the image."
    subject: ClassVar[str] = "an object"
    noun: ClassVar[str] = "the class of the object"
    # Where the data set comes from: a sentence for messages.
    origin: ClassVar[str] = ""
    # Rows of pixels at the bottom of every picture that are cut off.
    cropped_rows: int = 0

    def __init__(self, *, task: ClassificationTask | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = task if task is not None else ClassificationTask(subject=self.subject, noun=self.noun)

    @abstractmethod
    def all_classes(self) -> list[str]:
        """Names of all classes, in the data set's own order."""

    @abstractmethod
    def pictures(self, split: str) -> Sequence[Labelled]:
        """The pictures of a split, in the order of the data set's files."""

    @abstractmethod
    def picture_path(self, path: str) -> Path:
        """Where the picture with this path in the data set lies on this machine; it need not exist."""

    def aliases(self, label: str) -> tuple[str, ...]:
        """Other spellings of a class name that are right, too."""
        return ()

    @property
    def class_names(self) -> list[str]:
        """Names of the wanted classes, in the data set's order.

        Raises:
            ConfigConflictError: a wanted class is not in the data set.
        """
        names = self.all_classes()
        if self.classes is None:
            return names
        spellings = by_spelling(names, self.aliases)
        wanted = [self.classes] if isinstance(self.classes, str) else list(self.classes)
        unknown = [name for name in wanted if normalise_label(name) not in spellings]
        if unknown:
            raise ConfigConflictError(
                f"Unknown class in data.classes: {'; '.join(with_close_matches(name, names) for name in unknown)}. "
                f"{type(self).__name__} has {len(names)} classes: {', '.join(names)}."
            )
        chosen = {spellings[normalise_label(name)] for name in wanted}
        return [name for name in names if name in chosen]

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class."""
        wanted, pictures = set(self.class_names), self.pictures(split)
        self._check_unique(split, pictures)
        return [Row(f"{self.name}/{p.path}", p.path, p.label) for p in pictures if p.label in wanted]

    def maker(self, split: str, rows: Sequence[Row]) -> Callable[[Row], Sample]:
        """See the base class."""
        files = {str(row.image): self.picture_path(str(row.image)) for row in rows}
        self._check_files(split, files)
        aliases = {label: self.aliases(label) for label in {row.label for row in rows}}
        return ClassSamples(
            files, {label: names for label, names in aliases.items() if names}, self.task, self.cropped_rows
        )

    def _check_unique(self, split: str, pictures: Sequence[Labelled]) -> None:
        twice = [path for path, count in Counter(picture.path for picture in pictures).items() if count > 1]
        if twice:
            labels = dict.fromkeys(picture.label for picture in pictures if picture.path == twice[0])
            raise AnnotationError(
                f"{len(twice)} pictures are listed more than once in the {split} split of {self.root}: {twice[0]} (as "
                f"{', '.join(map(repr, labels))}){', ...' if len(twice) > 1 else ''}. Expected each picture once, with "
                "one class. Remove the repeated entries."
            )

    def _check_files(self, split: str, files: Mapping[str, Path]) -> None:
        """One listing per folder instead of a look-up per picture, which takes minutes on a network disk."""
        held = {folder: names_in(folder) for folder in {file.parent for file in files.values()}}
        missing = [file for file in files.values() if file.name not in held[file.parent]]
        if missing:
            raise DatasetNotFoundError(
                f"{len(missing)} of the {len(files)} pictures used of the {split} split do not exist: {missing[0]}"
                f"{', ...' if len(missing) > 1 else ''}. Restore them, or take them out of the lists. {self.origin}"
            )


@dataclass(frozen=True)
class ClassSamples:
    """Samples of classification rows.

    Attributes:
        files: path in the data set -> file.
        aliases: class name -> other spellings of it.
        task: the task.
        cropped_rows: rows of pixels to cut off at the bottom.
    """

    files: Mapping[str, Path]
    aliases: Mapping[str, tuple[str, ...]]
    task: ClassificationTask
    cropped_rows: int = 0

    def __call__(self, row: Row) -> Sample:
        file = self.files[str(row.image)]
        image: Image.Image | Path = file
        with readable(file) as picture:
            size = picture.size
            if self.cropped_rows:
                size = size[0], max(1, size[1] - self.cropped_rows)
                image = picture.convert("RGB").crop((0, 0, *size))
        target = ClassTarget(row.label, self.aliases.get(row.label, ()), size)
        return Sample(row.id, image, target, self.task, size, image_id=row.image)


@contextmanager
def readable(file: Path) -> Iterator[Image.Image]:
    """An open picture; only its header is read, and EXIF rotation not applied.

    Raises:
        DatasetNotFoundError: the file is no picture, or not a whole one.
    """
    try:
        with Image.open(file) as picture:
            yield picture
    except OSError as error:
        raise DatasetNotFoundError(
            f"The picture {file} cannot be read ({error}). Restore it, take it out of the lists, or set "
            "data.on_bad_image to skip."
        ) from error


def by_spelling(names: Iterable[str], aliases: Callable[[str], Iterable[str]]) -> dict[str, str]:
    """Every spelling of class names, normalised, -> the name."""
    return {normalise_label(spelling): name for name in names for spelling in (name, *aliases(name))}


def names_in(folder: Path) -> set[str]:
    """What a folder holds; nothing if there is no such folder."""
    return set(os.listdir(folder)) if folder.is_dir() else set()


__all__ = [
    "ClassSamples",
    "ClassificationDataModule",
    "Labelled",
    "by_spelling",
    "names_in",
    "readable",
]
