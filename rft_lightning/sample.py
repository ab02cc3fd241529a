"""The typed things that move between rooms: from an annotated picture to a scored answer.

Boxes of targets and answers are float64 xyxy in pixels of the original image; what a model writes is bridged by
:class:`rft_lightning.frames.CoordinateFrame` and nowhere else.

Shape legend: B prompts, G completions per prompt, P prompt tokens, C completion tokens, K boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rft_lightning.errors import DatasetNotFoundError
from rft_lightning.masks import Region, paint

if TYPE_CHECKING:
    from rft_lightning.frames import CoordinateFrame
    from rft_lightning.tasks.base import Task

NOT_COUNTED = -1
# The tensors of PromptBatch.vision with one entry per token [B, P]; others have one per image or per row of pixels.
TOKEN_TENSORS = ("mm_token_type_ids", "token_type_ids")

BoxesLike = Tensor | Sequence[Sequence[float]] | Sequence[float]


def as_boxes(boxes: BoxesLike | None) -> Tensor:
    """Any box list (or one bare box of 4 numbers, or None) as a float64 tensor [K, 4].

    Raises:
        ValueError: the numbers do not form boxes of four.
    """
    if boxes is None:
        return torch.zeros(0, 4, dtype=torch.float64)
    tensor = torch.as_tensor(boxes, dtype=torch.float64)
    if tensor.ndim == 2 and tensor.shape[1] == 4:
        return tensor
    if tensor.numel() == 0:
        return tensor.new_zeros(0, 4)
    if tensor.ndim == 1 and len(tensor) == 4:
        return tensor[None]
    raise ValueError(f"Expected boxes of shape [K, 4] (x1, y1, x2, y2 in pixels), found {list(tensor.shape)}.")


@dataclass
class ClassTarget:
    """The right class of a picture.

    Attributes:
        label: the class name, as the data set spells it.
        aliases: other spellings that count as right under the strict rules.
        image_size: (width, height) of the original image in pixels; not needed by classification rewards.
        solution_text: the answer as the published data writes it; only ``rules: published_code`` reads it.
    """

    label: str
    aliases: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    solution_text: str | None = None


@dataclass
class DetectionTarget:
    """All boxes of one category in a picture; no boxes means the category is absent.

    Attributes:
        boxes: [K, 4] float64 xyxy in pixels of the original image.
        category: name of the category that the question asks for.
        category_id: the data set's own id of the category, for results files.
        areas: [K] object areas in square pixels (COCO's ``area``: mask area); box areas when not given.
        ignore_boxes: [K', 4] regions (crowds) where an answer is neither right nor wrong in evaluation; never in the
            solution and never read by a reward.
        ignore_areas: [K'] their areas.
        image_size: (width, height) of the original image.
        solution_text: the answer as the published data writes it; only ``rules: published_code`` reads it.
        not_exhaustive: more objects of the category may be in the picture than have boxes (LVIS): in evaluation a
            detection that matches none of them is neither right nor wrong.
        frequency: how frequent the category is, where the data set says so (LVIS: r, c or f).
    """

    boxes: Tensor
    category: str = ""
    category_id: int = 0
    areas: Tensor | None = None
    ignore_boxes: Tensor | None = None
    ignore_areas: Tensor | None = None
    image_size: tuple[int, int] | None = None
    solution_text: str | None = None
    not_exhaustive: bool = False
    frequency: str | None = None

    def __post_init__(self) -> None:
        self.boxes, self.areas = _with_areas(self.boxes, self.areas)
        self.ignore_boxes, self.ignore_areas = _with_areas(self.ignore_boxes, self.ignore_areas)


@dataclass
class GroundingTarget:
    """The object an expression refers to.

    Attributes:
        boxes: [K, 4] float64 xyxy in pixels of the original image; the first one is the answer.
        expression: the referring expression or instruction.
        image_size: (width, height) of the original image.
        solution_text: the answer as the published data writes it; only ``rules: published_code`` reads it.
        regions: polygons of the object and of what is not scored, where the data set has masks; see :meth:`mask`.
    """

    boxes: Tensor
    expression: str = ""
    image_size: tuple[int, int] | None = None
    solution_text: str | None = None
    regions: tuple[Region, ...] = ()

    def __post_init__(self) -> None:
        self.boxes = as_boxes(self.boxes)

    def mask(self) -> np.ndarray | None:
        """[H, W] uint8: 1 the object, 0 the rest, 255 not scored; painted at every call. None without `regions`.

        Raises:
            ValueError: there are regions, but no image size.
        """
        if not self.regions:
            return None
        if self.image_size is None:
            raise ValueError("A mask needs the image size; set the target's image_size=(width, height).")
        return paint(self.regions, self.image_size)


@dataclass
class PresenceTarget:
    """Whether a picture shows an object of a category: the first of the two stages of the paper's detection protocol.

    Attributes:
        present: it does; crowds count.
        category: name of the category that the question asks for.
        category_id: the data set's own id of the category.
        image_size: (width, height) of the original image in pixels.
        solution_text: the answer as it is taught; the task writes it.
    """

    present: bool
    category: str = ""
    category_id: int = 0
    image_size: tuple[int, int] | None = None
    solution_text: str | None = None


Target = ClassTarget | DetectionTarget | GroundingTarget | PresenceTarget


class MaskField:
    """A field that is given a mask, None, or a function that makes the mask whenever it is read.

    What is made is not kept: masks in memory are hundreds of times as large as those of a file.
    """

    def __get__(self, answer: Answer | None, owner: type | None = None) -> np.ndarray | None:
        held = None if answer is None else vars(answer)["mask"]  # of the class itself: the field's default
        return held() if callable(held) else held

    def __set__(self, answer: Answer, mask: np.ndarray | Callable[[], np.ndarray] | None) -> None:
        vars(answer)["mask"] = mask


@dataclass
class Answer:
    """What a completion says, in the unit of the targets.

    Attributes:
        text: the completion as written.
        label: the text of the (first) answer block, stripped.
        boxes: [K, 4] float64 xyxy in pixels of the original image; entries that are no four numbers are left out, boxes
            without area (x1 >= x2) are kept, since they are answers, and wrong ones.
        confidences: [K] float64 in [0, 1]; 1 where the model gave none.
        thought: the text of the think block, if any.
        well_formed: exactly one think block followed by exactly one answer block and nothing else.
        no_objects: the answer states that there is nothing ("No Objects" or an empty list); None means: it has no text
            and no boxes.
        answer_blocks: number of answer blocks in the text.
        parsed: the answer could be read as one of its kind (boxes, "No Objects", a label); None means: it has boxes,
            states that there is nothing, or has a label without problems.
        problems: what was wrong with the text, in words, each with a `kind` to count it by (see
            :data:`rft_lightning.answers.PROBLEM_KINDS`); empty for a clean answer.
        points: [K', 2] float64 (x, y) in pixels of the original image, where the answer is written in points.
        mask: [H, W] bool of the original image: what a system that segments says the object is; None without one. It
            may be given as a function, see :class:`MaskField`.
        num_tokens: length of the completion in tokens, its end of sequence included; None where it is not known.
        token_limit: most tokens that the completion could have; None where it is not known.
        truncated: the limit came before an end of sequence.
    """

    text: str = ""
    label: str | None = None
    boxes: Tensor = field(default_factory=lambda: torch.empty(0, 4, dtype=torch.float64))
    confidences: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    thought: str | None = None
    well_formed: bool = False
    no_objects: bool | None = None
    answer_blocks: int = 1
    parsed: bool | None = None
    problems: tuple[str, ...] = ()
    points: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.float64))
    mask: MaskField = MaskField()
    num_tokens: int | None = None
    token_limit: int | None = None
    truncated: bool = False

    @property
    def has_mask(self) -> bool:
        """Whether there is a mask, without making it."""
        return vars(self)["mask"] is not None

    def __post_init__(self) -> None:
        self.boxes = as_boxes(self.boxes)
        self.points = torch.as_tensor(self.points, dtype=torch.float64).reshape(-1, 2)
        confidences = torch.as_tensor(self.confidences, dtype=torch.float64).reshape(-1)
        count = len(self.boxes)
        if len(confidences) == 0 and count:
            confidences = torch.ones(count, dtype=torch.float64)
        if len(confidences) != count:
            raise ValueError(f"Expected one confidence per box, found {len(confidences)} for {count} boxes.")
        self.confidences = confidences
        if self.no_objects is None:
            self.no_objects = not self.text and self.label is None and count == 0
        if self.parsed is None:
            self.parsed = count > 0 or self.no_objects or bool(self.label and not self.problems)


@dataclass
class Sample:
    """One question about one picture.

    Attributes:
        id: unique in its data set and stable over runs and machines; seeds the sampling noise.
        image: the picture (RGB), or the path it is read from when it is needed.
        target: the right answer, or None for unlabelled pictures.
        task: how to ask, read and reward.
        image_size: (width, height) of the original image in pixels.
        image_id: id of the picture in its data set; several samples may share one picture.
        question: the user turn without the image; the PromptEncoder asks the task for it when it is None.
        occurrence: how often this sample already occurred in the same global rollout batch; NOT_COUNTED where it only
            keeps a process company in an evaluation with fewer rows than processes.
        asked: the class or expression that `question` asks for, where no target says it; a caption, never a prompt.
    """

    id: str
    image: Image.Image | Path
    target: Target | None
    task: Task
    image_size: tuple[int, int]
    image_id: int | str = 0
    question: str | None = None
    occurrence: int = 0
    asked: str | None = None

    def load_image(self) -> Image.Image:
        """The picture as RGB, at its original size and without EXIF rotation (annotations do not apply it).

        Raises:
            DatasetNotFoundError: the file is gone or is no picture.
        """
        try:
            if isinstance(self.image, Image.Image):
                return as_rgb(self.image)
            with Image.open(self.image) as image:
                return as_rgb(image)
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # all of them Pillow's
            raise DatasetNotFoundError(
                f"Sample {self.id!r}: the image {self.image} cannot be read ({error}). "
                "Restore the file, remove its annotation, or set data.on_bad_image to skip."
            ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB; 16-bit grey ones are scaled, which Pillow would cut off at 255."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64) // 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Features:
    """The features of the images of one prompt, as the vision tower of a family gives them.

    Attributes:
        pooled: what stands in place of the image tokens: [tokens, D] per image, or [tiles, tokens, D].
        deep: the same for each further decoder layer that takes features (deepstack).
    """

    pooled: Sequence[Tensor] | Tensor
    deep: Sequence[Sequence[Tensor]]


@dataclass
class PromptBatch:
    """B encoded prompts, left-padded, with the samples they come from.

    Attributes:
        input_ids: [B, P] token ids.
        attention_mask: [B, P] 1 on tokens, 0 on the padding to the left.
        vision: the processor's other tensors, as the model takes them: ``mm_token_type_ids`` or ``token_type_ids``
            [B, P] where the family has them; ``pixel_values``, and what describes each image (``image_grid_thw``,
            ``image_sizes``), concatenated in the order of the prompts.
        image_counts: number of images of each prompt.
        patch_counts: number of rows of ``pixel_values`` of each prompt: patches in the Qwen families, tiles in others.
        samples: the B samples, questions and solution texts filled in.
        frame: the frame in which the model writes coordinates.
        positions: rope positions of the prompts, [3, B, P] or [B, P], once they were worked out
            (:func:`rft_lightning.policy.prompt_inputs.prepared`).
        features: of each prompt's images, once they were worked out; only where no training changes them.
        waves: equal parts, behind one another, of which training rolls out the second and later ones only if the ones
            before gave too few groups to learn from (dynamic sampling).
    """

    input_ids: Tensor
    attention_mask: Tensor
    vision: dict[str, Tensor]
    image_counts: list[int]
    patch_counts: list[int]
    samples: list[Sample]
    frame: CoordinateFrame
    positions: Tensor | None = None
    features: list[Features] | None = None
    waves: int = 1

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        lengths: list[int] = self.attention_mask.sum(1).tolist()
        return lengths

    def to(self, device: torch.device | str, **kwargs: Any) -> PromptBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, **kwargs))

    def _map(self, function: Any) -> PromptBatch:
        mapped = replace(
            self,
            input_ids=function(self.input_ids),
            attention_mask=function(self.attention_mask),
            vision={name: function(tensor) for name, tensor in self.vision.items()},
            positions=None if self.positions is None else function(self.positions),
            features=None,
        )
        mapped.__dict__["lengths"] = self.lengths  # counted where the tensors were, before any device holds them
        return mapped

    def select(self, start: int, stop: int) -> PromptBatch:
        """Prompts `start` to `stop`, with the padding columns that none of them needs removed."""
        patches = slice(sum(self.patch_counts[:start]), sum(self.patch_counts[:stop]))
        images = slice(sum(self.image_counts[:start]), sum(self.image_counts[:stop]))
        return self._cut(list(range(len(self)))[start:stop], slice(start, stop), patches, images)

    def take(self, prompts: Sequence[int]) -> PromptBatch:
        """The prompts of these numbers in this order; unlike :meth:`select` it copies their pictures."""
        patches = _spans(self.patch_counts, prompts, self.input_ids.device)
        images = _spans(self.image_counts, prompts, self.input_ids.device)
        return self._cut(
            prompts, torch.tensor(prompts, dtype=torch.long, device=self.input_ids.device), patches, images
        )

    def _cut(self, prompts: Sequence[int], rows: Any, patches: Any, images: Any) -> PromptBatch:
        """The prompts of these numbers; the others are the same choice as indices of tensors."""
        lengths = [self.lengths[prompt] for prompt in prompts]
        columns = slice(self.attention_mask.shape[1] - max(lengths, default=0), None)

        def cut(name: str, tensor: Tensor) -> Tensor:
            if name in TOKEN_TENSORS:
                return tensor[rows][:, columns]
            return tensor[patches if name == "pixel_values" else images]

        part = replace(
            self,
            input_ids=self.input_ids[rows][:, columns],
            attention_mask=self.attention_mask[rows][:, columns],
            positions=None if self.positions is None else self.positions[..., rows, columns],
            vision={name: cut(name, tensor) for name, tensor in self.vision.items()},
            image_counts=[self.image_counts[prompt] for prompt in prompts],
            patch_counts=[self.patch_counts[prompt] for prompt in prompts],
            samples=[self.samples[prompt] for prompt in prompts],
            features=None if self.features is None else [self.features[prompt] for prompt in prompts],
            waves=1,
        )
        part.__dict__["lengths"] = lengths
        return part

    def chunks(self, size: int) -> list[PromptBatch]:
        """The batch cut into pieces of at most `size` prompts."""
        return [self.select(start, min(start + size, len(self))) for start in range(0, len(self), size)]


@dataclass
class Rollouts:
    """G sampled completions for each of B prompts.

    Attributes:
        prompts: the B prompts.
        completion_ids: [B, G, C] sampled token ids, right-padded.
        completion_mask: [B, G, C] True up to and including the end-of-sequence token.
        texts: B lists of G decoded completions, special tokens left out.
        truncated: [B, G] True where the length limit came before an end-of-sequence token.
        logprobs: [B, G, C] float32 log-probs of the sampled tokens under the policy at the sampling temperature,
            nothing truncated or forbidden; 0 on padding. None if the engine does not return them.
    """

    prompts: PromptBatch
    completion_ids: Tensor
    completion_mask: Tensor
    texts: list[list[str]]
    truncated: Tensor
    logprobs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def lengths(self) -> list[list[int]]:
        """[B][G] tokens of each completion."""
        lengths: list[list[int]] = self.completion_mask.sum(-1).tolist()
        return lengths

    def select(self, start: int, stop: int) -> Rollouts:
        """The groups of prompts `start` to `stop`, without the columns none of them needs."""
        numbers = range(len(self))[start:stop]
        return self._cut(self.prompts.select(start, stop), slice(start, stop), numbers)

    def take(self, prompts: Sequence[int]) -> Rollouts:
        """The groups of the prompts of these numbers in this order, without the columns none of them needs."""
        rows = torch.tensor(prompts, dtype=torch.long, device=self.completion_ids.device)
        return self._cut(self.prompts.take(prompts), rows, prompts)

    def _cut(self, prompts: PromptBatch, rows: Any, numbers: Sequence[int]) -> Rollouts:
        lengths = [self.lengths[number] for number in numbers]
        width = max([1, *(max(group) for group in lengths)]) if lengths else 0
        part = Rollouts(
            prompts,
            self.completion_ids[rows][:, :, :width],
            self.completion_mask[rows][..., :width],
            [self.texts[number] for number in numbers],
            self.truncated[rows],
            None if self.logprobs is None else self.logprobs[rows][:, :, :width],
        )
        part.__dict__["lengths"] = lengths
        return part


@dataclass
class Prediction:
    """A completion on a validation, test or prediction sample, read and ready to be scored or written.

    Attributes:
        sample: the sample (its picture included, as an image or a path).
        text: the completion as written.
        answer: the completion as read.
        index: which completion of the sample this is (0 for greedy decoding).
        texts: all completions, where this one was chosen from several.
        unasked: the question was not asked, since a presence map ruled it out; the answer is empty.
    """

    sample: Sample
    text: str
    answer: Answer
    index: int = 0
    texts: tuple[str, ...] = ()
    unasked: bool = False

    @property
    def target(self) -> Target | None:
        """The sample's target."""
        return self.sample.target


def unasked(sample: Sample) -> Prediction:
    """What counts as the answer to a question that was not asked: nothing."""
    return Prediction(sample, "", Answer(no_objects=True, parsed=False), unasked=True)


def _spans(counts: Sequence[int], prompts: Sequence[int], device: torch.device) -> Tensor:
    """Rows of a tensor that holds `counts` rows per prompt, for these prompts in this order."""
    starts = [0, *accumulate(counts)]
    return torch.tensor([row for p in prompts for row in range(starts[p], starts[p + 1])], device=device)


def _with_areas(boxes: BoxesLike | None, areas: Any) -> tuple[Tensor, Tensor]:
    boxes = as_boxes(boxes)
    if areas is None:
        return boxes, (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    areas = torch.as_tensor(areas, dtype=torch.float64).reshape(-1)
    if len(areas) != len(boxes):
        raise ValueError(f"Expected one area per box, found {len(areas)} for {len(boxes)} boxes.")
    return boxes, areas


__all__ = [
    "Answer",
    "ClassTarget",
    "DetectionTarget",
    "GroundingTarget",
    "Prediction",
    "PresenceTarget",
    "PromptBatch",
    "Region",
    "Rollouts",
    "Sample",
    "Target",
    "as_boxes",
    "unasked",
]
