"""COCO detection: the official trees of 2014 and 2017, few-shot splits and class subsets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rft_lightning.datamodules.base import RFTDataModule
from rft_lightning.datamodules.coco_annotations import CategoryObjects, COCOAnnotations, RowKey, coco_root
from rft_lightning.datamodules.fewshot import draw_shots, hash_order
from rft_lightning.errors import ConfigConflictError
from rft_lightning.sample import DetectionTarget, Sample
from rft_lightning.tasks import DetectionTask

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

# Pairs of different official splits that share pictures: val2017 is a part of val2014, train2017 is the rest of 2014.
_OVERLAPS = ({"val2014", "val2017"}, {"val2014", "train2017"}, {"train2014", "train2017"})


class COCODetectionDataModule(RFTDataModule):
    """One question per picture and category: all boxes of the category.

    Reads the official trees of 2017 and 2014 as they are unpacked, ``annotations/instances_{split}.json`` and the
    pictures in ``{split}/``, below `root` or below ``{root}/coco``. Ids are COCO's own.

    Training rows are the (picture, category) pairs with at least one box. Crowds (``iscrowd``) are no answers and no
    shots; in evaluation they are regions where an answer is neither right nor wrong. Boxes are clipped to the picture,
    and those without width or height dropped. Every picture that a split uses must exist and have the size that the
    annotations state; the size is checked at the start for up to 10,000 pictures, and else when a sample is made.

    Args:
        root: folder of the COCO tree.
        train_split: split that training rows are drawn from, any of ``train2017 val2017 train2014 val2014``.
        val_split: split of validation.
        test_split: split of test and prediction.
        classes: names of the categories, or the name of a set: ``few_shot_8``, ``base_65``, ``novel_15`` (the paper's).
            null for all; a category without training examples is then left out of training with a warning, while one
            that was named is an error.
        shots: pictures per category in training, drawn by `seed`; k shots contain k - 1 shots. null for all.
        max_rows: most training rows, negatives included, drawn by `seed` after the shots. null for no limit.
        negative_fraction: share of training rows, in [0, 1), that ask for a category which the picture does not show
            (no annotation at all, no crowd either), so that "No Objects" is right. Added to the shots; drawn by `seed`
            from all pictures of the training split, at first one per picture.
        query_mode: questions in validation, test and prediction. ``all``: every category of every picture, pictures
            without boxes included. ``gt``: only categories annotated in the picture (crowds count), as if an oracle
            had named them; pictures that show none of the classes have no question then.
        val_limit: validate on so many pictures, the first by id; test and prediction take all. null for all.
        task: the task; DetectionTask by default.
        **kwargs: see :class:`RFTDataModule`.

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
        val_split: str = "val2017",
        test_split: str = "val2017",
        classes: list[str] | str | None = None,
        shots: int | None = None,
        max_rows: int | None = None,
        negative_fraction: float = 0.0,
        query_mode: Literal["all", "gt"] = "all",
        val_limit: int | None = None,
        task: DetectionTask | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.classes, self.shots, self.max_rows = classes, shots, max_rows
        self.negative_fraction, self.query_mode, self.val_limit = negative_fraction, query_mode, val_limit
        self.task = task if task is not None else DetectionTask()
        self._annotations: dict[str, COCOAnnotations] = {}
        self._check()

    def samples(self, split: str) -> Sequence[Sample]:
        """See the base class."""
        if split == "train":
            return self._training_rows()
        if split == "val":
            return self._evaluation_rows(self.val_split, self.val_limit)
        return self._evaluation_rows(self.test_split, None)

    def _training_rows(self) -> COCORows:
        self._warn_about_overlap()
        data = self._read(self.train_split)
        categories = self._select(data)
        ids = {name: category for category, name in categories.items()}
        shown = ((image, categories[c]) for (image, c), o in data.objects.items() if c in categories and o.boxes)
        drawn = draw_shots(
            shown,
            self.shots,
            seed=self.seed,
            classes=None if self.classes is None else list(ids),
            split=self.train_split,
            looked_at=data.annotation_count,
            remark="Crowd regions and boxes without area are no examples.",
        )
        rows = [(image, ids[name]) for image, name in drawn]
        trained = sorted({category for _, category in rows})
        if len(trained) < len(categories):
            absent = ", ".join(name for category, name in categories.items() if category not in trained)
            warnings.warn(f"Left out of training, no example in {self.train_split}: {absent}.", stacklevel=2)
        return COCORows(data, sorted(self._with_negatives(rows, data, trained)), self.task)

    def _with_negatives(self, rows: list[RowKey], data: COCOAnnotations, categories: list[int]) -> list[RowKey]:
        """At most `max_rows` rows, of which about `negative_fraction` ask for what is not there."""
        share = self.negative_fraction
        if self.max_rows is not None:
            positives = max(1, self.max_rows - round(self.max_rows * share))
            rows = hash_order(rows, seed=self.seed, salt="rows")[:positives]
        wanted = round(len(rows) * share / (1 - share))
        if self.max_rows is not None:
            wanted = min(wanted, self.max_rows - len(rows))
        if wanted == 0:
            return rows
        negatives = list(islice(data.absent(categories, self.seed), wanted))
        if len(negatives) < wanted:
            warnings.warn(
                f"negative_fraction={share} asks for {wanted} rows about absent classes, but {self.train_split} has "
                f"{len(negatives)}; all of them are used.",
                stacklevel=2,
            )
        return rows + negatives

    def _evaluation_rows(self, split: str, limit: int | None) -> COCORows:
        data = self._read(split)
        images, categories = sorted(data.pictures)[:limit], self._select(data)
        rows = [(image, category) for image in images for category in categories]
        if self.query_mode == "gt":
            rows = [row for row in rows if row in data.objects and not data.objects[row].is_empty]
        return COCORows(data, rows, self.task)

    def _read(self, split: str) -> COCOAnnotations:
        """The annotations of a split, read once."""
        if split not in self._annotations:
            self._annotations[split] = COCOAnnotations(coco_root(self.root, split), split)
        return self._annotations[split]

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

    def _check(self) -> None:
        for name in ("shots", "max_rows", "val_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigConflictError(f"Expected {name} >= 1 or null, found {value}.")
        if not 0 <= self.negative_fraction < 1:
            raise ConfigConflictError(f"Expected 0 <= negative_fraction < 1, found {self.negative_fraction}.")
        if self.query_mode not in ("all", "gt"):
            raise ConfigConflictError(f"Expected query_mode all or gt, found {self.query_mode!r}.")
        if self.classes is not None and not self.classes:
            raise ConfigConflictError(
                f"Expected class names, the name of a set ({', '.join(CLASS_SETS)}) or null for all classes, found "
                f"classes={self.classes!r}."
            )


class COCORows(Sequence):
    """Samples of (image id, category id) pairs, made when they are asked for; a full split has hundreds of thousands.

    Raises:
        DatasetNotFoundError, AnnotationError: see :meth:`COCOAnnotations.check_pictures`.
    """

    def __init__(self, data: COCOAnnotations, rows: list[RowKey], task: DetectionTask) -> None:
        self.data, self.rows, self.task = data, rows, task
        data.check_pictures(image for image, _ in rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        image, category = self.rows[position]
        self.data.check_size(image)
        picture, found = self.data.pictures[image], self.data.objects.get((image, category), CategoryObjects())
        target = DetectionTarget(
            found.boxes,
            category=self.data.categories[category],
            category_id=category,
            areas=found.areas,
            ignore_boxes=found.ignore_boxes,
            ignore_areas=found.ignore_areas,
            image_size=picture.size,
        )
        return Sample(
            id=f"coco/{self.data.split}/{image}/{category}",
            image=picture.path,
            target=target,
            task=self.task,
            image_size=picture.size,
            image_id=image,
        )


__all__ = ["BASE_65", "CLASS_SETS", "FEW_SHOT_8", "NOVEL_15", "COCODetectionDataModule", "COCORows"]
