"""Samples as the model sees them: its picture, the question, the solution, and the boxes that the solution says.

The picture is rebuilt from the tensors that the processor made, and the boxes are placed by the numbers in the solution
text, read by the task: what an error in the frame or in the processor's settings does to them can be seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rft_lightning.frames import CoordinateFrame
from rft_lightning.prompts import PromptEncoder
from rft_lightning.report.drawing import Drawn, draw_boxes, font_of
from rft_lightning.sample import ClassTarget, GroundingTarget, PresenceTarget, Sample, Target

TRUTH, SOLUTION = "#2ca02c", "#ff7f0e"
_SIDE, _MARGIN, _LETTERS, _LINE = 480, 12, 14, 18  # pixels: of a picture, around it, of the text and its lines
_LONGEST = 900  # letters of a question or solution; what is longer is cut in the drawing
# All that ends a line by Unicode: the text layout refuses most of it within one.
_BREAKS = re.compile(r"\r\n|[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")


@dataclass(frozen=True)
class SeenSample:
    """A sample as the model sees it.

    Attributes:
        sample: the sample with its question and solution text.
        image: the picture that the processor's tensors hold; where these are tiles, the original one.
        whole: False where the model gets tiles.
        boxes: [K, 4] the boxes of the solution text, in pixels of `image`.
        truth: [K', 4] the boxes of the annotation, in pixels of `image`.
        label: the answer of the solution text, as the task reads it.
    """

    sample: Sample
    image: Image.Image
    whole: bool
    boxes: Tensor
    truth: Tensor
    label: str | None


def see(sample: Sample, encoder: PromptEncoder) -> SeenSample:
    """What the model gets of a sample."""
    completed = encoder.complete(sample)
    seen = seen_image(encoder.encode(completed), encoder.processor.image_processor)
    image = seen if seen is not None else completed.load_image()
    truth = _annotated(completed.target) * _ratio(image.size, completed.image_size)
    boxes, label = torch.zeros(0, 4), None
    if completed.target is not None:
        frame, size = encoder.frame, completed.image_size
        # A frame of the solution's own extent: the numbers come back as they are written.
        answer = completed.task.read(completed.target.solution_text or "", CoordinateFrame("pixel"), frame.size(size))
        unit = image.size if frame.kind == "resized" else frame.size(size)
        boxes, label = answer.boxes * _ratio(image.size, unit), answer.label
    return SeenSample(completed, image, seen is not None, boxes, truth, label)


def seen_image(encoded: dict[str, Tensor], images: Any) -> Image.Image | None:
    """The picture in the tensors of one prompt; None where they hold several tiles, or something unknown.

    Args:
        encoded: what the processor made of the prompt.
        images: its image processor, which knows the patch size, the mean and the deviation.
    """
    pixels = encoded["pixel_values"].float()
    if "image_grid_thw" in encoded:
        _, height, width = encoded["image_grid_thw"][0].tolist()
        patch, merge = images.patch_size, images.merge_size
        # Rows of patches, block by block of merge x merge; each patch: channel, frame of a video, row, column.
        blocks = pixels.reshape(height // merge, width // merge, merge, merge, 3, -1, patch, patch)[:, :, :, :, :, 0]
        pixels = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, height * patch, width * patch)
    if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        return None
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    colours = ((pixels[0] * deviation + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(colours.permute(1, 2, 0).contiguous().numpy())


def draw_sample(sample: Sample, encoder: PromptEncoder) -> Image.Image:
    """One sample: annotation green, solution orange, with question and solution below."""
    seen = see(sample, encoder)
    drawn = [Drawn(box, "", TRUTH, width=2) for box in seen.truth.tolist()]
    drawn += [Drawn(box, "", SOLUTION) for box in seen.boxes.tolist()]
    picture = draw_boxes(seen.image, drawn, side=_SIDE)
    font = font_of(_LETTERS)
    lines = [line for text in _texts(seen) for line in wrapped(text, font, _SIDE)]
    cell = Image.new("RGB", (_SIDE + 2 * _MARGIN, picture.height + _LINE * len(lines) + 3 * _MARGIN), "white")
    cell.paste(picture, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, picture.height + 2 * _MARGIN + number * _LINE), line, font=font, fill="black")
    return cell


def contact_sheet(rows: Sequence[tuple[str, Sequence[Sample]]], encoder: PromptEncoder) -> Image.Image:
    """A sheet with a row of samples under each heading."""
    drawn = [(heading, [draw_sample(sample, encoder) for sample in samples]) for heading, samples in rows]
    bar = 2 * _LINE
    width = max((sum(cell.width for cell in cells) for _, cells in drawn), default=_SIDE)
    heights = [bar + max((cell.height for cell in cells), default=0) for _, cells in drawn]
    sheet = Image.new("RGB", (width, bar + sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), bar
    legend = "green: annotation; orange: the solution text, read back and placed on the picture that the model gets"
    draw.text((_MARGIN, _MARGIN), legend, font=font_of(_LETTERS), fill="black")
    for (heading, cells), height in zip(drawn, heights, strict=True):
        draw.rectangle((0, top, width, top + bar - 6), fill="#dddddd")
        draw.text((_MARGIN, top + 5), heading, font=font_of(_LETTERS + 4), fill="black")
        left = 0
        for cell in cells:
            sheet.paste(cell, (left, top + bar))
            left += cell.width
        top += height
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The lines of a text, at most `width` pixels wide; a longer word is cut."""
    lines = []
    for paragraph in _BREAKS.split(text):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) > width and line:
                lines.append(line)
                longer = word
            while font.getlength(longer) > width:
                fits = next(n for n in range(len(longer) - 1, 0, -1) if n == 1 or font.getlength(longer[:n]) <= width)
                lines.append(longer[:fits])
                longer = longer[fits:]
            line = longer
        lines.append(line)
    return lines


def _texts(seen: SeenSample) -> list[str]:
    sample, size = seen.sample, seen.image.size
    shown = f"seen as {size[0]}x{size[1]}" if seen.whole else "seen in tiles"
    texts = [f"{sample.id}: {sample.image_size[0]}x{sample.image_size[1]} pixels, {shown}"]
    texts.append(f"Question: {_short(sample.question or '')}")
    if sample.target is not None:
        texts.append(f"Solution: {_short(sample.target.solution_text or '')}")
    if isinstance(sample.target, ClassTarget | PresenceTarget):
        texts.append(f"Read as: {seen.label}")
    elif sample.target is not None:
        texts.append(f"Read as: {len(seen.boxes)} of {len(seen.truth)} boxes")
    return texts


def _annotated(target: Target | None) -> Tensor:
    if target is None or isinstance(target, ClassTarget | PresenceTarget):
        return torch.zeros(0, 4, dtype=torch.float64)
    # The first box is the answer of a grounding target.
    return target.boxes[:1] if isinstance(target, GroundingTarget) else target.boxes


def _ratio(size: tuple[int, int], unit: tuple[int, int]) -> Tensor:
    """Factors from boxes in a picture of size `unit` to boxes in one of size `size`."""
    return torch.tensor([size[0] / unit[0], size[1] / unit[1]] * 2, dtype=torch.float64)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


__all__ = ["SeenSample", "contact_sheet", "draw_sample", "see", "seen_image", "wrapped"]
