"""COCO detection: the official trees of 2014 and 2017, few-shot splits and class subsets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rft_lightning.datamodules.coco_annotations import (
    CategoryObjects,
    COCOAnnotations,
    Picture,
    RowKey,
    check_size,
    coco_root,
)
from rft_lightning.datamodules.download import Download
from rft_lightning.datamodules.negatives import positives_within, with_negatives
from rft_lightning.datamodules.queried import QueriedDataModule
from rft_lightning.datamodules.rows import Row
from rft_lightning.errors import ConfigConflictError
from rft_lightning.sample import DetectionTarget, Sample, Target
from rft_lightning.tasks import DetectionTask, PresenceTask

# The 8 categories of Visual-RFT's few-shot experiments.
FEW_SHOT_8 = ("bus", "train", "fire hydrant", "stop sign", "cat", "dog", "bed", "toilet")
# The 65 base and 15 novel categories of Visual-RFT's open-vocabulary experiments: the split of Rahman et al. (PL-ZSD),
# not OVR-CNN's 48/17.
# fmt: off
BASE_65 = (
    "person", "bicycle", "car", "motorcycle", "bus", "truck", "boat", "traffic light", "fire hydrant", "stop sign",
    "bench", "bird", "dog", "horse", "sheep", "cow", "elephant", "zebra", "giraffe", "backpack", "umbrella", "handbag",
    "tie", "skis", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket",
    "bottle", "wine glass", "cup", "knife", "spoon", "bowl", "banana", "apple", "orange", "broccoli", "carrot", "pizza",
    "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "tv", "laptop", "remote", "keyboard",
    "cell phone", "microwave", "oven", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "toothbrush",
)
NOVEL_15 = (
    "mouse", "fork", "hot dog", "cat", "airplane", "suitcase", "parking meter", "sandwich", "train", "hair drier",
    "toilet", "toaster", "snowboard", "frisbee", "bear",
)
# fmt: on
CLASS_SETS = {"few_shot_8": FEW_SHOT_8, "base_65": BASE_65, "novel_15": NOVEL_15}

# md5 of the official archives (tensorflow_datasets' url_checksums).
_ARCHIVES = {
    "train2017": "cced6f7f71b7629ddf16f17bbcfab6b2",
    "val2017": "442b8da7639aecaf257c1dceb8ba8c80",
    "train2014": "0da8cfa0e090c266b78f30e2d2874f1a",
    "val2014": "a3d79f5ed8d289b7a7554ce06a5782b3",
    "annotations_trainval2017": "f4bbac642086de4f52a3fdda2de5fa2c",
    "annotations_trainval2014": "0a379cfc70b0e71301e0f377548639bd",
}

# Pairs of different official splits that share pictures: val2017 is a part of val2014, train2017 is the rest of 2014.
_OVERLAPS = ({"val2014", "val2017"}, {"val2014", "train2017"}, {"train2014", "train2017"})


class COCODetectionDataModule(QueriedDataModule):
    """One question per picture and category: all boxes of the category.

    Reads the official trees of 2017 and 2014 as they are unpacked, below `root` or below ``{root}/coco``::

        root/
          annotations/instances_train2017.json  instances_val2017.json  (and of 2014)
          train2017/000000000009.jpg ...  val2017/ ...
          train2014/COCO_train2014_000000000009.jpg ...  val2014/ ...

    Ids are COCO's own: 80 categories with ids from 1 to 90. train2017 has 118,287 pictures with 860,001 boxes, val2017
    5,000 with 36,781, train2014 82,783 with 604,907 and val2014 40,504 with 291,875; val2017 is a part of val2014.

    Training rows are the (picture, category) pairs with at least one box. Crowds (``iscrowd``) are no answers and no
    shots; in evaluation they are regions where an answer is neither right nor wrong. Boxes are clipped to the picture,
    and those without width or height dropped. Every picture that a split uses must exist and have the size that the
    annotations state; the size is checked at the start for up to 10,000 pictures, and else when a sample is made.
    What is parsed of a large annotation file is kept beside it for the next start (``.instances_*.json.rft.npz``).

    Licence: annotations CC BY 4.0; the pictures are under the terms of Flickr. Citation: Lin et al.: Microsoft COCO:
    Common Objects in Context, ECCV 2014. https://cocodataset.org

    Published few-shot draws (TFA's ``full_box_*``) are given as `manifest`: their pool is train2017, their test is
    val2017.

    Args:
        root: folder of the COCO tree.
        train_split: split that training rows are drawn from, any of ``train2017 val2017 train2014 val2014``.
        val_split: split of validation. null for none: `val_shots` then holds pictures of the training split out.
        test_split: split of test and prediction.
        classes: names of the categories, or the name of a set: ``few_shot_8``, ``base_65``, ``novel_15`` (the paper's).
            null for all; a category without training examples is then left out of training with a warning, while one
            that was named is an error.
        val_shots: pictures per category in validation, as in :class:`LabelledDataModule`; they are asked what
            `query_mode` says.
        max_rows: most training rows, negatives included, drawn by `seed` after the shots. null for no limit.
        negative_fraction: share of training rows, in [0, 1), that ask for a category which the picture does not show
            (no annotation at all, no crowd either), so that "No Objects" is right. Added to the shots; drawn by `seed`
            from all pictures of the training split, at first one per picture.
        query_mode: questions in validation, test and prediction. ``all``: every category of every picture, pictures
            without boxes included. ``gt``: only categories annotated in the picture (crowds count), as if an oracle
            had named them; pictures that show none of the classes have no question then. ``map``: only what
            `presence_map` names, as the paper evaluates; what is annotated beyond counts as missed.
        presence_map: for ``query_mode: map``: ``presence_map.json`` or ``predictions.jsonl`` of a presence evaluation,
            or a map of the authors; see :class:`rft_lightning.datamodules.queried.QueriedDataModule`.
        val_limit: validate on so many pictures, the first by id; test and prediction take all. null for all.
        exclude_image_ids: pictures that no training row may show, such as the validation file of LVIS, whose pictures
            are partly in train2017.
        task: the task; DetectionTask by default. A PresenceTask asks whether the category is there: crowds count.
        **kwargs: see :class:`LabelledDataModule`.

    Raises:
        ConfigConflictError: an argument is out of its range, or (in `samples`) a class is not in the annotation file.
        DatasetNotFoundError: (in `samples`) the root, an annotation file or a picture is missing.
        AnnotationError: (in `samples`) an annotation file cannot be used, or a picture has another size than it says.
        EmptyClassError: (in `samples`) a named class has no training example.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        train_split: str = "train2017",
        val_split: str | None = "val2017",
        test_split: str = "val2017",
        classes: list[str] | str | None = None,
        val_shots: int | None = None,
        max_rows: int | None = None,
        negative_fraction: float = 0.0,
        query_mode: Literal["all", "gt", "map"] = "all",
        presence_map: str | Path | None = None,
        val_limit: int | None = None,
        exclude_image_ids: list[int | str] | str | Path | None = None,
        task: DetectionTask | PresenceTask | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root,
            classes=classes,
            val_shots=val_shots,
            max_rows=max_rows,
            val_limit=val_limit,
            exclude_image_ids=exclude_image_ids,
            negative_fraction=negative_fraction,
            query_mode=query_mode,
            presence_map=presence_map,
            task=task,
            **kwargs,
        )
        self.downloads = official_files((train_split, val_split, test_split))
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self._annotations: dict[str, COCOAnnotations] = {}
        if self.classes is not None and not self.classes:
            raise ConfigConflictError(
                f"Expected class names, the name of a set ({', '.join(CLASS_SETS)}) or null for all classes, found "
                f"classes={self.classes!r}."
            )

    @property
    def has_val(self) -> bool:
        """Whether validation has a split of its own."""
        return self.val_split is not None

    @property
    def class_names(self) -> list[str]:
        """See the base class."""
        return list(self._select(self._data("train")).values())

    def pictures(self, split: str) -> Collection[int]:
        """See the base class."""
        return self._data(split).pictures.keys()

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class."""
        data = self._data(split)
        if split != "train":
            return self._evaluation_rows(data, data.pictures)
        categories = self._select(data)
        pairs = sorted(pair for pair, found in data.objects.items() if pair[1] in categories and found.boxes)
        return [_row(data, pair) for pair in pairs]

    def maker(self, split: str, rows: Sequence[Row]) -> Callable[[Row], Sample]:
        """See the base class."""
        return COCOSamples.of(self._data(split), rows, self.task)

    def samples(self, split: str) -> Sequence[Sample]:
        """See the base class."""
        if split == "train":
            self._warn_about_overlap()
        return super().samples(split)

    def setup(self, stage: str) -> None:
        """See the base class. What the chosen rows do not need is then let go."""
        super().setup(stage)
        self._annotations.clear()

    def complete(self, rows: list[Row], usable: Callable[[Row], bool] | None) -> list[Row]:
        """At most `max_rows` rows, of which about `negative_fraction` ask for what is not there."""
        data, share = self._data("train"), self.negative_fraction
        trained = sorted({self.key(row)[1] for row in rows})
        shown = self.limit(rows, positives_within(self.max_rows, share), salt="rows", usable=usable)
        skip = {row.image for row in self._held_out}
        if self.excluded:
            skip |= {image for image in data.pictures if str(image) in self.excluded}
        absent = (_row(data, pair) for pair in data.absent(trained, self.seed, skip=skip))
        limit = self.max_rows
        full = with_negatives(shown, absent, share=share, limit=limit, usable=usable, split=self.train_split)
        return sorted(full, key=self.key)

    def questions(self, rows: list[Row]) -> list[Row]:
        """See the base class."""
        return self._evaluation_rows(self._data("train"), {row.image for row in rows})

    def limit_validation(self, rows: list[Row]) -> list[Row]:
        """The rows of the first `val_limit` pictures by id."""
        kept = set(sorted({row.image for row in rows})[: self.val_limit])
        return [row for row in rows if row.image in kept]

    def look_up(self, split: str, ids: Iterable[str]) -> dict[str, Row]:
        """See the base class; a manifest also names rows about what pictures do not show."""
        data = self._data(split)
        categories = self._select(data)
        found = {}
        for name in ids:
            prefix, _, pair = name.partition(f"coco/{data.split}/")
            image, _, category = pair.partition("/")
            if not prefix and image.isdecimal() and category.isdecimal():
                key = int(image), int(category)
                if key[0] in data.pictures and key[1] in categories:
                    found[name] = _row(data, key)
        return found

    def wording(self, split: str) -> dict[str, Any]:
        """See the base class."""
        data = self._data(split)
        remark = "Crowd regions and boxes without area are no examples."
        return {"split": data.split, "looked_at": data.annotation_count, "remark": remark}

    def key(self, row: Row) -> RowKey:
        """(image id, category id)."""
        _, _, image, category = row.id.split("/")
        return int(image), int(category)

    def _evaluation_rows(self, data: COCOAnnotations, images: Iterable[int | str]) -> list[Row]:
        categories = self._select(data)
        pairs = [(image, category) for image in sorted(images) for category in categories]
        if self.query_mode == "gt":
            pairs = [pair for pair in pairs if pair in data.objects and not data.objects[pair].is_empty]
        return [_row(data, pair) for pair in pairs]

    def _data(self, split: str) -> COCOAnnotations:
        """The annotations of "train", "val" or "test"; each file is read once."""
        name = {"train": self.train_split, "val": self.val_split, "test": self.test_split}[split] or self.train_split
        if name not in self._annotations:
            self._annotations[name] = COCOAnnotations(coco_root(self.root, name), name)
        return self._annotations[name]

    def _select(self, data: COCOAnnotations) -> dict[int, str]:
        """Category id -> name of the classes that are asked for."""
        names = CLASS_SETS.get(self.classes, [self.classes]) if isinstance(self.classes, str) else self.classes
        return data.select(names, sets=CLASS_SETS)

    def _warn_about_overlap(self) -> None:
        for name in ("val_split", "test_split"):
            other = getattr(self, name)
            if other == self.train_split or {self.train_split, other} in _OVERLAPS:
                warnings.warn(
                    f"train_split {self.train_split} and {name} {other} share pictures: the scores on {other} are no "
                    "measure of unseen pictures.",
                    stacklevel=2,
                )


def _row(data: COCOAnnotations, pair: RowKey) -> Row:
    found = data.objects.get(pair)
    count = len(found.boxes) if found is not None else 0
    return Row(f"coco/{data.split}/{pair[0]}/{pair[1]}", pair[0], data.categories[pair[1]], count)


@dataclass(frozen=True)
class COCOSamples:
    """Samples of COCO's rows, with what is annotated of them and nothing else."""

    file: Path
    split: str
    task: DetectionTask | PresenceTask
    pictures: Mapping[int, Picture]
    objects: Mapping[RowKey, CategoryObjects]
    categories: Mapping[str, int]
    # Whether the sizes of the pictures were compared with the file.
    checked: bool

    @classmethod
    def of(cls, data: COCOAnnotations, rows: Sequence[Row], task: DetectionTask | PresenceTask) -> COCOSamples:
        """The maker of these rows.

        Raises:
            DatasetNotFoundError, AnnotationError: see :meth:`COCOAnnotations.check_pictures`.
        """
        images = {int(row.image) for row in rows}
        checked = data.check_pictures(images)
        categories = {name: category for category, name in data.categories.items()}
        pairs = ((int(row.image), categories[row.label]) for row in rows)
        return cls(
            file=data.file,
            split=data.split,
            task=task,
            pictures={image: data.pictures[image] for image in images},
            objects={pair: data.objects[pair] for pair in pairs if pair in data.objects},
            categories=categories,
            checked=checked,
        )

    def __call__(self, row: Row) -> Sample:
        image, category = int(row.image), self.categories[row.label]
        picture, found = self.pictures[image], self.objects.get((image, category), CategoryObjects())
        if not self.checked:
            check_size(image, picture, self.file, self.split)
        objects = DetectionTarget(
            found.boxes,
            category=row.label,
            category_id=category,
            areas=found.areas,
            ignore_boxes=found.ignore_boxes,
            ignore_areas=found.ignore_areas,
            image_size=picture.size,
        )
        target: Target = self.task.target(objects) if isinstance(self.task, PresenceTask) else objects
        return Sample(row.id, picture.path, target, self.task, picture.size, image_id=image)


def official_files(splits: Iterable[str | None]) -> list[Download]:
    """The archives of COCO's server with the pictures and boxes of these splits; none for splits of one's own."""
    names: dict[str, str] = {}
    for split in splits:
        if split in ("train2017", "val2017", "train2014", "val2014"):
            names |= {f"annotations_trainval{split[-4:]}": "annotations", split: "zips"}
    server = "http://images.cocodataset.org"
    return [
        Download(f"{server}/{folder}/{name}.zip", f"{name}.zip", _ARCHIVES[name], ".") for name, folder in names.items()
    ]


__all__ = ["BASE_65", "CLASS_SETS", "FEW_SHOT_8", "NOVEL_15", "COCODetectionDataModule", "COCOSamples"]
