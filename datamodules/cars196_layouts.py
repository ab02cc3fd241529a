"""Where Stanford Cars may lie: the layouts in which people have it, since nothing can be downloaded any more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft_lightning.datamodules.classification import Labelled, names_in
from rft_lightning.datamodules.classification_benchmark import read_mat, read_split
from rft_lightning.datamodules.images import EXTENSIONS
from rft_lightning.errors import AnnotationError

COOP_FILE = "split_zhou_StanfordCars.json"
PLACES = (".", "stanford_cars", "stanford-cars", "stanford-cars-dataset", "cars196")
_DEVKITS = ("devkit", ".", "car_devkit/devkit", "car_devkit", "devkit/devkit")
_BY_CLASS = (".", "car_data", "car_data/car_data")
_LABELS = "cars_test_annos_withlabels*.mat"  # browsers add " (1)"


@dataclass(frozen=True)
class Layout:
    """A copy of the data set.

    Attributes:
        names: class names with the year last.
        splits: "train" and "test" -> pictures; without "test" where the test labels are missing.
        folders: first part of a picture's path -> its folder.
        labels_wanted: where the test labels were looked for, if they are missing.
    """

    names: list[str]
    splits: dict[str, list[Labelled]]
    folders: dict[str, Path]
    labels_wanted: list[Path] = field(default_factory=list)


def find_layout(root: Path) -> Layout | None:
    """The first layout that is there.

    Raises:
        AnnotationError: its files cannot be used.
    """
    for find in (_devkit, _one_folder, _by_class, _coop):
        for place in PLACES:
            layout = find(root / place)
            if layout is not None:
                return layout
    return None


def looked_for(root: Path) -> str:
    """What :func:`find_layout` looks for, and where, in words."""
    return (
        f"Looked in {', '.join(str(root / place) for place in PLACES)} for\n"
        f"  cars_meta.mat and cars_train_annos.mat in {', '.join(_DEVKITS)}, {_LABELS} beside or in there, pictures in "
        "cars_train/ and cars_test/ or in cars_train/cars_train/ and cars_test/cars_test/\n"
        "  cars_annos.mat and car_ims/ (both)\n"
        f"  train/<class>/ and test/<class>/ in {', '.join(_BY_CLASS)}\n"
        f"  {COOP_FILE}, pictures as with the first\n"
    )


def year_first(name: str) -> str:
    """Audi TTS Coupe 2012 -> 2012 Audi TTS Coupe."""
    return re.sub(r"^(.*) (\d{4})$", r"\2 \1", name)


def year_last(name: str) -> str:
    """2012 Audi TTS Coupe -> Audi TTS Coupe 2012."""
    return re.sub(r"^(\d{4}) (.*)$", r"\2 \1", name)


def _devkit(base: Path) -> Layout | None:
    """devkit/ with cars_train/ and cars_test/, as Stanford published it."""
    devkits = [base / place for place in _DEVKITS]
    devkit = next((d for d in devkits if {"cars_meta.mat", "cars_train_annos.mat"} <= names_in(d)), None)
    if devkit is None:
        return None
    names = _class_names(devkit / "cars_meta.mat")
    splits = {"train": _annotated(devkit / "cars_train_annos.mat", "cars_train", names)}
    places = list(dict.fromkeys([base, devkit, *devkits]))
    labels = [file for place in places for file in sorted(place.glob(_LABELS))]
    if labels:
        splits["test"] = _annotated(labels[0], "cars_test", names)
    return Layout(names, splits, _folders(base), [] if labels else [place / _LABELS for place in places])


def _one_folder(base: Path) -> Layout | None:
    """car_ims/ with cars_annos.mat: train and test in one folder, numbered otherwise."""
    file = base / "cars_annos.mat"
    if not (file.is_file() and (base / "car_ims").is_dir()):
        return None
    names = _class_names(file)
    splits: dict[str, list[Labelled]] = {"train": [], "test": []}
    for path, number, test in zip(*_fields(file, "relative_im_path", "class", "test"), strict=True):
        splits["test" if test else "train"].append(Labelled(str(path), _name(file, names, number)))
    return Layout(names, splits, {"car_ims": base / "car_ims"})


def _by_class(base: Path) -> Layout | None:
    """train/<class>/ and test/<class>/."""
    for place in _BY_CLASS:
        folders = {split: base / place / split for split in ("train", "test")}
        splits = {split: list(_class_folders(folder)) for split, folder in folders.items()}
        if splits["train"]:
            names = sorted({picture.label for pictures in splits.values() for picture in pictures})
            return Layout(names, {split: found for split, found in splits.items() if found}, folders)
    return None


def _coop(base: Path) -> Layout | None:
    """CoOp's split file alone: its train and val are the official train set."""
    file = base / COOP_FILE
    if not file.is_file():
        return None
    content = read_split(file)
    entries = [entry for part in content.values() for entry in part]
    names = [year_last(name) for _, name in sorted({(number, name) for _, number, name in entries})]
    parts = {"train": [*content["train"], *content.get("val", [])], "test": content["test"]}
    splits = {
        split: sorted((Labelled(plain_path(path), year_last(name)) for path, _, name in part), key=_path)
        for split, part in parts.items()
    }
    return Layout(names, splits, _folders(base))


def plain_path(path: str) -> str:
    """The last folder and the name: cars_train/00001.jpg."""
    return "/".join(Path(path).parts[-2:])


def _annotated(file: Path, folder: str, names: Sequence[str]) -> list[Labelled]:
    fields = zip(*_fields(file, "fname", "class"), strict=True)
    return [Labelled(f"{folder}/{picture}", _name(file, names, number)) for picture, number in fields]


def _fields(file: Path, *wanted: str) -> list[Any]:
    """Fields of the struct array `annotations`."""
    notes = read_mat(file, "annotations")
    held = notes.dtype.names or ()
    if not set(wanted) <= set(held):
        raise AnnotationError(
            f"Annotations in {file} have the fields {', '.join(held) or 'none'}, expected {', '.join(wanted)} among "
            "them. (The test annotations of the devkit have no class; those with labels are another file.)"
        )
    return [notes[name] for name in wanted]


def _name(file: Path, names: Sequence[str], number: int) -> str:
    if not 1 <= int(number) <= len(names):
        raise AnnotationError(f"{file} holds the class {number}; expected 1 to {len(names)}. Get the file again.")
    return names[int(number) - 1]


def _class_names(file: Path) -> list[str]:
    return [str(name) for name in read_mat(file, "class_names")]


def _folders(base: Path) -> dict[str, Path]:
    """The picture folders; some copies have each in a folder of the same name."""
    doubled = {name: base / name / name for name in ("cars_train", "cars_test")}
    return {name: folder if folder.is_dir() else base / name for name, folder in doubled.items()}


def _class_folders(split: Path) -> Iterator[Labelled]:
    """Pictures of train/<class>/; the slash of one name cannot be in a folder's."""
    for folder in sorted(names_in(split)):
        for picture in sorted(names_in(split / folder)):
            if picture.lower().endswith(EXTENSIONS) and not picture.startswith("."):
                yield Labelled(f"{split.name}/{folder}/{picture}", folder.replace("Ram C-V", "Ram C/V"))


def _path(picture: Labelled) -> str:
    return picture.path


__all__ = ["COOP_FILE", "PLACES", "Layout", "find_layout", "looked_for", "plain_path", "year_first", "year_last"]
