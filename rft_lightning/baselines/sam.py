"""SAM without a detector: what the segmenter is worth by itself, and with a perfect box."""

from __future__ import annotations

from typing import Literal

from rft_lightning.baselines.base import BaselineModule, SampleBatch
from rft_lightning.errors import ConfigConflictError
from rft_lightning.sample import Answer, GroundingTarget, Sample
from rft_lightning.segmenter import Segmenter, box_of_mask

PROMPTS = ("centre", "annotated_box")


class SAM(BaselineModule):
    """SAM (Kirillov et al. 2023, arXiv 2304.02643), which understands no language: two ends of a scale.

    ``prompt: centre`` marks the middle of the picture whatever is asked: what a system gets that does not read the
    question. ``prompt: annotated_box`` marks the right answer: no result of a system, but the most that systems can
    expect which prompt this segmenter with a box; tables call it "SAM (annotated box)". The box of the answer is the
    one around the mask.

    Args:
        checkpoint: hub id or folder of SAM or SAM 2, weights in safetensors files.
        prompt: ``centre`` or ``annotated_box``.
        dtype: float32, bfloat16 or float16, of weights and computation.
        batch_size: pictures segmented at once.

    Raises:
        ConfigConflictError: an argument is out of its range.
    """

    tasks = ("grounding",)

    def __init__(
        self,
        checkpoint: str = "facebook/sam-vit-huge",
        *,
        prompt: Literal["centre", "annotated_box"] = "centre",
        dtype: str = "float32",
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        if prompt not in PROMPTS:
            raise ConfigConflictError(f"Expected prompt to be one of {', '.join(PROMPTS)}, found {prompt!r}.")
        self.checkpoint, self.prompt = checkpoint, prompt
        self.segmenter = Segmenter(checkpoint, dtype=dtype, batch_size=batch_size)

    @property
    def name(self) -> str:
        """What tables call it: the annotated box is no result of a system, and its name says so."""
        return "SAM" if self.prompt == "centre" else "SAM (annotated box)"

    def answers(self, batch: SampleBatch) -> list[Answer]:
        """See the base class."""
        segmenter = self.segmenter.to(self.device)
        if self.prompt == "centre":
            masks = segmenter.masks(batch.images, points=[(i.width / 2, i.height / 2) for i in batch.images])
        else:
            masks = segmenter.masks(batch.images, [_annotated_box(sample) for sample in batch.samples])
        return [Answer(boxes=box_of_mask(mask), mask=mask) for mask in masks]


def _annotated_box(sample: Sample) -> list[float]:
    if not isinstance(sample.target, GroundingTarget) or len(sample.target.boxes) == 0:
        raise ConfigConflictError(
            f"model.prompt is annotated_box, but sample {sample.id!r} has no annotated box. Take a data set with "
            "annotations, or prompt: centre."
        )
    box: list[float] = sample.target.boxes[0].tolist()
    return box


__all__ = ["SAM"]
