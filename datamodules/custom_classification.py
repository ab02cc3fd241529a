"""Custom classification: a user's own labelled pictures, in class folders or in CSV files."""

from __future__ import annotations

import csv
import posixpath
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rft_lightning.datamodules.classification import ClassificationDataModule, Labelled
from rft_lightning.datamodules.images import EXTENSIONS
from rft_lightning.datamodules.rows import Row
from rft_lightning.errors import AnnotationError, DatasetNotFoundError

# Names of a split in folders, files and columns.
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_TREE = """
  train/<class>/*.jpg  val/<class>/*.jpg  test/<class>/*.jpg    (val and test may be missing)
or train.csv  val.csv  test.csv    with the columns path (seen from the root) and label
or one CSV file, named by data.csv, with the columns path, label and split
or <class>/*.jpg    (no splits: set data.val_shots)
"""


class CustomClassificationDataModule(ClassificationDataModule):
    """Your own pictures, each of one class.

    One of::

        root/train/<class>/*.jpg   root/val/<class>/*.jpg   root/test/<class>/*.jpg
        root/train.csv  root/val.csv  root/test.csv       columns path, label
        root/<csv>                                        columns path, label, split
        root/<class>/*.jpg                                no splits

    Class names are asked for as the folders or the label column spell them. Folders are searched with their subfolders
    and without hidden files. CSV files are UTF-8 with a header and commas; paths are seen from the root, further
    columns are left alone. Without validation pictures, `val_shots` holds training pictures out; without test pictures,
    test and prediction use those of validation. A rotation that a file's EXIF data asks for is not applied.

    The question is that of `task`: its subject ("a mushroom") and noun ("the species of the mushroom").

    Args:
        csv: one CSV file with all pictures, seen from the root; without a column split all are for training. null
            looks for train.csv and the like, and then for folders.
        **kwargs: see :class:`ClassificationDataModule`.
    """

    name = "custom"
    origin = "The data set is yours to bring."

    def __init__(self, *, csv: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.csv = csv

    @property
    def has_val(self) -> bool:
        """Whether there are validation pictures."""
        return "val" in self.found

    @cached_property
    def found(self) -> Mapping[str, list[Labelled]]:
        """The pictures of the splits that are there.

        Raises:
            DatasetNotFoundError: there is no training picture in a known layout.
            AnnotationError: a CSV file cannot be used.
        """
        found = {split: pictures for split, pictures in self._read().items() if pictures}
        if "train" not in found:
            raise DatasetNotFoundError(self._nothing(found))
        trained = {picture.path for picture in found["train"]}
        for split in ("val", "test"):
            shared = [picture.path for picture in found.get(split, []) if picture.path in trained]
            if shared:
                warnings.warn(
                    f"{len(shared)} pictures of {self.root} are in train and in {split}, such as {shared[0]}: scores "
                    "on them are no measure of unseen pictures.",
                    stacklevel=2,
                )
        return found

    def all_classes(self) -> list[str]:
        """The class names of all splits, in alphabetical order."""
        return sorted({picture.label for pictures in self.found.values() for picture in pictures})

    def pictures(self, split: str) -> Sequence[Labelled]:
        """See the base class."""
        if split == "test" and split not in self.found and "val" in self.found:
            return self.found["val"]
        if split not in self.found:
            raise DatasetNotFoundError(
                f"{self.root} has no {split} pictures, found {', '.join(self.found)}. Add them, or set data.val_shots "
                f"to hold training pictures out. Expected:\n{_TREE.strip()}"
            )
        return self.found[split]

    def picture_path(self, path: str) -> Path:
        """See the base class."""
        return self.root / path

    def chosen(self, split: str) -> list[Row]:
        """See the base class; without pictures for anything but training, `val_shots` makes the test split as well."""
        return super().chosen(self._tested(split))

    def source(self, split: str) -> str:
        """See the base class."""
        return super().source(self._tested(split))

    def _tested(self, split: str) -> str:
        return "val" if split in ("test", "predict") and set(self.found) == {"train"} else split

    def _read(self) -> dict[str, list[Labelled]]:
        if self.csv is not None:
            return read_csv(self.root / self.csv)
        files = {split: self._first(names, ".csv") for split, names in _SPLITS.items()}
        if files["train"] is not None:
            return {split: read_csv(file)["train"] for split, file in files.items() if file is not None}
        folders = {split: self._first(names, "") for split, names in _SPLITS.items()}
        if folders["train"] is not None:
            return {split: self._folder(folder) for split, folder in folders.items() if folder is not None}
        return {"train": self._folder(self.root)}

    def _first(self, names: Sequence[str], suffix: str) -> Path | None:
        paths = [self.root / f"{name}{suffix}" for name in names]
        return next((path for path in paths if (path.is_file() if suffix else path.is_dir())), None)

    def _folder(self, split: Path) -> list[Labelled]:
        """The pictures of <class>/ folders; the class is the first folder below the split's."""
        return [
            Labelled(file.relative_to(self.root).as_posix(), file.relative_to(split).parts[0])
            for file in pictures_below(split)
            if len(file.relative_to(split).parts) > 1
        ]

    def _nothing(self, found: Mapping[str, list[Labelled]]) -> str:
        held = ", ".join(sorted(path.name for path in self.root.iterdir())[:12]) if self.root.is_dir() else ""
        there = f"{self.root} holds {held or 'nothing'}" if self.root.is_dir() else f"{self.root} does not exist"
        splits = f" (pictures for {', '.join(found)} only)" if found else ""
        return (
            f"No training pictures in data.root: {there}{splits}. Expected in it:\n{_TREE.strip()}\n"
            f"Pictures end in {', '.join(EXTENSIONS)}."
        )


def pictures_below(folder: Path) -> Iterator[Path]:
    """Picture files of a folder and its subfolders in sorted order, hidden ones left out."""
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in EXTENSIONS and not hidden and file.is_file():
            yield file


def read_csv(file: Path) -> dict[str, list[Labelled]]:
    """The pictures of a CSV file by split; all in "train" without a column split.

    Raises:
        DatasetNotFoundError: there is no such file.
        AnnotationError: a column is missing, or a row is incomplete.
    """
    if not file.is_file():
        raise DatasetNotFoundError(f"data.csv: no file at {file}. Expected a CSV file with the columns path and label.")
    found: dict[str, list[Labelled]] = {split: [] for split in _SPLITS}
    splits = {name: split for split, names in _SPLITS.items() for name in names}
    try:
        # The mark that Excel puts first would become a part of the first column's name.
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            _check_header(file, reader.fieldnames or ())
            for row in reader:
                split = splits.get((row.get("split") or "train").strip().lower()) if "split" in row else "train"
                path, label = (row["path"] or "").strip(), (row["label"] or "").strip()
                _check_row(file, reader.line_num, path, label, split, row)
                found[str(split)].append(Labelled(posixpath.normpath(path), label))
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{file} cannot be read ({error}). Save it as CSV in UTF-8.") from error
    return found


def _check_header(file: Path, columns: Sequence[str]) -> None:
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise AnnotationError(
            f"{file} has no column {' and no column '.join(missing)}, it begins {','.join(columns)!r}. Expected "
            "a header with path and label, separated by commas. Name or separate the columns so."
        )


def _check_row(file: Path, line: int, path: str, label: str, split: str | None, row: Mapping[str, Any]) -> None:
    below_root = not Path(path).is_absolute() and posixpath.normpath(path).split("/")[0] != ".."
    if path and label and split and below_root:
        return
    found = ", ".join(f"{name}={value!r}" for name, value in row.items() if name in ("path", "label", "split"))
    raise AnnotationError(
        f"{file}, line {line}: {found}. Expected a path seen from the root and below it (sample ids are made of "
        f"it), a label{' and a split that is train, val or test' if 'split' in row else ''}. Correct the line."
    )


__all__ = ["CustomClassificationDataModule", "pictures_below", "read_csv"]
