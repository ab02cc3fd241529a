"""PredictionWriter: what `rft predict` found, one JSON object per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from rft_lightning.sample import Prediction


class PredictionWriter(Callback):
    """Writes the predictions of a prediction run as JSON lines.

    Each line holds ``id``, ``image_id``, ``image`` (its path, if it has one), ``image_size`` [width, height],
    ``question``, ``text`` (as written), ``label``, ``boxes`` (xyxy in pixels of the original image), ``confidences``,
    ``parsed`` and ``problems``. With several processes each writes its own file, with its rank in the name. The file
    appears when the run is complete.

    Args:
        output_dir: folder; the first logger's own folder, or the Trainer's root without a logger, when None.
    """

    def __init__(self, output_dir: str | Path | None = None) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._path: Path | None = None
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The folder of a logger is chosen on rank zero.
        default = trainer.strategy.broadcast(str(trainer.log_dir or trainer.default_root_dir))
        folder = self.output_dir or Path(default)
        folder.mkdir(parents=True, exist_ok=True)
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.jsonl"
        self._path = folder / name
        self._file = self._partial().open("w", encoding="utf-8")

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
            self._file.write(json.dumps(prediction_row(prediction), ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._file is not None
        assert self._path is not None
        self._file.close()
        os.replace(self._partial(), self._path)
        print(f"predictions: {self._path}")

    def _partial(self) -> Path:
        assert self._path is not None
        return self._path.with_name(f".{self._path.name}.partial")


def prediction_row(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain data."""
    sample, answer = prediction.sample, prediction.answer
    return {
        "id": sample.id,
        "image_id": sample.image_id,
        "image": str(sample.image) if isinstance(sample.image, Path) else None,
        "image_size": list(sample.image_size),
        "question": sample.question,
        "text": prediction.text,
        "label": answer.label,
        "boxes": answer.boxes.tolist(),
        "confidences": answer.confidences.tolist(),
        "parsed": bool(answer.parsed),
        "problems": list(answer.problems),
    }
