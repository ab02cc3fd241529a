"""LVIS detection: federated annotations, the paper's rare classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rft_lightning.datamodules.detection import DetectionAnnotations, DetectionDataModule
from rft_lightning.datamodules.download import Download
from rft_lightning.datamodules.lvis_annotations import SOURCE, read_lvis
from rft_lightning.datamodules.selection import select_classes
from rft_lightning.errors import DatasetNotFoundError

# The 6 categories of Visual-RFT's few-shot experiments ("10-shot": each is in 5 to 10 training pictures).
FEW_SHOT_6 = ("horse_buggy", "die", "kitchen_table", "omelet", "papaya", "stepladder")
# The 13 rare categories of its open-vocabulary experiments.
RARE_13 = (
    "casserole", "die", "egg_roll", "futon", "garbage", "handsaw", "hippopotamus", "kitchen_table", "mallet", "omelet",
    "shot_glass", "stepladder", "sugar_bowl",
)  # fmt: skip
CLASS_SETS = {"few_shot_6": FEW_SHOT_6, "rare_13": RARE_13}
# Sets of classes by how many training pictures show them: 1 to 10, 11 to 100, more.
FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}

_VERSIONS = ("v1", "v0.5")


class LVISDetectionDataModule(DetectionDataModule):
    """LVIS: one question per picture and category, 1203 categories of which most are rare.

    Files, as unpacked (`root` may also be the folder ``lvis`` itself; its ``annotations`` level may be missing)::

        root/
          lvis/annotations/lvis_v1_train.json  lvis_v1_val.json
          coco/train2017/000000155379.jpg ...  val2017/ ...

    The pictures are COCO's, found by the last two parts of ``coco_url`` (v1 has no ``file_name``; v0.5 has). 15,000 of
    the 19,809 validation pictures are COCO train2017 pictures: list them in `exclude_image_ids` (the annotation file of
    the validation split) when training on COCO rows that LVIS shall test.

    LVIS v1 has 100,170 training pictures with 1,270,141 boxes and 19,809 for validation with 244,707; 337 categories
    are rare (r, in 1 to 10 training pictures), 461 common (c, 11 to 100), 405 frequent (f). ``minival`` are the 4,809
    validation pictures of val2017.

    Its annotation is federated: a category is annotated in some pictures, verified absent in others
    (``neg_category_ids``), and unknown in the rest. Only what is known is asked: training rows are annotated pairs,
    negatives come from ``neg_category_ids`` alone, and ``query_mode: all`` asks about both kinds. Where not all objects
    of a category are boxed (``not_exhaustive_category_ids``) the target says `not_exhaustive`: further boxes are not
    wrong in evaluation. There are no crowds. Names are LVIS's own, underscores and brackets included. What is parsed of
    a large annotation file is kept beside it for the next start (``.lvis_*.json.rft.npz``).

    Licence: annotations CC BY 4.0; the pictures are under the terms of Flickr. Citation: Gupta, Dollar,
    Girshick: LVIS: A Dataset for Large Vocabulary Instance Segmentation, CVPR 2019. https://www.lvisdataset.org

    Args:
        root: folder that holds ``lvis/`` and ``coco/``.
        image_root: folder that holds ``train2017/`` and ``val2017/``; null looks in ``coco/`` beside the annotations.
        train_split: split that training rows are drawn from: the x of ``lvis_v1_x.json``.
        val_split: split of validation; ``minival`` needs no file of its own. null for none: `val_shots` then holds
            pictures of the training split out.
        test_split: split of test and prediction.
        classes: names of categories, or the name of a set: ``few_shot_6``, ``rare_13`` (the paper's), ``rare``,
            ``common``, ``frequent``; null for all.
        **kwargs: see :class:`DetectionDataModule`. `shots` beyond what a rare category has take what there is, with a
            warning.

    Raises:
        DatasetNotFoundError: (in `samples`) files are missing.
        AnnotationError: (in `samples`) a file cannot be used.
    """

    downloads: Sequence[Download] = (
        Download(
            "https://dl.fbaipublicfiles.com/LVIS/lvis_v1_train.json.zip", "lvis_v1_train.json.zip",
            "4410d837f71203af226950447ef9d422", "lvis/annotations",
        ),
        Download(
            "https://dl.fbaipublicfiles.com/LVIS/lvis_v1_val.json.zip", "lvis_v1_val.json.zip",
            "87734a7f895990b9552075d7ce723e27", "lvis/annotations",
        ),
        Download(
            "http://images.cocodataset.org/zips/train2017.zip", "train2017.zip",
            "cced6f7f71b7629ddf16f17bbcfab6b2", "coco",
        ),
        Download(
            "http://images.cocodataset.org/zips/val2017.zip", "val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", "coco"
        ),
    )  # fmt: skip

    def __init__(
        self,
        *,
        root: str | Path,
        image_root: str | Path | None = None,
        train_split: str = "train",
        val_split: str | None = "val",
        test_split: str = "val",
        classes: list[str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, classes=classes, **kwargs)
        self.image_root = None if image_root is None else Path(image_root).expanduser()
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split

    @property
    def has_val(self) -> bool:
        """Whether validation has a split of its own."""
        return self.val_split is not None

    def read(self, split: str) -> DetectionAnnotations:
        """See the base class."""
        name = {"train": self.train_split, "val": self.val_split, "test": self.test_split}[split] or self.train_split
        same = [data for data in self._annotations.values() if data.name == f"lvis/{name}"]
        if same:
            return same[0]
        file = self._annotation_file(name)
        folder = self._picture_folder(file)
        return read_lvis(file, name, folder, self._select, _in_val2017 if name == "minival" else None)

    def _select(self, names: dict[int, str], frequency: dict[int, str]) -> dict[int, str]:
        """The wanted categories."""
        if isinstance(self.classes, str) and self.classes in FREQUENCIES:
            return {key: name for key, name in names.items() if frequency[key] == FREQUENCIES[self.classes]}
        return select_classes(names, self.classes, self.root, {**CLASS_SETS, **dict.fromkeys(FREQUENCIES, ())})

    def _annotation_file(self, split: str) -> Path:
        """The file of a split; that of ``val`` for a ``minival`` without one."""
        stems = [split, "val"] if split == "minival" else [split]
        folders = [f / sub for f in (self.root / "lvis", self.root) for sub in ("annotations", ".")]
        places = [
            folder / f"lvis_{version}_{stem}.json" for stem in stems for version in _VERSIONS for folder in folders
        ]
        for file in places:
            if file.is_file():
                return file
        found = sorted(path.name for folder in folders for path in folder.glob("lvis_*.json"))
        raise DatasetNotFoundError(
            f"No LVIS annotations of split {split!r} below {self.root}. Expected lvis/annotations/lvis_v1_{split}.json "
            f"there, and the pictures in coco/train2017/ and coco/val2017/; found {', '.join(found) or 'none'}"
            f"{'' if self.root.is_dir() else ' (the folder does not exist)'}. Set data.root to the folder that holds "
            f"lvis/ and coco/; {SOURCE}."
        )

    def _picture_folder(self, file: Path) -> Path:
        """The folder with train2017 and val2017."""
        places = [self.image_root] if self.image_root else [self.root, self.root.parent]
        folders = [folder / sub for folder in places for sub in ("coco", ".")]
        for folder in folders:
            if (folder / "train2017").is_dir() or (folder / "val2017").is_dir():
                return folder
        raise DatasetNotFoundError(
            f"No pictures for {file}: none of {', '.join(map(str, folders))} holds train2017/ or val2017/. Set "
            f"data.image_root to the folder that does; {SOURCE}."
        )


def _in_val2017(path: str) -> bool:
    return path.startswith("val2017/")


__all__ = ["CLASS_SETS", "FEW_SHOT_6", "FREQUENCIES", "RARE_13", "LVISDetectionDataModule"]
