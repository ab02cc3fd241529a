"""Where rows of question, solution and picture lie: Hub sets, parquet, save_to_disk folders, JSON and JSON lines."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError

# What other trainers call the three columns, in the order they are looked for.
COLUMNS = {
    "image": ("image", "images", "image_path"),
    "problem": ("problem", "question", "prompt"),
    "solution": ("solution", "answer"),
}
_IMG = re.compile(r"<img>(.*?)</img>")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ENDS = 4096  # bytes of either end of a picture file that its id is made of
Identity = tuple[str, Path | None]  # what something is called, and the absolute path of its file


class Source(ABC):
    """Rows of one file, folder or Hub set; pictures are read row by row."""

    def __init__(self, name: str, problems: Sequence[str], solutions: Sequence[str]) -> None:
        self.name, self.problems, self.solutions = name, problems, solutions

    def __len__(self) -> int:
        return len(self.problems)

    @abstractmethod
    def picture(self, index: int) -> bytes | Path:
        """The encoded picture of a row, or where it lies."""

    @abstractmethod
    def identity(self, index: int) -> Identity:
        """What a picture is known by, the same in all rows and on all machines, and where it lies, if in a file."""


class FileSource(Source):
    """Rows of a JSON or JSON lines file: problem and solution (Visual-RFT, EasyR1), or conversations (VLM-R1, LISA).

    Args:
        file: the file.
        name: what it is called.
        folder: what its image paths are relative to; the file's own folder when None.
        columns: names of the columns where they differ from the usual ones.
    """

    def __init__(self, file: Path, name: str, folder: Path | None, columns: Mapping[str, str]) -> None:
        entries = [_fields(entry, columns, f"{file}, row {row}") for row, entry in enumerate(_entries(file))]
        super().__init__(name, [entry.problem for entry in entries], [entry.solution for entry in entries])
        self.folder, self.images = folder or file.parent, [entry.image for entry in entries]

    def picture(self, index: int) -> Path:
        return self.folder / self.images[index]

    def identity(self, index: int) -> Identity:
        return _path_id(self.images[index]), _absolute(self.picture(index))


class ArrowSource(Source):
    """Rows of a `datasets.Dataset`, which maps its file into memory: a row is read when it is asked for.

    Args:
        data: the dataset.
        name: what it is called.
        folder: what image paths are relative to, where the pictures are not in the rows.
        columns: names of the columns where they differ from the usual ones.
    """

    def __init__(self, data: Any, name: str, folder: Path | None, columns: Mapping[str, str]) -> None:
        from datasets import Image

        found = {key: _column(key, data.column_names, columns, name) for key in COLUMNS}
        texts = data.select_columns([found["problem"], found["solution"]]).with_format("arrow")[:]
        super().__init__(name, *(_texts(texts[found[key]].to_pylist(), key, name) for key in ("problem", "solution")))
        if isinstance(data.features[found["image"]], Image):
            data = data.cast_column(found["image"], Image(decode=False))
        self.images, self.folder = data.select_columns([found["image"]]).with_format("arrow"), folder

    def picture(self, index: int) -> bytes | Path:
        value = self._value(index)
        return value if isinstance(value, bytes) else (self.folder or Path()) / value

    def _value(self, index: int) -> bytes | str:
        value = self._cell(index).as_py()
        if isinstance(value, list):
            value = _single(value, f"{self.name}, row {index}")
        if isinstance(value, Mapping):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        return value

    def identity(self, index: int) -> Identity:
        cell = self._cell(index)
        # Without a copy of the picture: a set has gigabytes of them.
        if hasattr(cell, "keys") and cell["bytes"].is_valid:
            content = memoryview(cell["bytes"].as_buffer())
        else:
            value = self._value(index)
            if isinstance(value, str):
                return _path_id(value), _absolute((self.folder or Path()) / value)
            content = memoryview(value)
        return digest(content[:_ENDS], content[-_ENDS:], str(len(content)).encode()), None

    def _cell(self, index: int) -> Any:
        return self.images[index : index + 1].column(0)[0]


@dataclass(frozen=True, slots=True)
class _Entry:
    image: str
    problem: str
    solution: str


def open_source(
    text: str, *, name: str | None = None, folder: Path | None = None, columns: Mapping[str, str] | None = None
) -> Source:
    """Open ``PLACE`` or ``PLACE@SPLIT``: a file, a folder or an id on the Hugging Face Hub.

    Args:
        text: the place.
        name: what its rows are called; None: as :func:`place_identity` says.
        folder: what image paths are relative to.
        columns: names of the columns where they differ from the usual ones.

    Raises:
        DatasetNotFoundError: it is not there, or has no such split; the Hub cannot be reached.
        AnnotationError: a file is no JSON, or a column is missing.
    """
    place, split = split_off(text)
    path, name = Path(place).expanduser(), name or place_identity(text)[0]
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        if split:
            raise ConfigConflictError(f"{path} is one split; expected its name without @{split}.")
        return FileSource(path, name, folder, columns or {})
    data = _local(path) if path.exists() else _from_hub(place)
    return ArrowSource(_split(data, split, place), name, folder, columns or {})


def split_off(text: str) -> tuple[str, str]:
    """The place and the split of ``PLACE@SPLIT``; "" where no split is stated. Folders may have "@" in their names."""
    place, _, split = text.rpartition("@")
    if not place or "/" in split or Path(text).expanduser().exists():
        return text, ""
    return place, split


def place_identity(text: str) -> Identity:
    """What ``PLACE`` or ``PLACE@SPLIT`` is called, and what tells it from places of the same name."""
    place, split = split_off(text)
    path = _absolute(Path(place).expanduser())
    suffix = "" if split in ("", "train") else f"@{split}"
    return path.stem + suffix, path.parent / (path.name + suffix)


def tell_apart(named: Iterable[Identity], taken: Iterable[tuple[str, Path | None]] = ()) -> dict[Identity, str]:
    """Names of files: the given ones, or longer ends of the paths where two files have the same.

    Args:
        named: the files.
        taken: names that other files have already.
    """
    names = {identity: identity[0] for identity in named}
    taken = list(taken)
    while clashes := _clashes(names, taken):
        for identity in clashes:
            path = identity[1]
            assert path is not None
            names[identity] = "/".join(path.parts[-names[identity].count("/") - 2 :])
    return names


def _clashes(names: Mapping[Identity, str], taken: Iterable[Identity]) -> list[Identity]:
    paths: defaultdict[str, set[Path]] = defaultdict(set)
    for name, path in [*taken, *((name, identity[1]) for identity, name in names.items())]:
        if path is not None:
            paths[name].add(path)
    return [identity for identity, name in names.items() if len(paths[name]) > 1]


def digest(*parts: bytes | memoryview) -> str:
    """A short id of what the parts hold."""
    total = blake2b(digest_size=6)
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _texts(values: list[Any], key: str, name: str) -> list[str]:
    empty = [row for row, value in enumerate(values) if value is None]
    if empty:
        raise AnnotationError(f"{name}, row {empty[0]}: no {key} ({len(empty)} rows have none). Leave such rows out.")
    return [str(value) for value in values]


def _path_id(path: str) -> str:
    """A path as the file states it; of an absolute one the end, which is the same on other machines."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def _absolute(path: Path) -> Path:
    """Links stay: what is behind them has other names on other machines."""
    return Path(os.path.abspath(path))


def _local(path: Path) -> Any:
    from datasets import load_dataset, load_from_disk

    try:
        if path.is_file():
            return load_dataset("parquet", data_files=str(path))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return load_from_disk(str(path))
        if any(path.rglob("*.parquet")):
            return load_dataset(str(path))
    except Exception as error:  # what `datasets` raises is not documented
        raise AnnotationError(f"{path} cannot be read as a data set: {error}") from error
    raise DatasetNotFoundError(
        f"{path} holds no data set: expected parquet files, what `Dataset.save_to_disk` wrote, a .json or a .jsonl "
        f"file; found {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}."
    )


def _from_hub(name: str) -> Any:
    if not _HUB_ID.fullmatch(name):
        raise DatasetNotFoundError(
            f"data.root: no file or folder at {name} (seen from {Path.cwd()}), and it is no id of the Hugging Face Hub "
            "(OWNER/NAME)."
        )
    from datasets import load_dataset

    try:
        return load_dataset(name)
    except Exception as error:  # connection, authorisation, missing set: `datasets` raises a dozen kinds
        raise DatasetNotFoundError(
            f"{name} is no file or folder here (seen from {Path.cwd()}), and was not loaded from the Hugging Face Hub: "
            f"{type(error).__name__}: {error} Where the Hub cannot be reached, fetch it elsewhere (`hf download {name} "
            "--repo-type dataset --local-dir FOLDER`) and set data.root to the folder."
        ) from error


def _split(data: Any, split: str, place: str) -> Any:
    """One split of a DatasetDict; "train", or the only one, where none is named."""
    if not isinstance(data, Mapping):
        if split:
            raise ConfigConflictError(f"{place} is one split; expected its name without @{split}.")
        return data
    wanted = split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
    if wanted not in data:
        raise DatasetNotFoundError(f"{place} has no split {wanted!r}; it has {', '.join(data)}: {place}@SPLIT")
    return data[wanted]


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{file} cannot be read as {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise AnnotationError(f"{file}: expected a list of objects, one per row.")
    return entries


def _fields(entry: dict[str, Any], columns: Mapping[str, str], where: str) -> _Entry:
    """The picture, question and solution of one row of a JSON file."""
    if "conversations" not in entry:
        image, problem, solution = (entry[_column(key, list(entry), columns, where)] for key in COLUMNS)
        return _Entry(str(_single(image, where)), str(problem), str(solution))
    turns = entry["conversations"]
    texts = [str(turn.get("value", "")) for turn in turns] if isinstance(turns, list) else []
    if len(texts) != 2:
        raise AnnotationError(f"{where}: expected a conversation of one question and one answer, found {len(texts)}.")
    inside = _IMG.findall(texts[0])
    image = inside if inside else entry[_column("image", list(entry), columns, where)]
    return _Entry(str(_single(image, where)), texts[0], texts[1])


def _column(key: str, found: Sequence[str], columns: Mapping[str, str], where: str) -> str:
    """The name of a column."""
    wanted = (columns[key],) if key in columns else COLUMNS[key]
    for name in wanted:
        if name in found:
            return name
    raise AnnotationError(
        f"{where}: no column {' or '.join(wanted)} for the {key}; it has {', '.join(found)}. Name it: "
        f"--data.columns '{{{key}: NAME}}'"
    )


def _single(image: Any, where: str) -> Any:
    if not isinstance(image, list):
        return image
    if len(image) != 1:
        raise AnnotationError(f"{where}: expected one picture, found {len(image)}. Leave such rows out.")
    return image[0]


__all__ = [
    "COLUMNS",
    "ArrowSource",
    "FileSource",
    "Identity",
    "Source",
    "digest",
    "open_source",
    "place_identity",
    "split_off",
    "tell_apart",
]
