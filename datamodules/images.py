"""Images: a user's own unlabelled pictures, for `rft predict`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rft_lightning.datamodules.base import RFTDataModule
from rft_lightning.errors import ConfigConflictError, DatasetNotFoundError
from rft_lightning.sample import DetectionTarget, GroundingTarget, Sample, as_boxes
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask, Task

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Picture:
    """A picture file, its name in the results, and its size (width, height) in pixels."""

    path: Path
    name: str
    size: tuple[int, int]


class ImagesDataModule(RFTDataModule):
    """Questions about unlabelled pictures; for prediction only.

    For detection prefer `classes`: the question is then in the task's own wording, which states the range of the
    coordinates and the form of the answer that the policy was tuned on. A `question` of your own is asked as it stands,
    so it has to state both itself, or the answer may hold no boxes.

    Boxes are in pixels of the stored file: a rotation that the file's EXIF data asks for is not applied, neither to
    what the model sees nor to what is drawn. Of an animated picture the first frame is used.

    Args:
        images: a folder, searched with its subfolders for pictures in sorted order (hidden files left out), a single
            file, or a list of files and folders.
        question: asked of every picture, as it stands.
        classes: detection: class names, one question per picture and class; grounding: expressions, one question each.
        task: how the questions of `classes` are worded and the answers read; DetectionTask by default. A
            ClassificationTask asks its own question and needs neither `question` nor `classes`.
        **kwargs: see :class:`RFTDataModule`.

    Raises:
        ConfigConflictError: not exactly one of `question` and `classes`, or another split than "predict" is asked for.
        DatasetNotFoundError: (in `samples`) there are no pictures, or a file cannot be read as one.
    """

    splits = ("predict",)

    def __init__(
        self,
        *,
        images: str | Path | list[str | Path],
        question: str | None = None,
        classes: list[str] | None = None,
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.images, self.question = images, question
        self.classes = None if classes is None else list(dict.fromkeys(classes))
        self.task = task if task is not None else DetectionTask()
        self._check()

    def samples(self, split: str) -> Sequence[Sample]:
        """See the base class.

        Raises:
            ConfigConflictError: `split` is not "predict".
        """
        if split != "predict":
            raise ConfigConflictError(
                f"ImagesDataModule has no {split} split: its pictures have no right answers, so they can be predicted "
                "on only (`rft predict`). Training and evaluation need a datamodule with annotations."
            )
        return PictureRows(find_pictures(self.images), self._questions(), self.task)

    def _questions(self) -> list[tuple[str | None, str]]:
        """(class or expression, question) pairs that every picture is asked."""
        if self.question is not None:
            return [(None, self.question)]
        frame = self.encoder.frame
        if self.classes is None:
            return [(None, self.task.question(None, frame))]
        kind = GroundingTarget if isinstance(self.task, GroundingTask) else DetectionTarget
        return [(name, self.task.question(kind(as_boxes(None), name), frame)) for name in self.classes]

    def _check(self) -> None:
        own_question = isinstance(self.task, ClassificationTask)
        if own_question and self.classes is not None:
            raise ConfigConflictError(
                f"data.classes is {self.classes}, but the task is a ClassificationTask, which asks for the one class "
                "of a picture. Leave data.classes out; data.task.choices lists names to choose from."
            )
        given = (self.question is not None) + bool(self.classes)
        if given == 1 or (own_question and given == 0):
            return
        raise ConfigConflictError(
            f"{type(self.task).__name__} needs exactly one of data.question (asked of every picture as it stands) and "
            f"data.classes (one question per picture and class in the task's own wording), found question="
            f"{self.question!r} and classes={self.classes!r}. One that a file sets is switched off with null."
        )


class PictureRows(Sequence):
    """Samples of every (picture, question) pair, made when they are asked for; the questions of a picture in a row."""

    def __init__(self, pictures: Sequence[Picture], questions: list[tuple[str | None, str]], task: Task) -> None:
        self.pictures, self.questions, self.task = pictures, questions, task

    def __len__(self) -> int:
        return len(self.pictures) * len(self.questions)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        number, which = divmod(position % len(self), len(self.questions))
        picture, (asked, question) = self.pictures[number], self.questions[which]
        return Sample(
            id=picture.name if asked is None else f"{picture.name}/{asked}",
            image=picture.path,
            target=None,
            task=self.task,
            image_size=picture.size,
            image_id=picture.name,
            question=question,
            asked=asked,
        )


def find_pictures(images: str | Path | Sequence[str | Path]) -> list[Picture]:
    """The pictures of a folder, a file, or a list of both; each file once.

    A picture is named by its path in the folder; in a list, by the path as the list gives it.

    Raises:
        DatasetNotFoundError: nothing is there, there are no pictures, or a file cannot be read as one.
    """
    entries = [images] if isinstance(images, str | Path) else list(images)
    single = len(entries) == 1
    found: dict[Path, tuple[Path, str]] = {}
    for entry in (Path(entry).expanduser() for entry in entries):
        for path in _files(entry):
            inside = path.relative_to(entry) if entry.is_dir() else Path(path.name)
            found.setdefault(path.resolve(), (path, (inside if single else path).as_posix()))
    if not found:
        places = ", ".join(map(str, entries)) or "an empty list"
        raise DatasetNotFoundError(
            f"No pictures in {places}, subfolders included. Looked for files that end in {', '.join(EXTENSIONS)} "
            "(other formats, such as .heic, have to be converted). Set data.images to a folder of pictures or to files."
        )
    return _measured(list(found.values()))


def _files(entry: Path) -> Iterator[Path]:
    """The picture files of a folder; a file as it is, whatever its extension."""
    if not entry.exists():
        raise DatasetNotFoundError(f"data.images: no file or folder at {entry} (seen from {Path.cwd()}).")
    if entry.is_file():
        yield entry
        return
    for path in sorted(entry.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(entry).parts)
        if path.suffix.lower() in EXTENSIONS and not hidden and path.is_file():
            yield path


def _measured(found: Sequence[tuple[Path, str]]) -> list[Picture]:
    """Pictures with the sizes that their headers state, which also finds files that are no pictures in time."""
    pictures, bad = [], []
    for path, name in found:
        try:
            with Image.open(path) as image:
                pictures.append(Picture(path, name, image.size))
        except (OSError, Image.DecompressionBombError) as error:
            bad.append(f"{path} ({error})")
    if bad:
        raise DatasetNotFoundError(
            f"{len(bad)} of {len(found)} files cannot be read as pictures: {', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}. Remove them from data.images, or convert them."
        )
    return pictures


__all__ = ["EXTENSIONS", "ImagesDataModule", "Picture", "PictureRows", "find_pictures"]
