"""Manifests: which rows a run uses, as a JSON file that can be kept, compared and given back."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft_lightning import __version__
from rft_lightning.datamodules.rows import Row
from rft_lightning.errors import AnnotationError, ConfigConflictError

if TYPE_CHECKING:
    from rft_lightning.datamodules.labelled import LabelledDataModule

FORMAT = "rft_lightning manifest"
FORMAT_VERSION = 1
# A test split beyond this is stated by count and hash alone; a file of ids would outgrow the annotations.
# Settings under which the same rows have other classes or boxes.
MEANING = ("level", "split_protocol", "class_name_style", "box_from")
_TEST_IDS = 20_000


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read back.

    Attributes:
        file: where it lies.
        content: what it says.
    """

    file: Path
    content: dict[str, Any]

    def check(self, data: LabelledDataModule) -> None:
        """See that it is a manifest of this data set with the rows it was written with.

        Raises:
            ConfigConflictError: it is of another data set, of one with another meaning, or of another format.
            AnnotationError: ids are missing or do not fit their hash.
        """
        found, expected = self.content.get("dataset"), type(data).__name__
        if found != expected:
            raise ConfigConflictError(
                f"The manifest {self.file} is of {found}, but the data set is {expected}. Give the manifest of this "
                "data set, or set data.manifest to null."
            )
        if self.content.get("format_version") != FORMAT_VERSION:
            raise ConfigConflictError(
                f"The manifest {self.file} has format version {self.content.get('format_version')}, expected "
                f"{FORMAT_VERSION}: it was written by rft_lightning {self.content.get('version')}, this is "
                f"{__version__}. Write it again with this version."
            )
        for split in ("train", "val", "test"):
            try:
                stated = self.content["splits"][split]
                count, ids, source = stated["count"], stated.get("ids", []), stated["source"]
                whole = source in ("train", "val", "test") and "settings" in self.content
                whole = whole and ("ids" not in stated or (len(ids), rows_hash(ids)) == (count, stated["hash"]))
            except (KeyError, TypeError, AttributeError):
                whole = False
            if not whole:
                raise AnnotationError(
                    f"The {split} rows of the manifest {self.file} are missing or do not fit their hash, so it was "
                    "edited or cut off. Restore it, or draw anew with `rft prepare`."
                )
        ours, theirs = settings_of(data), self.content["settings"]
        for name in MEANING:
            if ours.get(name) != theirs.get(name):
                raise ConfigConflictError(
                    f"The manifest {self.file} was written with {name}={theirs.get(name)!r}, but data.{name} is "
                    f"{ours.get(name)!r}: its rows would be asked for other answers. Set data.{name} to that, or draw "
                    "anew without data.manifest."
                )

    def choose(self, data: LabelledDataModule, split: str) -> tuple[str, list[Row]] | None:
        """The split that lists the rows of `split`, and the rows, in the order of the manifest.

        Raises:
            ConfigConflictError: the data set has no such rows, or others than when the manifest was written.
        """
        stated = self.content["splits"][split]
        source = stated["source"]
        if "ids" not in stated:
            rows = list(data.rows(source))
            if (len(rows), rows_hash(row.id for row in rows)) != (stated["count"], stated["hash"]):
                raise ConfigConflictError(
                    f"The manifest {self.file} states {stated['count']} rows in {split}; the data has {len(rows)}, or "
                    f"others. {self._differs(data)}"
                )
            return source, rows
        if source == "val" and not data.has_val:
            raise ConfigConflictError(
                f"The manifest {self.file} takes {split} from a validation split, which {type(data).__name__} does not "
                f"have as it is set. {self._differs(data)}"
            )
        found = data.look_up(source, stated["ids"])
        missing = [name for name in stated["ids"] if name not in found]
        if missing:
            raise ConfigConflictError(
                f"{len(missing)} of the {len(stated['ids'])} {split} rows of the manifest {self.file} are not in the "
                f"data: {', '.join(map(repr, missing[:3]))}{', ...' * (len(missing) > 3)}. {self._differs(data)}"
            )
        return source, [found[name] for name in stated["ids"]]

    def _differs(self, data: LabelledDataModule) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(self.content["settings"].items()))
        return (
            f"The tree in {data.root} differs from the one it was written for, or the settings do (it was written with "
            f"{settings}). Use the same data and settings, or draw anew without data.manifest."
        )


def describe(data: LabelledDataModule) -> dict[str, Any]:
    """The content of the manifest of a datamodule: see :meth:`LabelledDataModule.manifest_data`."""
    if isinstance(data.given, Manifest):
        for split in ("train", "val", "test"):
            data.drawn(split)
        return data.given.content
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "dataset": type(data).__name__,
        "seed": data.seed,
        "settings": settings_of(data),
        "splits": {split: _split(data, split) for split in ("train", "val", "test")},
    }


def write(content: dict[str, Any], path: Path) -> None:
    """Write a manifest: the same bytes for the same content, and never half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode("ascii"))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that another process reads the old content or the new one.

    Raises:
        OSError: the folder cannot be written to.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files that only their owner can read.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def rows_hash(ids: Iterable[str]) -> str:
    """SHA-256 of ids in their order."""
    digest = hashlib.sha256()
    for name in ids:
        digest.update(name.encode("utf-8") + b"\n")
    return digest.hexdigest()


def settings_of(data: LabelledDataModule) -> dict[str, Any]:
    """The arguments that decide which rows there are: those of the data set's own class and of its draw.

    Taken from the attributes of the same names; paths are cut to their names, so that machines agree.
    """
    from rft_lightning.datamodules.labelled import LabelledDataModule

    classes = [kind for kind in type(data).__mro__ if issubclass(kind, LabelledDataModule)]
    names = {name for kind in classes for name in inspect.signature(kind).parameters}
    found = {name: getattr(data, name) for name in names - {"root", "kwargs", "task"} if hasattr(data, name)}
    settings = {name: _plain(value) for name, value in found.items() if _is_plain(value)}
    if data.exclude_image_ids is not None:
        excluded = sorted(data.excluded)
        settings["exclude_image_ids"] = {"count": len(excluded), "hash": rows_hash(excluded)}
    return settings


def _split(data: LabelledDataModule, split: str) -> dict[str, Any]:
    ids = [row.id for row in data.drawn(split)]
    stated = {"source": data.source(split), "count": len(ids), "hash": rows_hash(ids), "short": data.short(split)}
    return stated if split == "test" and len(ids) > _TEST_IDS else {**stated, "ids": ids}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Path)


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    is_path = isinstance(value, Path) or (isinstance(value, str) and os.path.isabs(value))
    return Path(value).name if is_path else value


__all__ = ["FORMAT", "FORMAT_VERSION", "Manifest", "describe", "rows_hash", "settings_of", "write", "write_atomically"]
