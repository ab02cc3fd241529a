"""DetectionDataModule: detection sets on disk, one question per picture and category."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from rft_lightning.datamodules.coco_annotations import CategoryObjects, Picture
from rft_lightning.datamodules.fewshot import hash_order
from rft_lightning.datamodules.negatives import positives_within, with_negatives
from rft_lightning.datamodules.queried import QueriedDataModule
from rft_lightning.datamodules.rows import Row
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.presence_map import ImageId
from rft_lightning.sample import DetectionTarget, Sample, Target
from rft_lightning.tasks import DetectionTask, PresenceTask

Pair = tuple[ImageId, int]  # (image id, category id)


@dataclass
class DetectionAnnotations:
    """What a split of a detection set says about its pictures.

    Attributes:
        name: prefix of its sample ids, such as ``lvis/train``.
        source: the file or folder it was read from, for messages.
        categories: category id -> name of the categories that are asked for.
        pictures: image id -> picture.
        objects: (image id, category id) -> what is annotated.
        absent: image id -> categories that are known not to be in it. None: those without objects, as in a data set in
            which everything is annotated.
        not_exhaustive: pairs of which not all objects are annotated.
        frequency: category id -> how frequent it is, in words of the data set; empty where it says nothing.
        annotation_count: number of annotations that were read, for messages.
    """

    name: str
    source: Path
    categories: dict[int, str]
    pictures: dict[ImageId, Picture] = field(default_factory=dict)
    objects: dict[Pair, CategoryObjects] = field(default_factory=dict)
    absent: dict[ImageId, frozenset[int]] | None = None
    not_exhaustive: set[Pair] = field(default_factory=set)
    frequency: dict[int, str] = field(default_factory=dict)
    annotation_count: int = 0

    def positives(self) -> list[Row]:
        """The pairs with a box, by image and category."""
        return [self.row(*pair) for pair in sorted(pair for pair, found in self.objects.items() if found.boxes)]

    def queries(self, mode: str, images: Collection[ImageId] | None = None) -> list[Row]:
        """The pairs to ask about in evaluation: the annotated ones, and but for ``gt`` those known to be absent."""
        pairs = {pair for pair, found in self.objects.items() if not found.is_empty}
        if mode != "gt":
            pairs.update((image, category) for image in self.pictures for category in self.known_absent(image))
        return [self.row(*pair) for pair in sorted(pairs) if images is None or pair[0] in images]

    def known_absent(self, image: ImageId) -> list[int]:
        """The categories that the picture is known not to show, ascending."""
        candidates = self.categories if self.absent is None else self.absent.get(image, ())
        return sorted(c for c in candidates if c in self.categories and (image, c) not in self.objects)

    def negatives(self, labels: Collection[str], seed: int) -> Iterator[Row]:
        """Pairs known to be absent in an order that looks random: each picture once, then each a second time, ..."""
        images = hash_order(self.pictures, seed=seed, salt="negatives")
        turn = 0
        while images:
            later = []
            for image in images:
                left = [category for category in self.known_absent(image) if self.categories[category] in labels]
                if turn < len(left):
                    later.append(image)
                    yield self.row(image, hash_order(left, seed=seed, salt=f"negatives/{image}")[turn])
            images, turn = later, turn + 1

    def row(self, image: ImageId, category: int) -> Row:
        """The question about a pair."""
        found = self.objects.get((image, category))
        return Row(
            f"{self.name}/{image}/{category}", image, self.categories[category], len(found.boxes) if found else 0
        )


class DetectionDataModule(QueriedDataModule):
    """What the detection sets share: training on what pictures show, negatives, and the questions of evaluation.

    Training rows are the (picture, category) pairs with a box. A subclass reads the annotations.

    Args:
        negative_fraction: share of training rows, in [0, 1), that ask for a category which the picture is known not to
            show, so that "No Objects" is right. Added to the shots; drawn by `seed`, at first one per picture.
            `max_rows` counts them.
        query_mode: questions in validation and test. ``all``: every category of every picture whose truth is known.
            ``gt``: only categories annotated in the picture, as if an oracle had named them. ``map``: of those of
            ``all``, what `presence_map` names, as the paper evaluates; what is annotated beyond counts as missed. A
            pair of the map whose truth is unknown is not asked: no answer to it could count.
        presence_map: for ``query_mode: map``: ``presence_map.json`` or ``predictions.jsonl`` of a presence evaluation,
            or a map of the authors; see :class:`rft_lightning.datamodules.queried.QueriedDataModule`.
        task: the task; DetectionTask by default. A PresenceTask asks whether the category is there: crowds count.
        **kwargs: see :class:`LabelledDataModule`.

    Raises:
        ConfigConflictError: an argument is out of its range, or a class is not in the data set.
    """

    def __init__(
        self,
        *,
        negative_fraction: float = 0.0,
        query_mode: Literal["all", "gt", "map"] = "all",
        presence_map: str | Path | None = None,
        task: DetectionTask | PresenceTask | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            negative_fraction=negative_fraction, query_mode=query_mode, presence_map=presence_map, task=task, **kwargs
        )
        if self.classes is not None and not self.classes:
            raise ConfigConflictError(f"Expected names of classes, or null for all, found classes={self.classes!r}.")
        self._annotations: dict[str, DetectionAnnotations] = {}

    @abstractmethod
    def read(self, split: str) -> DetectionAnnotations:
        """The annotations of "train", "val" or "test" about the wanted classes."""

    def annotations(self, split: str) -> DetectionAnnotations:
        """The annotations of "train", "val" or "test", read once."""
        if split not in self._annotations:
            self._annotations[split] = self.read(split)
        return self._annotations[split]

    @property
    def class_names(self) -> list[str]:
        """Names of the wanted classes, in the order of their ids."""
        data = next(iter(self._annotations.values()), None) or self.annotations("train")
        return list(data.categories.values())

    def pictures(self, split: str) -> Collection[ImageId]:
        """See the base class."""
        return self.annotations(split).pictures.keys()

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class."""
        data = self.annotations(split)
        return data.positives() if split == "train" else data.queries(self.query_mode)

    def maker(self, split: str, rows: Sequence[Row]) -> Callable[[Row], Sample]:
        """See the base class."""
        return DetectionSamples.of(self.annotations(split), rows, self.task)

    def setup(self, stage: str) -> None:
        """See the base class. What the chosen rows do not need is then let go."""
        super().setup(stage)
        self._annotations.clear()

    def complete(self, rows: list[Row], usable: Callable[[Row], bool] | None) -> list[Row]:
        """See the base class; adds the negatives."""
        share = self.negative_fraction
        data, taken = self.annotations("train"), {row.image for row in self._held_out}
        shown = self.limit(rows, positives_within(self.max_rows, share), salt="rows", usable=usable)
        absent = (
            row
            for row in data.negatives({row.label for row in rows}, self.seed)
            if row.image not in taken and str(row.image) not in self.excluded
        )
        return with_negatives(shown, absent, share=share, limit=self.max_rows, usable=usable, split=str(data.source))

    def questions(self, rows: list[Row]) -> list[Row]:
        """See the base class."""
        return self.annotations("train").queries(self.query_mode, {row.image for row in rows})

    def look_up(self, split: str, ids: Iterable[str]) -> dict[str, Row]:
        """See the base class; negatives are found too."""
        data = self.annotations(split)
        images = {str(image): image for image in data.pictures}
        found = {}
        for name in ids:
            image, _, category = name.removeprefix(f"{data.name}/").rpartition("/")
            if image in images and category.isdecimal() and int(category) in data.categories:
                row = data.row(images[image], int(category))
                found[row.id] = row
        return found

    def wording(self, split: str) -> dict[str, Any]:
        """See the base class."""
        data = self.annotations(split)
        return {
            "split": str(data.source),
            "looked_at": data.annotation_count,
            "remark": "Crowds and boxes without area are no examples.",
        }


@dataclass(frozen=True)
class DetectionSamples:
    """Samples of detection rows, with what is annotated of them."""

    task: DetectionTask | PresenceTask
    pictures: Mapping[ImageId, Picture]
    objects: Mapping[Pair, CategoryObjects]
    categories: Mapping[str, int]
    not_exhaustive: frozenset[Pair]
    frequency: Mapping[int, str]
    # Pictures whose size was already compared with the annotations.
    measured: set[ImageId] = field(default_factory=set)

    @classmethod
    def of(
        cls, data: DetectionAnnotations, rows: Iterable[Row], task: DetectionTask | PresenceTask
    ) -> DetectionSamples:
        """The maker of these rows; see :meth:`LabelledDataModule.maker`."""
        ids = {name: category for category, name in data.categories.items()}
        pairs = {(row.image, ids[row.label]) for row in rows}
        pictures = {image: data.pictures[image] for image in sorted({image for image, _ in pairs})}
        check_pictures(pictures, data.source)
        return cls(
            task=task,
            pictures=pictures,
            objects={pair: data.objects[pair] for pair in pairs if pair in data.objects},
            categories=ids,
            not_exhaustive=frozenset(pairs & data.not_exhaustive),
            frequency=data.frequency,
        )

    def __call__(self, row: Row) -> Sample:
        picture, category = self.pictures[row.image], self.categories[row.label]
        if row.image not in self.measured:
            check_size(row.image, picture)
            self.measured.add(row.image)
        pair = (row.image, category)
        found = self.objects.get(pair, CategoryObjects())
        objects = DetectionTarget(
            found.boxes,
            category=row.label,
            category_id=category,
            areas=found.areas,
            ignore_boxes=found.ignore_boxes,
            ignore_areas=found.ignore_areas,
            not_exhaustive=pair in self.not_exhaustive,
            frequency=self.frequency.get(category),
            image_size=picture.size,
        )
        target: Target = self.task.target(objects) if isinstance(self.task, PresenceTask) else objects
        return Sample(row.id, picture.path, target, self.task, picture.size, image_id=row.image)


def check_pictures(pictures: Mapping[ImageId, Picture], source: Path) -> None:
    """See that the pictures exist, with one listing per folder: single look-ups take minutes on a network disk.

    Raises:
        DatasetNotFoundError: pictures are missing.
    """
    folders = {picture.path.parent for picture in pictures.values()}
    names = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in folders}
    missing = [image for image, p in pictures.items() if p.path.name not in names[p.path.parent]]
    if missing:
        raise DatasetNotFoundError(
            f"Image {missing[0]!r} in {source} needs the picture {pictures[missing[0]].path}, which does not exist. "
            f"{len(missing)} of the {len(pictures)} pictures used are missing: restore them, set data.image_root to "
            "their folder, or remove them and their annotations from the file."
        )


def check_size(image: ImageId, picture: Picture) -> None:
    """Compare the size of a picture with the annotations; only its header is read.

    Raises:
        DatasetNotFoundError: the picture cannot be read.
        AnnotationError: the sizes differ.
    """
    found = picture_size(picture.path)
    if found != picture.size:
        raise AnnotationError(
            f"The picture {picture.path} has {found[0]}x{found[1]} pixels, but the annotations of image {image!r} "
            f"state {picture.size[0]}x{picture.size[1]}, so its boxes do not fit. Restore the original picture, "
            "without resizing or rotating it, or correct the annotations."
        )


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as it is stored: EXIF rotation is not applied, as annotations do not apply it.

    Raises:
        DatasetNotFoundError: the picture cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return picture.size
    except OSError as error:
        raise DatasetNotFoundError(
            f"The picture {path} cannot be read ({error}). Restore it, or remove its annotations."
        ) from error


__all__ = [
    "DetectionAnnotations",
    "DetectionDataModule",
    "DetectionSamples",
    "ImageId",
    "Pair",
    "check_pictures",
    "check_size",
    "picture_size",
]
