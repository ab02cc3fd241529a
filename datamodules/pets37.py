"""Oxford-IIIT Pet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from rft_lightning.datamodules.classification import Labelled
from rft_lightning.datamodules.classification_benchmark import ClassificationBenchmark
from rft_lightning.datamodules.download import Download
from rft_lightning.errors import AnnotationError

_URL = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
_FILES = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}


class Pets37DataModule(ClassificationBenchmark):
    """Oxford-IIIT Pet: 37 breeds, 12 of cats and 25 of dogs.

    ::

        root/                       the folder itself, or one that holds it as oxford-iiit-pet/ or oxford_pets/
          images/Abyssinian_1.jpg ...   7390 pictures, and some .mat files that nothing uses
          annotations/trainval.txt      "Abyssinian_100 1 1 1": picture, class 1 to 37, species, breed in the species
          annotations/test.txt
          split_zhou_OxfordPets.json    for `split_protocol: coop` only

    Official split: 3680 trainval, 3669 test (the paper's test set too). It has no validation split: `val_shots` holds
    pictures of trainval out. CoOp divides trainval into 2944 train and 736 val, in a file on Google Drive that has to
    be fetched by hand, see https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md.

    A few pictures are PNG or GIF files named .jpg; all are read as RGB.

    From https://www.robots.ox.ac.uk/~vgg/data/pets/ (``rft prepare --download true`` fetches it). Licence: CC BY-SA
    4.0; the pictures remain their owners'. Citation: Parkhi, Vedaldi, Zisserman and Jawahar, Cats and dogs, CVPR 2012.

    Names are those of the files, where cats have capitals (British_Shorthair); the paper's evaluation writes all in
    lower case.

    Args:
        **kwargs: see :class:`ClassificationBenchmark`.
    """

    name = "pets37"
    subject, noun = "a pet", "the species of the pet"
    downloads: Sequence[Download] = (
        Download(_URL + "images.tar.gz", "images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c", "."),
        Download(_URL + "annotations.tar.gz", "annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f", "."),
    )
    places = (".", "oxford-iiit-pet", "oxford_pets", "pets37")
    marks = ("annotations", "images")
    tree = """
  images/Abyssinian_1.jpg ...
  annotations/trainval.txt
  annotations/test.txt
"""
    origin = f"Get images.tar.gz and annotations.tar.gz from {_URL} and unpack both there."
    picture_folder = "images"
    coop_file = "split_zhou_OxfordPets.json"
    coop_link = "https://drive.google.com/file/d/1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs"
    official_val = False

    def official_names(self) -> list[str]:
        """See the base class."""
        return self._names

    def paper_name(self, official: str) -> str:
        """See the base class."""
        return official.lower()

    def official(self, split: str) -> Sequence[Labelled]:
        """See the base class."""
        return [Labelled(f"images/{name}.jpg", breed(name)) for name, _ in read_list(self.file(_FILES[split]))]

    @cached_property
    def _names(self) -> list[str]:
        """The breeds in the order of their ids, which is neither that of the alphabet nor that of the files."""
        names: dict[int, str] = {}
        for file in map(self.file, _FILES.values()):
            for name, number in read_list(file):
                if names.setdefault(number, breed(name)) != breed(name):
                    raise AnnotationError(
                        f"{file} gives {name} the class {number}, which is {names[number]!r} elsewhere. Expected one "
                        f"breed per class. Download it again. {self.origin}"
                    )
        return [names[number] for number in sorted(names)]


def read_list(file: Path) -> list[tuple[str, int]]:
    """(picture, class id from 1) of every line; comment lines are left out.

    Raises:
        AnnotationError: a line has another form.
    """
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if len(words) != 4 or "_" not in words[0] or not words[1].isdecimal():
            raise AnnotationError(
                f"{file}, line {number}: expected 'Breed_number class species breed', found {line!r}. Correct the line "
                "or download the file again."
            )
        entries.append((words[0], int(words[1])))
    return entries


def breed(picture: str) -> str:
    """The breed in a picture's name: english_cocker_spaniel_12 -> english_cocker_spaniel."""
    return picture.rsplit("_", 1)[0]


__all__ = ["Pets37DataModule", "breed", "read_list"]
