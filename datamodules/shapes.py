"""Shapes: pictures of coloured shapes, rendered when they are asked for. Nothing to download."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from rft_lightning.datamodules.base import RFTDataModule
from rft_lightning.datamodules.selection import select_classes
from rft_lightning.errors import ConfigConflictError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import ClassTarget, DetectionTarget, GroundingTarget, Sample, Target, as_boxes
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask, Task
from rft_lightning.tasks.detection import solution_size

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 50, 40),
    "green": (50, 160, 70),
    "blue": (50, 90, 210),
    "yellow": (235, 200, 40),
}
COMBINATIONS = tuple(f"{colour} {kind}" for kind in SHAPES for colour in COLOURS)
# An open vocabulary: the novel ones pair each kind with one colour, so that every kind and every colour is also in the
# other twelve, and what is new is that they come together.
NOVEL_4 = tuple(f"{colour} {kind}" for kind, colour in zip(SHAPES, COLOURS, strict=True))
BASE_12 = tuple(name for name in COMBINATIONS if name not in NOVEL_4)
CLASS_SETS = {"base_combinations": BASE_12, "novel_combinations": NOVEL_4}
_SPLIT_NUMBERS = {"train": 0, "val": 1, "test": 2, "predict": 3}
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Shape:
    """One drawn object: its kind, its colour and its box, xyxy in pixels."""

    kind: str
    colour: str
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        """Colour and kind: "red circle"."""
        return f"{self.colour} {self.kind}"


class ShapesDataModule(RFTDataModule):
    """Questions about coloured shapes: detection ("all circles"), classification ("red star") and grounding.

    Row i of a split depends on (seed, split, i) and on what may be drawn, and on nothing else. Detection asks for the
    shapes of one category in a picture of up to `max_shapes`; classification shows one shape; grounding names the
    colour and kind of a shape that occurs once. Kinds of questions follow from `task`; with several tasks rows take
    turns.

    An open vocabulary for detection is `categories: colour_and_kind`, trained with `classes: base_combinations` and
    tested with `classes: null`: the average precision of each class tells base and novel ones apart. Pictures of
    training then neither show nor ask for a novel combination, though each of its two words is asked for in others.

    Args:
        task: the task, or several of them; DetectionTask by default.
        shots: training rows per kind of shape (for classification, and for detection by colour and kind: per colour and
            kind); None takes `train_size` rows.
        train_size: training rows when `shots` is None.
        val_size: validation rows.
        test_size: test (and prediction) rows.
        eval_seed: seed of the validation and test pictures, apart from the training `seed`.
        shapes: kinds of shapes drawn and asked for.
        categories: what detection asks for: ``kind`` ("circle"; ids count `shapes` from 1) or ``colour_and_kind``
            ("red circle"; ids count all 16 combinations from 1, whatever `classes` says).
        classes: combinations of colour and kind that are drawn, and asked for: names such as "red circle", or the name
            of a set: ``base_combinations`` (12) or ``novel_combinations`` (4). null for all.
        image_side: width and height of the pictures in pixels.
        max_shapes: most shapes in a detection or grounding picture, at least 1.
        min_side: least side of a shape, as a share of the picture's.
        max_side: greatest side of a shape, as a share of the picture's.
        negative_fraction: share of detection rows that ask for a kind that is not there.
        loose_boxes: boxes in *training* targets are enlarged about their centre by a factor drawn uniformly between 1
            and this one, as sloppy annotators draw them. 1 is exact. Validation and test are always exact.
        **kwargs: see :class:`RFTDataModule`.
    """

    def __init__(
        self,
        *,
        task: Task | list[Task] | None = None,
        shots: int | None = None,
        train_size: int = 1024,
        val_size: int = 256,
        test_size: int = 256,
        eval_seed: int = 1_000_003,
        shapes: Sequence[str] = SHAPES,
        categories: Literal["kind", "colour_and_kind"] = "kind",
        classes: list[str] | str | None = None,
        image_side: int = 112,
        max_shapes: int = 3,
        min_side: float = 0.2,
        max_side: float = 0.5,
        negative_fraction: float = 0.1,
        loose_boxes: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tasks = task if isinstance(task, list) else [task if task is not None else DetectionTask()]
        self.shots, self.train_size, self.val_size, self.test_size = shots, train_size, val_size, test_size
        self.eval_seed, self.shapes, self.image_side = eval_seed, tuple(shapes), image_side
        self.max_shapes, self.min_side, self.max_side = max_shapes, min_side, max_side
        self.negative_fraction, self.loose_boxes = negative_fraction, loose_boxes
        self.categories, self.classes = categories, classes
        self._check()
        self._drawn = self._wanted()
        self._categories = self._numbered()

    def samples(self, split: str) -> Sequence[Sample]:
        """See the base class."""
        if split == "train":
            if self.shots is not None:
                return self._few_shot(self.shots)
            return ShapeRows(self, split, range(self.train_size))
        return ShapeRows(self, split, range(self.val_size if split == "val" else self.test_size))

    def sample(self, split: str, index: int) -> Sample:
        """Row `index` of the endless stream of a split."""
        seed = self.seed if split == "train" else self.eval_seed
        rng = np.random.default_rng([seed, _SPLIT_NUMBERS[split], index])
        task = self.tasks[index % len(self.tasks)]
        shapes, target = self._question(task, rng)
        if split == "train" and self.loose_boxes > 1 and isinstance(target, DetectionTarget | GroundingTarget):
            target.boxes = self._loosen(target.boxes, rng)
        target.image_size = (self.image_side, self.image_side)
        return Sample(
            id=f"shapes/{seed}/{split}/{index}",
            image=render(shapes, self.image_side, rng),
            target=target,
            task=task,
            image_size=(self.image_side, self.image_side),
            image_id=_SPLIT_NUMBERS[split] * 10**9 + index,
        )

    def _few_shot(self, shots: int) -> Sequence[Sample]:
        """The first rows of the stream until every class has `shots`; so k shots contain k - 1 shots."""
        rows: list[int] = []
        counts: Counter[tuple[int, str]] = Counter()
        classes = sum(self._class_count(task) for task in self.tasks)
        index = 0
        while len(rows) < shots * classes:
            target = self.sample("train", index).target
            key = (index % len(self.tasks), _class_of(target))
            is_negative = isinstance(target, DetectionTarget) and len(target.boxes) == 0
            if counts[key] < shots and not is_negative:
                counts[key] += 1
                rows.append(index)
            index += 1
        return ShapeRows(self, "train", rows)

    def _question(self, task: Task, rng: np.random.Generator) -> tuple[list[Shape], Target]:
        if isinstance(task, ClassificationTask):
            shapes = self._layout(1, rng)
            return shapes, ClassTarget(shapes[0].name)
        shapes = self._layout(int(rng.integers(1, self.max_shapes + 1)), rng)
        if isinstance(task, DetectionTask):
            return shapes, self._detection(shapes, rng)
        counts = Counter(shape.name for shape in shapes)
        single = [shape for shape in shapes if counts[shape.name] == 1] or shapes[:1]
        chosen = single[int(rng.integers(len(single)))]
        drawn = shapes if counts[chosen.name] == 1 else [chosen]
        return drawn, GroundingTarget(as_boxes(chosen.box), expression=f"the {chosen.name}")

    def _detection(self, shapes: list[Shape], rng: np.random.Generator) -> DetectionTarget:
        names = [shape.kind if self.categories == "kind" else shape.name for shape in shapes]
        present = sorted(set(names))
        absent = sorted(set(self._categories) - set(present))
        ask_absent = bool(absent) and rng.random() < self.negative_fraction
        asked = str(rng.choice(absent if ask_absent else present))
        boxes = as_boxes([shape.box for shape, name in zip(shapes, names, strict=True) if name == asked])
        return DetectionTarget(boxes, category=asked, category_id=self._categories[asked])

    def _layout(self, count: int, rng: np.random.Generator) -> list[Shape]:
        """Up to `count` shapes whose boxes do not overlap; fewer when there is no room."""
        placed: list[Shape] = []
        for _ in range(20 * count):
            side = rng.uniform(self.min_side, self.max_side) * self.image_side
            width, height = side, side * rng.uniform(0.75, 1.0)
            x, y = rng.uniform(0, self.image_side - width), rng.uniform(0, self.image_side - height)
            box = (round(x, 1), round(y, 1), round(x + width, 1), round(y + height, 1))
            if any(_overlap(box, other.box) for other in placed):
                continue
            placed.append(Shape(*self._look(rng), box))
            if len(placed) == count:
                break
        return placed

    def _look(self, rng: np.random.Generator) -> tuple[str, str]:
        """Kind and colour of a shape."""
        if self.classes is None:  # two draws, by which the pictures of every split were always made
            return str(rng.choice(self.shapes)), str(rng.choice(list(COLOURS)))
        colour, kind = str(rng.choice(list(self._drawn.values()))).split()
        return kind, colour

    def _loosen(self, boxes: Any, rng: np.random.Generator) -> Any:
        factors = rng.uniform(1.0, self.loose_boxes, size=len(boxes))
        for row, factor in enumerate(factors):
            x1, y1, x2, y2 = boxes[row].tolist()
            dx, dy = (x2 - x1) * (factor - 1) / 2, (y2 - y1) * (factor - 1) / 2
            boxes[row] = boxes.new_tensor([x1 - dx, y1 - dy, x2 + dx, y2 + dy]).clamp(0, self.image_side)
        return boxes

    def _wanted(self) -> dict[int, str]:
        """Number -> combination of colour and kind that is drawn."""
        known = {number: name for number, name in enumerate(COMBINATIONS, 1) if name.split()[1] in self.shapes}
        sets = {title: [name for name in known.values() if name in names] for title, names in CLASS_SETS.items()}
        return select_classes(known, self.classes, Path(type(self).__name__), sets)

    def _numbered(self) -> dict[str, int]:
        """Category of detection -> its id."""
        if self.categories == "colour_and_kind":
            return {name: number for number, name in self._drawn.items()}
        drawn = {name.split()[1] for name in self._drawn.values()}
        return {kind: number for number, kind in enumerate(self.shapes, 1) if kind in drawn}

    def _class_count(self, task: Task) -> int:
        """How many classes the rows of a task have."""
        if isinstance(task, ClassificationTask):
            return len(self._drawn)
        if isinstance(task, DetectionTask):
            return len(self._categories)
        return len({name.split()[1] for name in self._drawn.values()})

    def _check(self) -> None:
        unknown = set(self.shapes) - set(SHAPES)
        if unknown or not self.shapes or len(set(self.shapes)) < len(self.shapes):
            raise ConfigConflictError(
                f"Expected shapes among {', '.join(SHAPES)}, each once, found {list(self.shapes)}."
            )
        if self.categories not in ("kind", "colour_and_kind"):
            raise ConfigConflictError(f"Expected categories kind or colour_and_kind, found {self.categories!r}.")
        if self.classes is not None and not self.classes:
            raise ConfigConflictError(
                f"Expected names such as 'red circle', the name of a set ({', '.join(CLASS_SETS)}) or null for all, "
                f"found classes={self.classes!r}."
            )
        if not 0 < self.min_side <= self.max_side <= 1:
            raise ConfigConflictError(
                f"Expected 0 < min_side <= max_side <= 1, found {self.min_side} and {self.max_side}."
            )
        if self.shots is not None and self.shots < 1:
            raise ConfigConflictError(f"Expected shots >= 1 or null, found {self.shots}.")
        if self.max_shapes < 1 or self.loose_boxes < 1 or not 0 <= self.negative_fraction < 1:
            raise ConfigConflictError(
                f"Expected max_shapes >= 1, loose_boxes >= 1 and 0 <= negative_fraction < 1, found "
                f"{self.max_shapes}, {self.loose_boxes} and {self.negative_fraction}."
            )


class ShapeRows(Sequence):
    """Rows of a split, rendered when they are asked for."""

    def __init__(self, data: ShapesDataModule, split: str, rows: Sequence[int]) -> None:
        self.data, self.split, self.rows = data, split, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return ShapeRows(self.data, self.split, self.rows[position])
        return self.data.sample(self.split, self.rows[position])


class CombinationTask(DetectionTask):
    """Detection of colour and kind in words that the shipped tiny policy was taught.

    It was taught to detect by kind and to ground by colour and kind, each in one wording of which it knows whole
    phrases, and answers no other. So "red circle" is asked for, thought about and answered as in grounding. Such boxes
    have no confidences; each counts as 1. `template` may use {category}.
    """

    default_template = GroundingTask.default_template.replace("{expression}", "the {category}")

    def solution(self, target: DetectionTarget, frame: CoordinateFrame) -> str:
        """See the base class; boxes as pairs of corners."""
        if len(target.boxes) == 0:
            return super().solution(target, frame)
        boxes = frame.from_pixels(target.boxes, solution_size(target)).tolist()
        return f"<answer>{','.join(f'({x1},{y1}),({x2},{y2})' for x1, y1, x2, y2 in boxes)}</answer>"

    def thought(self, target: DetectionTarget) -> str:
        """See the base class."""
        return f"I look for the {target.category}."


def render(shapes: Sequence[Shape], side: int, rng: np.random.Generator) -> Image.Image:
    """Draw shapes on a light background of a random tint, with smooth edges."""
    background = tuple(int(v) for v in rng.integers(205, 250, size=3))
    scale = _SUPERSAMPLING
    picture = Image.new("RGB", (side * scale, side * scale), background)
    draw = ImageDraw.Draw(picture)
    for shape in shapes:
        x1, y1, x2, y2 = (value * scale for value in shape.box)
        if shape.kind == "circle":
            draw.ellipse((x1, y1, x2 - 1, y2 - 1), fill=COLOURS[shape.colour])
        else:
            points = [(x1 + u * (x2 - x1), y1 + v * (y2 - y1)) for u, v in _OUTLINES[shape.kind]]
            draw.polygon(points, fill=COLOURS[shape.colour])
    return picture.resize((side, side), Image.Resampling.BOX)


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        radius = 1.0 if i % 2 == 0 else 0.45
        angle = -math.pi / 2 + i * math.pi / 5
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]


# Outlines in the unit square; each touches all four sides, so that the box is exact.
_OUTLINES = {
    "square": [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "star": _star(),
}


def _class_of(target: Target | None) -> str:
    if isinstance(target, ClassTarget):
        return target.label
    if isinstance(target, DetectionTarget):
        return target.category
    assert isinstance(target, GroundingTarget)
    return target.expression.split()[-1]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


__all__ = [
    "BASE_12",
    "CLASS_SETS",
    "COLOURS",
    "COMBINATIONS",
    "NOVEL_4",
    "SHAPES",
    "CombinationTask",
    "Shape",
    "ShapeRows",
    "ShapesDataModule",
    "render",
]
