"""ReasonSeg, the reasoning segmentation set of LISA, as grounding with boxes and masks."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rft_lightning.datamodules.coco_annotations import Box
from rft_lightning.datamodules.detection import picture_size
from rft_lightning.datamodules.labelled import LabelledDataModule
from rft_lightning.datamodules.rows import Row
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.masks import Region
from rft_lightning.sample import GroundingTarget, Sample
from rft_lightning.tasks import GroundingTask

BOX_RULES = ("union_target", "largest_target", "per_target", "first_shape")
TARGET, IGNORED, FLAG = "target", "ignore", "flag"

_SOURCE = "train.zip, val.zip and test.zip of ReasonSeg, linked from https://github.com/dvlab-research/LISA"
_SUFFIXES = (".jpg", ".jpeg", ".png")


class LISAGroundingDataModule(LabelledDataModule):
    """ReasonSeg: pictures with an implicit instruction ("what would a thirsty person take?") and what it refers to.

    Files, as unpacked; `root` may be any of the three upper folders::

        reason_seg/ReasonSeg/
          train/<id>.jpg <id>.json   val/ ...   test/ ...
          explanatory/train.json                            (not read)

    239 pictures for training, 200 for validation, 779 for test. A JSON file holds up to six wordings (`text`), whether
    they are sentences or short phrases (`is_sentence`) and polygons (`shapes`) labelled ``target``, ``ignore``
    (ambiguous, not scored) or ``flag`` (deprecated, meaningless).

    Training has one row per wording, of about 5.5; validation, test and prediction ask with the first one. The target's
    `mask()` is LISA's: ``flag`` left out, polygons painted from the largest to the smallest, 1 for targets and 255 for
    ``ignore``. It is made from the polygons when it is asked for.

    Licence: none stated for the annotations (LISA's code: Apache-2.0); the pictures are from OpenImages and ScanNet.
    Lai et al.: LISA: Reasoning Segmentation via Large Language Model, CVPR 2024. Download by hand (Google Drive):
    https://github.com/dvlab-research/LISA#dataset

    Args:
        root: folder of the data set.
        texts: ``all`` wordings in training, or the ``first``.
        box_from: how polygons become the box that is the answer. ``union_target`` (default): around all targets, the
            box of the mask that is scored; one object is often several polygons, cut by what is before it.
            ``largest_target``: around the largest target. ``per_target``: one box per target, the largest first (the
            first is the answer). ``first_shape``: around the first polygon whatever its label, as the published code
            of Visual-RFT does in training and evaluation.
        task: the task; GroundingTask by default.
        **kwargs: see :class:`LabelledDataModule`. There are no classes: `shots` and `val_shots` count pictures of the
            whole set; several wordings of one picture are one shot.

    Raises:
        ConfigConflictError: an argument is out of its range, or `classes` is given.
        DatasetNotFoundError: (in `samples`) files are missing.
        AnnotationError: (in `samples`) a file cannot be used.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        texts: Literal["all", "first"] = "all",
        box_from: Literal["union_target", "largest_target", "per_target", "first_shape"] = "union_target",
        task: GroundingTask | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        if texts not in ("all", "first"):
            raise ConfigConflictError(f"Expected texts all or first, found {texts!r}.")
        if box_from not in BOX_RULES:
            raise ConfigConflictError(f"Expected box_from to be one of {', '.join(BOX_RULES)}, found {box_from!r}.")
        if self.classes is not None:
            raise ConfigConflictError(f"ReasonSeg has no classes; found classes={self.classes!r}. Set it to null.")
        self.texts, self.box_from = texts, box_from
        self.task = task if task is not None else GroundingTask()
        self._scenes: dict[str, dict[str, Scene]] = {}

    @property
    def class_names(self) -> list[str]:
        """None: an instruction is no class."""
        return []

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class."""
        rows = []
        for name, scene in self.scenes(split).items():
            asked = scene.texts if split == "train" and self.texts == "all" else scene.texts[:1]
            rows += [Row(f"lisa/{split}/{name}/{number}", name, "") for number in range(len(asked))]
        return rows

    def maker(self, split: str, rows: Sequence[Row]) -> Callable[[Row], Sample]:
        """See the base class."""
        scenes = self.scenes(split)
        return GroundingSamples(self.task, self.box_from, {row.image: scenes[str(row.image)] for row in rows})

    def scenes(self, split: str) -> dict[str, Scene]:
        """Picture id -> what is annotated, read once; pictures without a target are left out with a warning."""
        if split not in self._scenes:
            folder = self._folder(split)
            found = {file.stem: read_scene(file) for file in sorted(folder.glob("*.json"))}
            self._check_pictures(folder, found)
            empty = [name for name, scene in found.items() if not scene.boxes(self.box_from)]
            if empty:
                warnings.warn(
                    f"Left out {len(empty)} pictures of {folder} without a target that has an area: "
                    f"{', '.join(empty)}.",
                    stacklevel=2,
                )
            self._scenes[split] = {name: scene for name, scene in found.items() if name not in empty}
        return self._scenes[split]

    def _folder(self, split: str) -> Path:
        places = [self.root / below / split for below in (".", "ReasonSeg", "reason_seg/ReasonSeg")]
        for folder in places:
            if any(folder.glob("*.json")):
                return folder
        found = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
        raise DatasetNotFoundError(
            f"No ReasonSeg data for {split}: expected {places[0]} with <id>.jpg and <id>.json (or the same below "
            f"ReasonSeg/ or reason_seg/ReasonSeg/); {self.root} "
            f"{'holds ' + ', '.join(found[:10]) if found else 'is empty or does not exist'}. Unpack {_SOURCE}, and set "
            "data.root to the folder that holds train/, val/ and test/."
        )

    def _check_pictures(self, folder: Path, scenes: Mapping[str, Scene]) -> None:
        there = set(os.listdir(folder))
        missing = [scene.picture.name for scene in scenes.values() if scene.picture.name not in there]
        if missing:
            raise DatasetNotFoundError(
                f"{len(missing)} of the {len(scenes)} pictures of {folder} are missing, the first is {missing[0]}. "
                f"Unpack again, pictures and annotations are in the same archive: {_SOURCE}."
            )


@dataclass(frozen=True, slots=True)
class Shape:
    """A polygon and what it means: target, ignore or flag."""

    kind: str
    points: tuple[tuple[float, float], ...]

    @property
    def box(self) -> Box:
        """The smallest box around the corners."""
        x, y = zip(*self.points, strict=True)
        return min(x), min(y), max(x), max(y)

    @property
    def area(self) -> float:
        """Square pixels inside the polygon (shoelace formula)."""
        (xs, ys), n = zip(*self.points, strict=True), len(self.points)
        return abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(n))) / 2


@dataclass(frozen=True, slots=True)
class Scene:
    """One annotation file."""

    picture: Path
    texts: tuple[str, ...]
    shapes: tuple[Shape, ...]

    def boxes(self, rule: str) -> list[Box]:
        """The boxes by a rule of `box_from`, the answer first; those without area are left out."""
        targets = sorted((shape for shape in self.shapes if shape.kind == TARGET), key=lambda s: s.area, reverse=True)
        boxes = [shape.box for shape in (self.shapes[:1] if rule == "first_shape" else targets)]
        boxes = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
        if rule == "union_target" and boxes:
            left, top, right, bottom = zip(*boxes, strict=True)
            return [(min(left), min(top), max(right), max(bottom))]
        return boxes if rule == "per_target" else boxes[:1]

    def regions(self) -> tuple[Region, ...]:
        """The polygons of LISA's mask, corners cut to whole pixels."""
        return tuple(
            Region(tuple((int(x), int(y)) for x, y in shape.points), 255 if shape.kind == IGNORED else 1)
            for shape in self.shapes
            if shape.kind != FLAG
        )


@dataclass(frozen=True)
class GroundingSamples:
    """Samples of ReasonSeg rows."""

    task: GroundingTask
    box_from: str
    scenes: Mapping[Any, Scene]

    def __call__(self, row: Row) -> Sample:
        scene = self.scenes[row.image]
        size = picture_size(scene.picture)  # the annotations do not state it
        target = GroundingTarget(
            [_clipped(box, size, scene.picture) for box in scene.boxes(self.box_from)],  # type: ignore[arg-type]
            expression=scene.texts[int(row.id.rsplit("/", 1)[1])],
            image_size=size,
            regions=scene.regions(),
        )
        return Sample(row.id, scene.picture, target, self.task, size, image_id=row.image)


def read_scene(file: Path) -> Scene:
    """One annotation file, in UTF-8 or (some are) in cp1252.

    Raises:
        AnnotationError: the file cannot be used.
    """
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
    try:
        content = json.loads(text)
        texts = _texts(content["text"])
        shapes = tuple(Shape(_kind(entry["label"]), _points(entry["points"])) for entry in content["shapes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise AnnotationError(
            f"{file} is no usable ReasonSeg file ({problem}). Expected JSON with `text` (a list of instructions, none "
            f"empty) and `shapes` (label, points [[x, y], ...]). Unpack it again or correct it; {_SOURCE}."
        ) from error
    pictures = [file.with_suffix(suffix) for suffix in _SUFFIXES]
    return Scene(next((path for path in pictures if path.is_file()), pictures[0]), texts, shapes)


def _kind(label: str) -> str:
    """LISA's reading: ``flag`` is itself, whatever contains ``ignore`` is ignored, all else is the target."""
    label = label.lower()
    return FLAG if label == FLAG else IGNORED if IGNORED in label else TARGET


def _texts(found: Any) -> tuple[str, ...]:
    # A bare string would pass as a list of letters.
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"text is {found!r}")
    return tuple(found)


def _points(points: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    if not points:
        raise ValueError("a shape without points")
    return tuple((float(x), float(y)) for x, y in points)


def _clipped(box: Box, size: tuple[int, int], picture: Path) -> Box:
    """The part of a box inside the picture."""
    x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size[0])), min(box[3], float(size[1]))
    if x1 >= x2 or y1 >= y2:
        raise AnnotationError(
            f"The box {[round(value, 2) for value in box]} of {picture.with_suffix('.json')} lies outside its picture "
            f"of {size[0]}x{size[1]} pixels. Restore the original picture, without resizing it: {_SOURCE}."
        )
    return x1, y1, x2, y2


__all__ = ["BOX_RULES", "GroundingSamples", "LISAGroundingDataModule", "Scene", "Shape", "read_scene"]
