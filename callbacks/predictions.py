"""PredictionWriter: what `rft predict` found, one JSON object per line, and drawn on the pictures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from rft_lightning.callbacks.figures import save_atomically
from rft_lightning.evaluation.rows import line_of, row_of
from rft_lightning.report.drawing import COLOURS, Drawn, draw_boxes
from rft_lightning.sample import Prediction


class PredictionWriter(Callback):
    """Writes the predictions of a prediction run as JSON lines, and their boxes drawn on the pictures.

    What a line of ``predictions.jsonl`` holds is described in :mod:`rft_lightning.evaluation.rows`. The file appears
    when the run is complete. With several processes each writes its own file, with its rank in the name. To ask about
    a labelled split, to be able to stop and go on, and to have it scored: ``rft evaluate``.

    ``drawn/`` then holds one picture per file with boxes, all answers about it in one, captioned with class and
    confidence; boxes are drawn on the stored file, without EXIF rotation. Small pictures are enlarged and large ones
    reduced. Several processes share the work, so they need a common folder.

    Args:
        output_dir: folder; the first logger's own folder, or the Trainer's root without a logger, when None.
        draw: whether to draw; "auto" draws unlabelled pictures only. Pictures that are no files (rendered ones) are not
            drawn.
    """

    def __init__(self, output_dir: str | Path | None = None, draw: bool | Literal["auto"] = "auto") -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.draw = draw
        self._folder = Path()
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The folder of a logger is chosen on rank zero.
        default = trainer.strategy.broadcast(str(trainer.log_dir or trainer.default_root_dir))
        self._folder = self.output_dir or Path(default)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = _partial(self._path(trainer)).open("w", encoding="utf-8", errors="surrogateescape")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[Prediction],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._file is not None
        for prediction in outputs:
            self._file.write(line_of(row_of(prediction)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print(f"predictions: {self.close(trainer)}")
        # The questions about a picture are dealt out over the processes: all their files must be there.
        trainer.strategy.barrier()
        self.draw_share(trainer)

    def close(self, trainer: Trainer) -> Path:
        """Put the finished file in its place."""
        assert self._file is not None
        self._file.close()
        path = self._path(trainer)
        os.replace(_partial(path), path)
        return path

    def draw_share(self, trainer: Trainer) -> None:
        """Draw this process's share of the pictures, with the boxes of all processes."""
        if not self.draw:
            return
        files = [self._path(trainer, rank) for rank in range(trainer.world_size)]
        drawings, folder = drawings_of(files, labelled=self.draw is True), self._folder / "drawn"
        for name in list(drawings)[trainer.global_rank :: trainer.world_size]:
            write_drawing(*drawings[name], folder / name)
        if drawings and trainer.is_global_zero:
            print(f"drawn: {folder} ({len(drawings)} pictures with boxes)")

    def _path(self, trainer: Trainer, rank: int | None = None) -> Path:
        rank = trainer.global_rank if rank is None else rank
        return self._folder / ("predictions.jsonl" if trainer.world_size == 1 else f"predictions-{rank}.jsonl")


def drawings_of(files: Sequence[Path], *, labelled: bool) -> dict[str, tuple[Path, list[Drawn]]]:
    """What to draw, by file name: a picture and all boxes that the predictions in `files` say of it.

    Args:
        files: files of JSON lines, as :class:`PredictionWriter` writes them.
        labelled: also draw pictures whose right answer is known.
    """
    drawings: dict[str, tuple[Path, list[Drawn]]] = {}
    names: dict[str, str] = {}
    colours: dict[str | None, str] = {}
    for row in _rows(files):
        if row["image"] is None or not row["boxes"] or (row["labelled"] and not labelled):
            continue
        colour = colours.setdefault(row["asked"], COLOURS[len(colours) % len(COLOURS)])
        name = names.get(row["image"]) or names.setdefault(row["image"], _free_name(str(row["image_id"]), drawings))
        boxes = drawings.setdefault(name, (Path(row["image"]), []))[1]
        for box, confidence in zip(row["boxes"], row["confidences"], strict=True):
            boxes.append(Drawn(box, f"{_short(row['asked'] or '')} {confidence:.2f}".strip(), colour))
    return drawings


def write_drawing(image: Path, boxes: Sequence[Drawn], target: Path) -> None:
    """Draw boxes on a picture file and write it as JPEG; a file that cannot be read any more is left out."""
    try:
        with Image.open(image) as opened:
            drawing = draw_boxes(opened, boxes)
    except OSError as error:
        rank_zero_warn(f"{image} is not drawn, it cannot be read: {error}")
        return
    save_atomically(target, lambda path: drawing.save(path, format="JPEG", quality=92, subsampling=0))


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        with file.open(encoding="utf-8", errors="surrogateescape") as lines:
            yield from map(json.loads, lines)


def _free_name(image_id: str, taken: Any) -> str:
    """A file name for a picture: its id without folders that could lead elsewhere, and numbered if that is taken."""
    stem = re.sub(r"\.\w{1,4}$", "", image_id.strip("/."))
    stem = re.sub(r"[^\w.-]+", "_", stem)[-120:] or "picture"
    name, number = f"{stem}.jpg", 2
    while name in taken:
        name, number = f"{stem}-{number}.jpg", number + 1
    return name


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


__all__ = ["PredictionWriter", "drawings_of", "write_drawing"]
