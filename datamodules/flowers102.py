"""Oxford Flowers-102."""

from __future__ import annotations

from collections.abc import Sequence

from rft_lightning.datamodules.classification import Labelled
from rft_lightning.datamodules.classification_benchmark import ClassificationBenchmark, read_mat
from rft_lightning.datamodules.download import Download
from rft_lightning.errors import AnnotationError

_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
_SETS = {"train": "trnid", "val": "valid", "test": "tstid"}
# The archive holds no names. The list that torchvision, TensorFlow Datasets and CoOp agree on, in the order of the ids.
# fmt: off
FLOWERS_102 = (
    "pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold", "tiger lily",
    "moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon", "colt's foot", "king protea",
    "spear thistle", "yellow iris", "globe-flower", "purple coneflower", "peruvian lily", "balloon flower",
    "giant white arum lily", "fire lily", "pincushion flower", "fritillary", "red ginger", "grape hyacinth",
    "corn poppy", "prince of wales feathers", "stemless gentian", "artichoke", "sweet william", "carnation",
    "garden phlox", "love in the mist", "mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower",
    "great masterwort", "siam tulip", "lenten rose", "barbeton daisy", "daffodil", "sword lily", "poinsettia",
    "bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia",
    "wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium", "orange dahlia",
    "pink-yellow dahlia?", "cautleya spicata", "japanese anemone", "black-eyed susan", "silverbush",
    "californian poppy", "osteospermum", "spring crocus", "bearded iris", "windflower", "tree poppy", "gazania",
    "azalea", "water lily", "rose", "thorn apple", "morning glory", "passion flower", "lotus", "toad lily", "anthurium",
    "frangipani", "clematis", "hibiscus", "columbine", "desert-rose", "tree mallow", "magnolia", "cyclamen",
    "watercress", "canna lily", "hippeastrum", "bee balm", "ball moss", "foxglove", "bougainvillea", "camellia",
    "mallow", "mexican petunia", "bromelia", "blanket flower", "trumpet creeper", "blackberry lily",
)
# fmt: on
_PAPER = {"colt's foot": "colts foot", "pink-yellow dahlia?": "pink-yellow dahlia"}


class Flowers102DataModule(ClassificationBenchmark):
    """Oxford Flowers-102: 8189 pictures of 102 species of flowers, 40 to 258 of each.

    ::

        root/                   the folder itself, or one that holds it as flowers-102/ or oxford_flowers/
          jpg/image_00001.jpg ... image_08189.jpg
          imagelabels.mat       class of every picture, 1 to 102
          setid.mat             picture numbers of the official splits, from 1
          split_zhou_OxfordFlowers.json   for `split_protocol: coop` only, which needs neither .mat file

    Official split: 1020 train (10 per class), 1020 val (10 per class), 6149 test. Much published code trains on the
    6149 and tests on the 1020. **The paper tests on CoOp's 2463 pictures** (train 4093, val 1633), which mix all three
    official sets; the draw was not seeded, so that only CoOp's file reproduces it. It is on Google Drive and has to be
    fetched by hand, see https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md.

    From https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (``rft prepare --download true`` fetches it). Licence: none
    is stated; the pictures were collected from the web. Citation: Nilsback and Zisserman, Automated flower
    classification over a large number of classes, ICVGIP 2008.

    The paper's evaluation spells two names otherwise: colts foot (colt's foot) and pink-yellow dahlia (pink-yellow
    dahlia?).

    Args:
        **kwargs: see :class:`ClassificationBenchmark`.
    """

    name = "flowers102"
    subject, noun = "a plant", "the species of the plant"
    downloads: Sequence[Download] = (
        Download(_URL + "102flowers.tgz", "102flowers.tgz", "52808999861908f626f3c1f4e79d11fa", "."),
        Download(_URL + "imagelabels.mat", "imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
        Download(_URL + "setid.mat", "setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c"),
    )
    places = (".", "flowers-102", "oxford_flowers", "flowers102")
    marks = ("jpg", "imagelabels.mat", "setid.mat")
    tree = """
  jpg/image_00001.jpg ... image_08189.jpg
  imagelabels.mat
  setid.mat
"""
    origin = f"Get 102flowers.tgz, imagelabels.mat and setid.mat from {_URL}."
    picture_folder = "jpg"
    coop_file = "split_zhou_OxfordFlowers.json"
    coop_link = "https://drive.google.com/file/d/1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"

    def official_names(self) -> list[str]:
        """See the base class."""
        return list(FLOWERS_102)

    def paper_name(self, official: str) -> str:
        """See the base class."""
        return _PAPER.get(official, official)

    def official(self, split: str) -> Sequence[Labelled]:
        """See the base class."""
        labels_file, sets_file = self.file("imagelabels.mat"), self.file("setid.mat")
        labels = [int(label) for label in read_mat(labels_file, "labels")]
        numbers = [int(number) for number in read_mat(sets_file, _SETS[split])]
        unlabelled = [number for number in numbers if not 1 <= number <= len(labels)]
        if unlabelled or not all(1 <= label <= len(FLOWERS_102) for label in labels):
            what = f"picture {unlabelled[0]}" if unlabelled else f"labels {min(labels)} to {max(labels)}"
            raise AnnotationError(
                f"{sets_file} and {labels_file} do not fit: {what}, expected pictures 1 to {len(labels)} and labels 1 "
                f"to {len(FLOWERS_102)}. Download both again. {self.origin}"
            )
        return [Labelled(f"jpg/image_{number:05}.jpg", FLOWERS_102[labels[number - 1] - 1]) for number in numbers]


__all__ = ["FLOWERS_102", "Flowers102DataModule"]
