"""Figures of training runs as PNG files.

Drawn on Figure objects with the Agg canvas: no display, no global pyplot state, safe beside a training process.
matplotlib is imported where a figure is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUTH, ANSWER, WRONG = "#2ca02c", "#ff7f0e", "#d62728"
_SMALL = 256  # pixels; pictures up to this side are scaled up without smoothing, so that their pixels stay visible
_WIDTH, _HEADING = 3.6, 0.4  # inches of a column, and of the row of headings

Boxes = Sequence[Sequence[float]]


@dataclass
class Panel:
    """One picture of a grid.

    Attributes:
        image: the picture.
        title: lines above it.
        truth: ground-truth boxes xyxy in pixels of the picture, drawn green.
        answer: answered boxes, drawn orange.
        right: colours the title green (True) or red (False); None leaves it black.
    """

    image: Image.Image
    title: str
    truth: Boxes = ()
    answer: Boxes = ()
    right: bool | None = None


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path` and move the result over it: no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    save_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window, at the ends over the part of it that exists; of the length of `values`."""
    reach = window // 2
    parts = [values[max(0, position - reach) : position + reach + 1] for position in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def curve_figure(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Reward over optimiser steps, raw and smoothed, and the KL on a second axis if there is one.

    Args:
        curves: ``reward`` and optionally ``kl``: (step, value) in order.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimiser step", ylabel="reward")
    steps, rewards = [s for s, _ in curves["reward"]], [v for _, v in curves["reward"]]
    axes.plot(steps, rewards, color="#1f77b4", alpha=0.3, linewidth=1, label="reward")
    smooth = running_mean(rewards, max(3, len(rewards) // 10))
    axes.plot(steps, smooth, color="#1f77b4", linewidth=2, label="reward, smoothed")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    lines = list(axes.lines)
    if curves.get("kl"):
        other = axes.twinx()
        other.set_ylabel("KL to the reference model")
        lines += other.plot(*zip(*curves["kl"], strict=True), color="#7f7f7f", linestyle=":", label="KL")
    axes.legend(handles=lines, loc="best", frameon=False)
    return figure


def grid_figure(rows: Sequence[Sequence[Panel | None]], headings: Sequence[str]) -> Figure:
    """A grid of pictures, one row per picture; None leaves a place empty.

    Args:
        rows: panels, each row as long as `headings`.
        headings: one per column.
    """
    from matplotlib.figure import Figure

    heights = [_HEADING, *(_row_height(row) for row in rows)]
    figure = Figure(figsize=(_WIDTH * len(headings), sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), len(headings), squeeze=False, height_ratios=heights)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, heading in zip(axes[0], headings, strict=True):
        ax.text(0.5, 0.5, heading, ha="center", va="center", fontsize=11)
    for place, row in zip(axes[1:], rows, strict=True):
        for ax, panel in zip(place, row, strict=True):
            if panel is not None:
                _draw(ax, panel)
    if any(panel is not None and (panel.truth or panel.answer) for row in rows for panel in row):
        figure.supxlabel("green: ground truth; orange, dashed: answer", fontsize=8)
    return figure


def _row_height(row: Sequence[Panel | None]) -> float:
    """Inches for the tallest picture of a row and its title; very tall pictures are made narrower instead."""
    shapes = [panel.image.height / panel.image.width for panel in row if panel is not None]
    return _WIDTH * min(max(shapes, default=1.0), 1.5) + 0.6


def _draw(ax: Axes, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    small = max(panel.image.size) <= _SMALL
    width, height = panel.image.size
    # The extent puts pixel edges, not centres, on whole numbers: where boxes are measured.
    ax.imshow(panel.image, interpolation="nearest" if small else "antialiased", extent=(0, width, height, 0))
    side = max(width, height)
    for boxes, colour, style in ((panel.truth, TRUTH, "-"), (panel.answer, ANSWER, "--")):
        for box in boxes:
            # Models write absurd numbers now and then, which the canvas cannot draw.
            x1, y1, x2, y2 = (min(max(number, -side), 2 * side) for number in box)
            frame = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2, linestyle=style)
            ax.add_patch(frame)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    colour = "black" if panel.right is None else (TRUTH if panel.right else WRONG)
    ax.set_title(panel.title, fontsize=9, color=colour, parse_math=False)  # a model may write dollar signs


__all__ = ["Panel", "curve_figure", "grid_figure", "running_mean", "save_atomically", "save_figure"]
