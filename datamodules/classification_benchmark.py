"""ClassificationBenchmark: the published classification sets; official splits, CoOp's, or a file's."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from rft_lightning.datamodules.classification import (
    ClassificationDataModule,
    Labelled,
    by_spelling,
    names_in,
)
from rft_lightning.datamodules.download import Download
from rft_lightning.datamodules.selection import with_close_matches
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.rewards.accuracy import normalise_label

_COOP = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"


class ClassificationBenchmark(ClassificationDataModule):
    """A published set: one folder of pictures, official lists, and class names that the paper may spell otherwise.

    Args:
        split_protocol: ``official``: the split of the data set's own files; ``coop``: CoOp's split file of the set,
            looked for in the root; or a JSON file of that form,
            ``{"train" | "val" | "test": [[path, label, class name], ...]}`` ("val" may be missing).
        class_name_style: spelling of the class names: ``visual_rft`` (what the paper's evaluation compares with) or
            ``official`` (as in the data set's files). The strict rules accept the other one, too.
        **kwargs: see :class:`ClassificationDataModule`.
    """

    # What `rft prepare` fetches.
    downloads: Sequence[Download] = ()
    # Where the set's folder may be, seen from the root, and what shows that it is there.
    places: ClassVar[tuple[str, ...]] = (".",)
    marks: ClassVar[tuple[str, ...]]
    # The expected tree, for messages.
    tree: ClassVar[str]
    picture_folder: ClassVar[str]
    # CoOp's split file and where it is; None where CoOp uses the official split.
    coop_file: ClassVar[str | None] = None
    coop_link: ClassVar[str] = ""
    official_val: ClassVar[bool] = True

    def __init__(
        self,
        *,
        split_protocol: str = "official",
        class_name_style: Literal["official", "visual_rft"] = "visual_rft",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if class_name_style not in ("official", "visual_rft"):
            raise ConfigConflictError(f"Expected class_name_style official or visual_rft, found {class_name_style!r}.")
        self.split_protocol, self.class_name_style = split_protocol, class_name_style

    @abstractmethod
    def official_names(self) -> list[str]:
        """The class names as the data set's own files spell them, in their order."""

    @abstractmethod
    def official(self, split: str) -> Sequence[Labelled]:
        """The pictures of an official split, with official class names."""

    def paper_name(self, official: str) -> str:
        """How the paper's evaluation spells a class."""
        return official

    @property
    def has_val(self) -> bool:
        """Whether the chosen split has validation pictures."""
        return self.official_val if self._split_file is None else "val" in self._published

    @cached_property
    def folder(self) -> Path:
        """The set's folder: the root or a usual place below it.

        Raises:
            DatasetNotFoundError: the root holds nothing of the set.
        """
        for place in self.places:
            if any((self.root / place / mark).exists() for mark in self.marks):
                return self.root / place
        raise self.not_found(
            f"Looked for {' or '.join(self.marks)} in {', '.join(str(self.root / place) for place in self.places)}."
        )

    def all_classes(self) -> list[str]:
        """See the base class."""
        return [self._spellings(name)[0] for name in self.official_names()]

    def aliases(self, label: str) -> tuple[str, ...]:
        """The other spelling, where the two differ."""
        return self._aliases.get(label, ())

    def pictures(self, split: str) -> Sequence[Labelled]:
        """See the base class."""
        entries = self.official(split) if self._split_file is None else self._published[split]
        return [Labelled(entry.path, self._spellings(entry.label)[0]) for entry in entries]

    def picture_path(self, path: str) -> Path:
        """See the base class."""
        return self.folder / path

    def plain_path(self, path: str) -> str:
        """The path in the data set of a picture that a published split names by some path."""
        return f"{self.picture_folder}/{Path(path).name}"

    def official_name(self, path: str, name: str) -> str | None:
        """The official class name of an entry in a published split; None where its class is unknown."""
        return self._by_spelling.get(normalise_label(name))

    def file(self, name: str) -> Path:
        """A file of the set.

        Raises:
            DatasetNotFoundError: it is missing.
        """
        path = self.folder / name
        if not path.is_file():
            raise self.not_found(f"{path} is missing.")
        return path

    def not_found(self, problem: str) -> DatasetNotFoundError:
        """The error that shows the expected tree, what is there, and where to get the rest."""
        held = sorted(names_in(self.root))
        found = f"{self.root} holds {', '.join(held[:12]) or 'nothing'}{', ...' if len(held) > 12 else ''}"
        return DatasetNotFoundError(
            f"No complete {self.name} data in data.root. {problem} "
            f"{found if self.root.is_dir() else f'The folder {self.root} does not exist'}. Expected in it:\n"
            f"{self.tree.rstrip()}\n{self.origin}"
        )

    def _spellings(self, official: str) -> tuple[str, ...]:
        """The shown spelling of a class first."""
        names = (self.paper_name(official), official)
        return tuple(dict.fromkeys(names if self.class_name_style == "visual_rft" else names[::-1]))

    @cached_property
    def _by_spelling(self) -> dict[str, str]:
        return by_spelling(self.official_names(), self._spellings)

    @cached_property
    def _aliases(self) -> dict[str, tuple[str, ...]]:
        spellings = [self._spellings(name) for name in self.official_names()]
        return {shown: tuple(others) for shown, *others in spellings}

    @cached_property
    def _split_file(self) -> Path | None:
        """The file of a published split; None for the official one."""
        if self.split_protocol == "official" or (self.split_protocol == "coop" and self.coop_file is None):
            return None
        if self.split_protocol == "coop":
            places = list(dict.fromkeys(self.root / place / str(self.coop_file) for place in self.places))
            remedy = f"Get it from {self.coop_link} ({_COOP}), or set data.split_protocol to official."
        else:
            places = [Path(self.split_protocol).expanduser(), self.root / self.split_protocol]
            remedy = "Set data.split_protocol to official, coop, or a JSON file of the form of CoOp's."
        for place in places:
            if place.is_file():
                return place
        raise DatasetNotFoundError(
            f"data.split_protocol is {self.split_protocol!r}, but no split file is at {', '.join(map(str, places))}. "
            f"{remedy}"
        )

    @cached_property
    def _published(self) -> dict[str, list[Labelled]]:
        """The splits of the split file, with official class names."""
        content = read_split(self._split_file) if self._split_file is not None else {}
        return {
            split: [self._entry(split, path, name) for path, _, name in entries] for split, entries in content.items()
        }

    def _entry(self, split: str, path: str, name: str) -> Labelled:
        label = self.official_name(path, name)
        if label is None:
            raise AnnotationError(
                f"{self._split_file} gives {path} in {split} the class {with_close_matches(name, self.all_classes())}, "
                f"which {type(self).__name__} does not have. Correct the file, or use the split file of this data set."
            )
        return Labelled(self.plain_path(path), label)


def read_split(file: Path) -> dict[str, list[tuple[str, int, str]]]:
    """CoOp's split file: split -> (path, label from 0, class name).

    Raises:
        AnnotationError: the file has another form.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        splits = {split: [(str(p), int(n), str(name)) for p, n, name in content[split]] for split in content}
        splits["train"], splits["test"]
    except (ValueError, TypeError, KeyError) as error:
        raise AnnotationError(
            f"{file} is no split file ({type(error).__name__}: {error}). Expected JSON of the form "
            '{"train": [[path, label, class name], ...], "val": ..., "test": ...}. Download it again, or correct it.'
        ) from error
    return splits


def read_mat(file: Path, variable: str) -> Any:
    """A variable of a MATLAB file as a one-dimensional numpy array.

    Raises:
        AnnotationError: the file cannot be read or has no such variable.
    """
    import numpy as np
    from scipy.io import loadmat

    try:
        content = loadmat(file, squeeze_me=True)
    except Exception as error:  # scipy raises a dozen kinds on a damaged file
        raise AnnotationError(
            f"{file} is no readable MATLAB file ({type(error).__name__}: {error}). Download it again: an interrupted "
            "download and a saved error page look like this."
        ) from error
    if variable not in content:
        found = ", ".join(name for name in content if not name.startswith("__"))
        raise AnnotationError(f"{file} has no variable {variable!r}, but {found or 'none at all'}. Download it again.")
    return np.atleast_1d(content[variable])


__all__ = ["ClassificationBenchmark", "read_mat", "read_split"]
