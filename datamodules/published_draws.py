"""Draws that others published, read as they are: CoOp's splits, few-shot sets on them, few-shot detection's boxes.

Given like a manifest (``--data.manifest``) and recognised by their content:

- a manifest of this package;
- CoOp's ``split_zhou_*.json``, ``{"train" | "val" | "test": [[path, label, class name], ...]}``: it says which pictures
  the splits consist of; `shots`, `val_shots` and the rest draw among them;
- few-shot files of linzhiqiu/cross_modal_adaptation, ``{"train" | "val": {"data": [{impath, label, classname}]}}``: the
  rows as they are; the test split stays the data set's own;
- TFA's ``full_box_{k}shot_{class}_trainval.json`` (COCO layout): one file, or the folder of them, of which `shots` says
  k and `classes` says which. Their pool, trainval2014 without 5k, is train2017, and their test, 5k, is val2017.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from rft_lightning.datamodules.manifest import FORMAT, Manifest
from rft_lightning.datamodules.rows import Row
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError

if TYPE_CHECKING:
    from rft_lightning.datamodules.labelled import LabelledDataModule

_FULL_BOX = re.compile(r"full_box_(\d+)shot_(.+)_trainval\.json")


class GivenRows(Protocol):
    """Rows that a file states."""

    def choose(self, data: LabelledDataModule, split: str) -> tuple[str, list[Row]] | None:
        """The split of the data set that lists the rows of `split`, and the rows; None where the file says nothing."""


def read_given(path: Path, data: LabelledDataModule) -> GivenRows:
    """The rows that a manifest or a published file (or folder of files) states for a data set.

    Raises:
        ConfigConflictError: it is a manifest of another data set.
        DatasetNotFoundError: there is nothing at `path`.
        AnnotationError: it is none of the known kinds.
    """
    if path.is_dir():
        return FullBoxes(path)
    if not path.is_file():
        raise DatasetNotFoundError(
            f"data.manifest: no file or folder at {path} (seen from {Path.cwd()}). Write one with `rft prepare`, or "
            "set data.manifest to null."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AnnotationError(
            f"data.manifest: {path} is no JSON ({error}). Pickled draws are not loaded; expected {_KINDS}."
        ) from error
    if isinstance(content, dict):
        if content.get("format") == FORMAT:
            manifest = Manifest(path, content)
            manifest.check(data)
            return manifest
        if isinstance(content.get("train"), list):
            return CoOpSplit(path, {split: _triples(path, entries) for split, entries in content.items()})
        if isinstance(content.get("train"), dict):
            return FewShotFile(path, {split: _entries(path, part) for split, part in content.items()})
        if "images" in content and "annotations" in content:
            return FullBoxes(path)
    raise AnnotationError(f"data.manifest: {path} is of no known kind. Expected {_KINDS}.")


_KINDS = (
    "a manifest of `rft prepare`, a CoOp split (split_zhou_*.json), a few-shot file of cross_modal_adaptation, or "
    "full_box_*shot_*_trainval.json files of few-shot detection"
)


@dataclass(frozen=True)
class Entry:
    """A picture of a published file: its path there, and the number of its class."""

    path: str
    label: int


@dataclass(frozen=True)
class CoOpSplit:
    """A ``split_zhou_*.json``: what the splits of a classification set consist of."""

    file: Path
    splits: dict[str, list[Entry]]

    def choose(self, data: LabelledDataModule, split: str) -> tuple[str, list[Row]] | None:
        """See :class:`GivenRows`; CoOp's splits lie across the official ones."""
        if split not in self.splits:
            return None
        official = ["train", "val", "test"] if data.has_val else ["train", "test"]
        rows = {row.id: row for name in official for row in data.rows(name)}
        found, missing = match(self.splits[split], rows.values(), data.classes is not None, self.file)
        if missing:
            _fail(missing, len(self.splits[split]), split, self.file, data, "in any of its splits")
        return split, found


@dataclass(frozen=True)
class FewShotFile:
    """A draw on CoOp's splits: its training and validation rows as they are."""

    file: Path
    splits: dict[str, list[Entry]]

    def choose(self, data: LabelledDataModule, split: str) -> tuple[str, list[Row]] | None:
        """See :class:`GivenRows`; validation rows may be official training rows, test rows never are drawn."""
        if split not in self.splits or split == "test":
            return None
        entries, source = self.splits[split], split if data.has_val else "train"
        found, missing = match(entries, data.rows(source), data.classes is not None, self.file)
        if missing and source == "val":
            source = "train"
            found, missing = match(entries, data.rows(source), data.classes is not None, self.file)
        if missing:
            _fail(missing, len(entries), split, self.file, data, "in the split that it was drawn from")
        return source, found


@dataclass(frozen=True)
class FullBoxes:
    """TFA's draws: all boxes of a class in the chosen pictures, one file per class and number of shots."""

    path: Path

    def choose(self, data: LabelledDataModule, split: str) -> tuple[str, list[Row]] | None:
        """See :class:`GivenRows`."""
        if split != "train":
            return None
        wanted = {pair for file in self._files(data) for pair in _full_boxes(file)}
        found = {(row.image, row.label): row for row in data.rows("train")}
        missing = sorted(map(str, wanted - found.keys()))
        if missing:
            _fail(missing, len(wanted), split, self.path, data, "(COCO's train2017 has them, val2017 is their test)")
        return "train", [row for pair, row in found.items() if pair in wanted]

    def _files(self, data: LabelledDataModule) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        names = (_FULL_BOX.fullmatch(file.name) for file in sorted(self.path.iterdir()))
        files = {(int(name[1]), name[2]): self.path / name[0] for name in names if name}
        known = sorted({shots for shots, _ in files})
        if data.shots not in known:
            raise ConfigConflictError(
                f"data.manifest is the folder {self.path}, which has full_box_*shot_*_trainval.json files of "
                f"{', '.join(map(str, known)) or 'no'} shots, but data.shots is {data.shots}. Set data.shots to one of "
                "them."
            )
        if data.classes is None:
            return [file for (shots, _), file in files.items() if shots == data.shots]
        absent = [name for name in data.class_names if (data.shots, name) not in files]
        if absent:
            raise DatasetNotFoundError(
                f"No full_box_{data.shots}shot_{absent[0]}_trainval.json in {self.path}; {len(absent)} of the "
                f"{len(data.class_names)} classes have no file of {data.shots} shots: {', '.join(absent)}. Take them "
                "out of data.classes, or add the files."
            )
        return [files[data.shots, name] for name in data.class_names]


def match(entries: Sequence[Entry], rows: Iterable[Row], subset: bool, file: Path) -> tuple[list[Row], list[str]]:
    """The rows of published pictures, in their order, and the paths that no row fits.

    Published paths begin at folders of their authors' machines. A row fits when its path and the published one end in
    the same two parts (one, where either has no folder), and best when they have most parts in common.

    Args:
        entries: the published pictures.
        rows: where to look.
        subset: the rows show only some of the classes; pictures of the others are then left out.
        file: for messages.

    Raises:
        AnnotationError: classes are not told apart as in the data.
    """
    index: dict[str, list[Row]] = {}
    for row in rows:
        index.setdefault(PurePosixPath(str(row.image)).name, []).append(row)
    pairs = [(entry, _fitting(entry.path, index)) for entry in entries]
    labels: dict[int, str] = {}
    for entry, row in pairs:
        if row is not None and labels.setdefault(entry.label, row.label) != row.label:
            raise AnnotationError(
                f"{file} gives {entry.path} the same class as a picture of {labels[entry.label]!r}, but the data says "
                f"{row.label!r}. It belongs to another data set, or another level of classes."
            )
    wanted = [(entry, row) for entry, row in pairs if not subset or entry.label in labels]
    missing = [entry.path for entry, row in wanted if row is None]
    return [row for _, row in wanted if row is not None], missing


def _fitting(path: str, index: dict[str, list[Row]]) -> Row | None:
    parts = PurePosixPath(path).parts
    best: list[Row] = []
    most = 0
    for row in index.get(parts[-1], []):
        own = PurePosixPath(str(row.image)).parts
        common = next((n for n, (a, b) in enumerate(zip(own[::-1], parts[::-1], strict=False)) if a != b), None)
        common = min(len(own), len(parts)) if common is None else common
        if common < min(2, len(own), len(parts)) or common < most:
            continue
        best, most = ([*best, row], most) if common == most else ([row], common)
    return best[0] if len(best) == 1 else None


def _full_boxes(file: Path) -> set[tuple[int | str, str]]:
    """The (image, class) pairs of a file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {entry["id"]: entry["name"] for entry in content.get("categories", [])}
        name = _FULL_BOX.fullmatch(file.name)
        return {(n["image_id"], name[2] if name else names[n["category_id"]]) for n in content["annotations"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnnotationError(
            f"{file} is no full_box_*shot_*_trainval.json of few-shot detection ({error!r}). Expected `annotations` "
            "(image_id, category_id) and `categories` (id, name). Download it again."
        ) from error


def _triples(file: Path, entries: Any) -> list[Entry]:
    try:
        return [Entry(str(path), int(label)) for path, label, _ in entries]
    except (TypeError, ValueError) as error:
        raise AnnotationError(
            f"{file} is no CoOp split ({error}). Expected lists of [path, label, class name]."
        ) from error


def _entries(file: Path, part: Any) -> list[Entry]:
    try:
        return [Entry(entry["impath"], int(entry["label"])) for entry in part["data"]]
    except (KeyError, TypeError, ValueError) as error:
        raise AnnotationError(
            f"{file} is no few-shot file of cross_modal_adaptation ({error!r}). Expected `data`: lists of impath, "
            "label and classname."
        ) from error


def _fail(missing: Sequence[str], count: int, split: str, file: Path, data: LabelledDataModule, where: str) -> NoReturn:
    raise ConfigConflictError(
        f"{len(missing)} of the {count} {split} rows of {file} are not in {type(data).__name__} {where}: "
        f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}. Looked below {data.root}. Choose the splits that the "
        "draw was made from (few-shot classification: data.split_protocol coop; detection: train2017) and the classes "
        "it is about, or restore the missing files."
    )


__all__ = ["CoOpSplit", "Entry", "FewShotFile", "FullBoxes", "GivenRows", "match", "read_given"]
