"""Segmenter: masks from boxes or points, by SAM or SAM 2.

Shape legend: N pictures, H rows and W columns of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from rft_lightning.boxes import valid_boxes
from rft_lightning.errors import ConfigConflictError
from rft_lightning.pretrained import check_dtype, load_pretrained
from rft_lightning.sample import Answer, BoxesLike, as_boxes

# The published SAM 2 checkpoints state the type of their video model, whose image part Sam2Model is.
MODELS = {
    "sam": ("SamModel", "SamProcessor"),
    "sam2": ("Sam2Model", "Sam2Processor"),
    "sam2_video": ("Sam2Model", "Sam2Processor"),
}


class Segmenter:
    """Segments what a box or a point marks: one prompt and one mask per picture (SAM's multimask output is off).

    Visual-RFT's evaluation makes masks of its boxes so, with SAM ViT-H (Kirillov et al. 2023, arXiv 2304.02643); SAM 2
    is that of Ravi et al. 2024 (arXiv 2408.00714). The model is loaded when it is first needed, and a picture's mask
    does not depend on the pictures it shares a batch with, but for rounding.

    Args:
        checkpoint: hub id or folder of a SAM or SAM 2 model, weights in safetensors files.
        dtype: float32, bfloat16 or float16, of weights and computation. In bfloat16 box corners are rounded to a few
            pixels.
        batch_size: pictures segmented at once.

    Raises:
        ConfigConflictError: an argument is out of its range.
    """

    def __init__(
        self, checkpoint: str = "facebook/sam-vit-huge", *, dtype: str = "float32", batch_size: int = 8
    ) -> None:
        check_dtype(dtype)
        if batch_size < 1:
            raise ConfigConflictError(f"Expected batch_size >= 1, found {batch_size}.")
        self.checkpoint, self.dtype, self.batch_size = checkpoint, dtype, batch_size
        self.device = torch.device("cpu")
        self._model: Any = None
        self._processor: Any = None

    def to(self, device: torch.device | str) -> Segmenter:
        """Compute on `device` from now on; returns itself."""
        self.device = torch.device(device)
        if self._model is not None:
            self._model.to(self.device)
        return self

    def masks(
        self,
        images: Sequence[Image.Image],
        boxes: BoxesLike | None = None,
        *,
        points: Sequence[tuple[float, float]] | None = None,
    ) -> list[np.ndarray]:
        """The mask of what is marked in each of N pictures.

        Args:
            images: N pictures, RGB.
            boxes: [N, 4] xyxy, a box for each picture, in its pixels.
            points: N points (x, y) on the objects instead, in pixels.

        Returns:
            N arrays [H, W] of bool, each of the size of its picture.

        Raises:
            ValueError: there is not one box or one point per picture, or its numbers are not finite.
            CheckpointError: the checkpoint cannot be loaded, or is neither SAM nor SAM 2.
        """
        if (boxes is None) == (points is None):
            raise ValueError("Expected boxes or points, one of them; found both or neither.")
        marks = as_boxes(boxes) if points is None else torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
        if len(marks) != len(images) or not bool(marks.isfinite().all()):
            raise ValueError(
                f"Expected one box or point of finite numbers per picture, found {len(marks)} for {len(images)} "
                f"pictures: {marks.tolist()[:4]}."
            )
        found: list[np.ndarray] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self._segment(list(images[part]), marks[part].tolist())
        return found

    @torch.no_grad()
    def _segment(self, images: list[Image.Image], marks: list[list[float]]) -> list[np.ndarray]:
        if self._model is None:
            model, self._processor = load_pretrained(self.checkpoint, MODELS, dtype=self.dtype)
            self._model = model.to(self.device)
        if len(marks[0]) == 4:
            prompts: dict[str, Any] = {"input_boxes": [[mark] for mark in marks]}
        else:
            prompts = {"input_points": [[[mark]] for mark in marks], "input_labels": [[[1]] for _ in marks]}
        inputs = self._processor(images=images, return_tensors="pt", **prompts)
        # Sizes before and, for SAM, after resizing; pictures of SAM are then padded to a square.
        sizes = [inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
        moved = {
            name: tensor.to(self.device, self._model.dtype if name == "pixel_values" else _plain(tensor))
            for name, tensor in inputs.items()
        }
        with torch.autocast(self.device.type, enabled=False):
            logits = self._model(**moved, multimask_output=False).pred_masks
        masks = self._processor.post_process_masks(logits.float().cpu(), *(size.tolist() for size in sizes))
        return [mask[0, 0].numpy() for mask in masks]


def as_segmenter(value: Segmenter | str) -> Segmenter:
    """A segmenter, or the default one of a checkpoint."""
    return Segmenter(value) if isinstance(value, str) else value


def add_masks(
    answers: Sequence[Answer], images: Sequence[Image.Image], segmenter: Segmenter, *, whole_pixels: bool = False
) -> None:
    """Give answers, in place, the mask of their first box; an empty one where that box is missing or has no area.

    Args:
        answers: N answers, boxes in pixels of the pictures.
        images: the N pictures, RGB.
        segmenter: makes the masks.
        whole_pixels: cut off the fractions of the corners first, as Visual-RFT's evaluation does.
    """
    for answer, image in zip(answers, images, strict=True):
        answer.mask = np.zeros((image.height, image.width), dtype=bool)
    found = [(answer, image) for answer, image in zip(answers, images, strict=True) if _has_box(answer)]
    if not found:
        return
    boxes = torch.stack([answer.boxes[0] for answer, _ in found])
    masks = segmenter.masks([image for _, image in found], boxes.trunc() if whole_pixels else boxes)
    for (answer, _), mask in zip(found, masks, strict=True):
        answer.mask = mask


def _has_box(answer: Answer) -> bool:
    return bool(valid_boxes(answer.boxes[:1]).any())


def box_of_mask(mask: np.ndarray) -> torch.Tensor:
    """[1, 4] float64 xyxy: the smallest box around the pixels of a mask [H, W], their far edges included.

    [0, 4] for a mask without any.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return as_boxes(None)
    return as_boxes([float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)])


def _plain(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of a prompt on the device: SAM's processor makes float64, which not every device has."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


__all__ = ["Segmenter", "add_masks", "as_segmenter", "box_of_mask"]
