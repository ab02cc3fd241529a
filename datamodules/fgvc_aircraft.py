"""FGVC-Aircraft."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rft_lightning.datamodules.classification import Labelled
from rft_lightning.datamodules.classification_benchmark import ClassificationBenchmark
from rft_lightning.datamodules.download import Download
from rft_lightning.datamodules.selection import with_close_matches
from rft_lightning.errors import AnnotationError, ConfigConflictError

_URL = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
_NAME_FILES = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}
_BANNER = 20


class FGVCAircraftDataModule(ClassificationBenchmark):
    """FGVC-Aircraft (2013b): 10,000 pictures; 100 variants, 70 families and 30 manufacturers of aircraft.

    ::

        root/               fgvc-aircraft-2013b/data/ as it is unpacked, the folder above it, or data/ renamed
          images/0034309.jpg ...
          variants.txt families.txt manufacturers.txt           class names, one a line
          images_{variant,family,manufacturer}_{train,val,test}.txt     "0817494 707-320"

    Official split: 3334 train, 3333 val, 3333 test; 33 or 34 pictures of a variant in each. CoOp and the paper use it
    as it is, with variants.

    From https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/ (2.75 GB, ``rft prepare --download true`` fetches it).
    Licence: for non-commercial research only; the photographers are named in the banners. Citation: Maji, Rahtu,
    Kannala, Blaschko and Vedaldi, Fine-grained visual classification of aircraft, arXiv 1306.5151, 2013.

    Args:
        level: what a class is: ``variant`` (737-700), ``family`` (Boeing 737) or ``manufacturer`` (Boeing).
        crop_banner: cut the bottom 20 pixels off, which hold a copyright banner. The published runs show no sign of it.
            The check of the pictures at the start then decodes them, and predictions name no file, only its id.
        **kwargs: see :class:`ClassificationBenchmark`; ``split_protocol: coop`` is the official split.
    """

    name = "fgvc_aircraft"
    subject, noun = "an aircraft", "the model of the aircraft"
    downloads: Sequence[Download] = (
        Download(_URL, "fgvc-aircraft-2013b.tar.gz", "d4acdd33327262359767eeaa97a4f732", "."),
    )
    places = (".", "data", "fgvc-aircraft-2013b/data", "fgvc_aircraft", "fgvc_aircraft/data")
    marks = tuple(_NAME_FILES.values())
    tree = """
  images/0034309.jpg ...
  variants.txt  families.txt  manufacturers.txt
  images_variant_train.txt  images_variant_val.txt  images_variant_test.txt  (the same for family, manufacturer)
"""
    origin = f"Get {_URL} and unpack it there."
    picture_folder = "images"

    def __init__(
        self,
        *,
        level: Literal["variant", "family", "manufacturer"] = "variant",
        crop_banner: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if level not in _NAME_FILES:
            raise ConfigConflictError(f"Expected level to be one of {', '.join(_NAME_FILES)}, found {level!r}.")
        self.level, self.crop_banner = level, crop_banner
        self.cropped_rows = _BANNER if crop_banner else 0

    def official_names(self) -> list[str]:
        """See the base class."""
        return self._names

    def official(self, split: str) -> Sequence[Labelled]:
        """See the base class."""
        file = self.file(f"images_{self.level}_{split}.txt")
        return [Labelled(f"images/{picture}.jpg", name) for picture, name in self._read(file)]

    def official_name(self, path: str, name: str) -> str | None:
        """Split files name variants; other levels are looked up in the official lists."""
        return super().official_name(path, name) if self.level == "variant" else self._labels.get(self.plain_path(path))

    @cached_property
    def _names(self) -> list[str]:
        lines = self.file(_NAME_FILES[self.level]).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]

    @cached_property
    def _labels(self) -> dict[str, str]:
        return {entry.path: entry.label for split in ("train", "val", "test") for entry in self.official(split)}

    def _read(self, file: Path) -> list[tuple[str, str]]:
        """(picture id with its leading zeros, class name, which may hold spaces and slashes) of every line."""
        entries = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            picture, _, name = line.strip().partition(" ")
            if name and name not in self._known:
                raise AnnotationError(
                    f"{file}, line {number}: {with_close_matches(name, self._names)} is no {self.level} of "
                    f"{_NAME_FILES[self.level]}. Expected 'picture name' with one of its {len(self._names)} names. "
                    f"Correct the line. {self.origin}"
                )
            if not name and picture:
                raise AnnotationError(
                    f"{file}, line {number}: expected 'picture name', found {line!r}. Correct the line. {self.origin}"
                )
            if picture:
                entries.append((picture, name))
        return entries

    @cached_property
    def _known(self) -> set[str]:
        return set(self._names)


__all__ = ["FGVCAircraftDataModule"]
