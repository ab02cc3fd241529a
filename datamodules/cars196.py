"""Stanford Cars."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from rft_lightning.datamodules.cars196_layouts import (
    COOP_FILE,
    PLACES,
    Layout,
    find_layout,
    looked_for,
    plain_path,
    year_first,
)
from rft_lightning.datamodules.classification import Labelled
from rft_lightning.datamodules.classification_benchmark import ClassificationBenchmark


class Cars196DataModule(ClassificationBenchmark):
    """Stanford Cars: 16,185 pictures of 196 models (make, model, year) of cars.

    ::

        root/                               the folder itself, or one that holds it as stanford_cars/
          cars_train/00001.jpg ... 08144.jpg      or cars_train/cars_train/
          cars_test/00001.jpg ... 08041.jpg       or cars_test/cars_test/
          devkit/cars_meta.mat                    class names
          devkit/cars_train_annos.mat
          cars_test_annos_withlabels.mat          here or in devkit/
          split_zhou_StanfordCars.json            for `split_protocol: coop`; enough without the devkit, too

    Also recognised: ``car_ims/`` with ``cars_annos.mat``, and class folders ``train/<class>/``, ``test/<class>/``.
    Sample ids are the paths of the copy, so that draws are the same in copies of one layout only.

    Official split: 8144 train, 8041 test (the paper's test set too), 24 to 68 pictures per class in each. It has no
    validation split: `val_shots` holds training pictures out. CoOp divides train into 6509 train and 1635 val, in a
    file on Google Drive, see https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md.

    **It cannot be downloaded any more**; https://github.com/pytorch/vision/issues/7545 collects where people found
    copies. Licence: for non-commercial research only. Citation: Krause, Stark, Deng and Fei-Fei, 3D object
    representations for fine-grained categorization, 3dRR workshop of ICCV 2013.

    The official names end with the year (Audi TTS Coupe 2012); the paper's evaluation puts it first.

    Args:
        **kwargs: see :class:`ClassificationBenchmark`.
    """

    name = "cars196"
    subject, noun = "a car", "the model of the car"
    tree = """
  cars_train/00001.jpg ... 08144.jpg
  cars_test/00001.jpg ... 08041.jpg
  devkit/cars_meta.mat  devkit/cars_train_annos.mat
  cars_test_annos_withlabels.mat
"""
    origin = (
        "Its official pages are gone and nothing can be downloaded; copies are collected in "
        "https://github.com/pytorch/vision/issues/7545."
    )
    coop_file = COOP_FILE
    places = PLACES
    coop_link = "https://drive.google.com/file/d/1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"
    official_val = False

    @cached_property
    def layout(self) -> Layout:
        """The copy that is there.

        Raises:
            DatasetNotFoundError: there is none in a known layout.
            AnnotationError: its files cannot be used.
        """
        found = find_layout(self.root)
        if found is None:
            raise self.not_found(looked_for(self.root))
        return found

    def official_names(self) -> list[str]:
        """See the base class."""
        return self.layout.names

    def paper_name(self, official: str) -> str:
        """See the base class."""
        return year_first(official)

    def official(self, split: str) -> Sequence[Labelled]:
        """See the base class."""
        if split not in self.layout.splits:
            wanted = ", ".join(map(str, self.layout.labels_wanted)) or f"a folder {split}"
            raise self.not_found(f"The labels of the {split} pictures are missing: looked for {wanted}.")
        return self.layout.splits[split]

    def picture_path(self, path: str) -> Path:
        """See the base class."""
        first, _, rest = path.partition("/")
        return self.layout.folders.get(first, self.root / first) / rest

    def plain_path(self, path: str) -> str:
        """See the base class."""
        return plain_path(path)


__all__ = ["Cars196DataModule"]
