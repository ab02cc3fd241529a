"""Boxes drawn on pictures with Pillow: fast, one picture in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

# Told apart on most pictures, and each readable under black or white letters.
COLOURS = ("#ff7f0e", "#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#17becf", "#e377c2", "#8c564b")
_LEAST, _MOST = 640, 2048  # pixels of the longer side of a drawing: small pictures are enlarged, huge ones reduced

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Drawn:
    """A box to draw: xyxy in pixels of the picture, in any order of its corners; caption, colour, width of the line."""

    box: Sequence[float]
    caption: str
    colour: str = COLOURS[0]
    width: int = 1


def draw_boxes(image: Image.Image, boxes: Sequence[Drawn], *, side: int | None = None) -> Image.Image:
    """A copy of a picture with its boxes and their captions.

    Args:
        image: the picture.
        boxes: what to draw.
        side: pixels of the longer side of the drawing; by default the picture's own, in limits between which captions
            can be read.
    """
    scale = min(max((side or _LEAST) / max(image.size), 1), (side or _MOST) / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    # Enlarged without smoothing, so that it is seen which pixels a box takes in.
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    canvas = image.convert("RGB").resize((width, height), resample)
    draw, line = ImageDraw.Draw(canvas), max(2, max(width, height) // 320)
    corners = [_corners(drawn.box, image.size, scale) for drawn in boxes]
    for drawn, frame in zip(boxes, corners, strict=True):
        draw.rectangle(frame, outline=drawn.colour, width=line * drawn.width)
    taken: list[Corners] = []
    for drawn, frame in zip(boxes, corners, strict=True):  # after all boxes: no line crosses a caption
        _caption(draw, drawn, frame, canvas.size, taken)
    return canvas


def _corners(box: Sequence[float], size: tuple[int, int], scale: float) -> Corners:
    """Corners on the canvas in order; models write absurd numbers now and then, which cannot be drawn."""
    side = max(size)
    x1, y1, x2, y2 = (min(max(number, -side), 2 * side) * scale for number in box)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _caption(
    draw: ImageDraw.ImageDraw, drawn: Drawn, frame: Corners, size: tuple[int, int], taken: list[Corners]
) -> None:
    """Above the box where there is room, else inside it; below the captions that are there, inside the picture."""
    if not drawn.caption:
        return
    font = font_of(max(14, max(size) // 45))
    left, top, right, bottom = draw.textbbox((0, 0), drawn.caption, font=font)
    width, height = right - left + 8, bottom - top + 6
    x = max(0, min(frame[0], size[0] - width))
    y = frame[1] - height if frame[1] >= height else frame[1]
    while any(a < x + width and x < c and b < y + height and y < d for a, b, c, d in taken):
        y += height
    y = max(0, min(y, size[1] - height))
    taken.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width, y + height), fill=drawn.colour)
    draw.text((x + 4 - left, y + 3 - top), drawn.caption, font=font, fill=_letters(drawn.colour))


def _letters(background: str) -> str:
    red, green, blue = ImageColor.getrgb(background)[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """A font of so many pixels: DejaVu Sans, which matplotlib brings: Latin, Greek and Cyrillic class names."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


__all__ = ["COLOURS", "Drawn", "draw_boxes", "font_of"]
