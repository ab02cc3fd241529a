"""CoordinateFrame: the only bridge between the numbers a model writes and pixels of the original image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from rft_lightning.sample import BoxesLike, as_boxes


@dataclass(frozen=True)
class CoordinateFrame:
    """How a model family writes box coordinates.

    - ``relative``: 0 to `extent` over the width and over the height (Qwen2-VL and Qwen3-VL: 0 to 1000).
    - ``resized``: pixels of the image after the processor resized it (Qwen2.5-VL).
    - ``pixel``: pixels of the original image.

    Attributes:
        kind: one of the three above.
        extent: upper end of the range of a relative frame.
        factor: the resized sides are multiples of this (patch size times merge size); resized frames only.
        min_pixels: least number of pixels after resizing; resized frames only.
        max_pixels: greatest number of pixels after resizing; resized frames only.
    """

    kind: Literal["relative", "resized", "pixel"] = "relative"
    extent: int = 1000
    factor: int = 28
    min_pixels: int = 56 * 56
    max_pixels: int = 14 * 14 * 4 * 1280

    def __post_init__(self) -> None:
        if self.kind not in ("relative", "resized", "pixel"):
            raise ValueError(f"Expected kind relative, resized or pixel, found {self.kind!r}.")

    def size(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) of the frame for an image of `image_size` (width, height) pixels."""
        if self.kind == "relative":
            return self.extent, self.extent
        if image_size is None:
            raise ValueError(f"A {self.kind} frame needs the image size, found None; set the target's image_size.")
        if self.kind == "pixel":
            return image_size
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        width, height = image_size
        height, width = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        return width, height

    def to_pixels(self, boxes: BoxesLike, image_size: tuple[int, int]) -> Tensor:
        """Boxes [K, 4] as written -> float64 xyxy in pixels of the original image; nothing is clipped."""
        pixels, units = _sides(self, image_size and (image_size[0], image_size[1]))
        return as_boxes(boxes) * pixels / units  # in this order the frame's border is the picture's, exactly

    def from_pixels(self, boxes: BoxesLike, image_size: tuple[int, int]) -> Tensor:
        """Boxes [K, 4] in pixels -> int64 numbers as the model should write them.

        Rounded to the nearest integer and clamped to the frame. A side that rounds to nothing becomes the one unit that
        its middle lies in, so that a small object does not vanish, and neither corner moves by more than a unit.
        """
        size = self.size(image_size)
        pixels, units = _sides(self, image_size and (image_size[0], image_size[1]))
        boxes = as_boxes(boxes) * units / pixels
        written = boxes.round().long()
        for axis, extent in enumerate(size):
            low, high = written[:, axis].clamp(0, extent), written[:, axis + 2].clamp(0, extent)
            middle = ((boxes[:, axis] + boxes[:, axis + 2]) / 2).floor().long().clamp(0, extent - 1)
            flat = low >= high
            written[:, axis] = torch.where(flat, middle, low)
            written[:, axis + 2] = torch.where(flat, middle + 1, high)
        return written

    def inside(self, boxes: BoxesLike, image_size: tuple[int, int]) -> Tensor:
        """[K] True where a box as written lies within the frame."""
        _, units = _sides(self, image_size and (image_size[0], image_size[1]))
        boxes = as_boxes(boxes)
        return ((boxes >= 0) & (boxes <= units)).all(1)

    def describe(self) -> str:
        """The range in the words of the question; a numeric range is stated for relative frames only."""
        return f"between 0 and {self.extent}, integer" if self.kind == "relative" else "in pixels of the image, integer"


# Every answer to a question asks for the same; nobody writes into the tensors.
@lru_cache(maxsize=64)
def _sides(frame: CoordinateFrame, image_size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Width, height, width, height of the image in pixels, and of the frame in its units."""
    size = frame.size(image_size)
    if image_size is None:
        raise ValueError("Expected the image size in pixels, found None; set image_size=(width, height).")
    pixels, units = torch.tensor([[*image_size, *image_size], [*size, *size]], dtype=torch.float64)
    return pixels, units
