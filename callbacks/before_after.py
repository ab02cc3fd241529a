"""BeforeAfter: what training changed, as two pictures, a small table and a JSON file."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table

from rft_lightning.callbacks.base import MetricCallback, predictions_of
from rft_lightning.callbacks.figures import Panel, curve_figure, grid_figure, save_atomically, save_figure
from rft_lightning.metrics.base import ABSENT
from rft_lightning.metrics.matched_iou import matched_iou_sum
from rft_lightning.rewards import accuracy_reward, presence_reward
from rft_lightning.sample import Answer, ClassTarget, GroundingTarget, Prediction, PresenceTarget, Sample, as_boxes

_CURVES = {"reward": "train/reward", "kl": "train/kl"}
_WORDS = {
    "map": "validation mAP",
    "box_iou_mean": "mean IoU",
    "box_iou_mean_parsed": "mean IoU on parsed answers",
    "acc_50": "IoU of at least 0.5",
    "accuracy": "accuracy",
    "parse_rate": "parse rate",
}


class BeforeAfter(Callback):
    """Compares the validation before training with the last one, and shows the reward in between.

    Set ``trainer.num_sanity_val_steps: -1``: the sanity check then validates the whole split before training and is
    what "before" means. At the end of fit, rank zero writes into `output_dir`:

    - ``reward_curve.png``: ``train/reward`` per step, raw and smoothed, and ``train/kl`` on a second axis;
    - ``before_after.png``: a row per picture, the answer before on the left and after on the right; ground truth
      green, answer orange, IoU above (class names: the answers as text);
    - ``summary.json``: the metrics of both validations, and the curves;

    and prints the main numbers. Metrics are those of the :class:`MetricCallback` s of the same trainer. A file whose
    content was never seen (no reward logged, no validation) is not written. A resumed run keeps the "before" of its
    first start.

    Args:
        output_dir: folder of the files; made if it is missing.
        max_images: most rows of the grid.
        next_steps: lines printed below the table, such as the next command to try.

    Attributes:
        before: ``step``, ``metrics`` and ``answers`` of the sanity check; None without one.
        after: the same of the last validation during training; None without one.
        curves: (optimiser step, value) of ``reward`` and ``kl``.

    Raises:
        ValueError: `max_images` is negative.
    """

    def __init__(self, output_dir: str | Path, max_images: int = 8, next_steps: Sequence[str] | None = None) -> None:
        if max_images < 0:
            raise ValueError(f"Expected max_images >= 0, found {max_images}.")
        self.output_dir = Path(output_dir)
        self.max_images = max_images
        self.next_steps = list(next_steps or ())
        self.before: dict[str, Any] | None = None
        self.after: dict[str, Any] | None = None
        self.curves: dict[str, list[tuple[int, float]]] = {name: [] for name in _CURVES}
        self._samples: dict[str, Sample] = {}
        self._answers: dict[str, dict[str, Any]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before training, not after it, if the files cannot be written."""
        if stage == "fit" and trainer.num_sanity_val_steps != math.inf and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"BeforeAfter takes its metrics before training from the sanity check, which covers only "
                f"{trainer.num_sanity_val_steps} batches; set trainer.num_sanity_val_steps to -1 for the whole split."
            )
        if stage != "fit" or not trainer.is_global_zero:
            return
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ImportError("BeforeAfter draws with matplotlib: pip install matplotlib, or remove it.") from error
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"BeforeAfter cannot make the folder {self.output_dir} ({error}); set output_dir."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]
        self.curves = {name: [tuple(point) for point in state_dict["curves"][name]] for name in _CURVES}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answers = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not _fitting(trainer):
            return
        wanted = set(self.before["answers"]) if self.before is not None else None
        for prediction in predictions_of(outputs):
            key = f"{dataloader_idx}/{prediction.sample.id}"
            if prediction.index != 0 or prediction.target is None or key in self._answers:
                continue
            if len(self._answers) < self.max_images if wanted is None else key in wanted:
                self._answers[key] = _remembered(prediction)
                self._samples[key] = prediction.sample

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All metric callbacks have finished: their on_validation_epoch_end came before.
        if not _fitting(trainer):
            return
        seen = {"step": trainer.global_step, "metrics": metrics_of(trainer), "answers": self._answers}
        if not trainer.sanity_checking:
            self.after = seen
        elif self.before is None:  # a resumed run keeps what its first start saw
            self.before = seen

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        for name, key in _CURVES.items():
            value = trainer.callback_metrics.get(f"{key}_step", trainer.callback_metrics.get(key))
            if value is not None and math.isfinite(float(value)):
                self.curves[name].append((trainer.global_step, float(value)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._print(self._write())

    def _write(self) -> list[Path]:
        """Write what there is to write; returns the paths."""
        # The numbers first: a picture that cannot be read any more must not cost them.
        paths = [self.output_dir / "summary.json"]
        text = json.dumps(_finite(self._summary()), indent=2)
        save_atomically(paths[0], lambda path: path.write_text(text + "\n", encoding="utf-8"))
        if self.curves["reward"]:
            paths.append(self.output_dir / "reward_curve.png")
            save_figure(curve_figure(self.curves), paths[-1])
        rows = self._rows()
        if rows:
            paths.append(self.output_dir / "before_after.png")
            headings = [f"{name} (step {seen['step']})" for name, seen in self._validations()]
            save_figure(grid_figure(rows, headings), paths[-1])
        return paths

    def _validations(self) -> list[tuple[str, dict[str, Any]]]:
        pairs = (("before", self.before), ("after", self.after))
        return [(name, seen) for name, seen in pairs if seen is not None]

    def _rows(self) -> list[list[Panel | None]]:
        validations = [seen for _, seen in self._validations()]
        keys = list(validations[0]["answers"]) if validations else []
        return [
            [panel(self._samples[key], seen["answers"].get(key)) for seen in validations]
            for key in keys
            if key in self._samples  # a resumed run that never validated again does not have the pictures
        ]

    def _summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = {
            name: {"step": seen["step"], "metrics": seen["metrics"], "answers": list(seen["answers"].values())}
            for name, seen in self._validations()
        }
        return {"before": None, "after": None, **summary, "curves": self.curves}

    def _print(self, paths: Sequence[Path]) -> None:
        console = Console()
        if self._validations():
            console.print(_table(self.before, self.after))
        if self.before is None or self.after is None:
            console.print(
                "There was no validation both before and after training: set trainer.num_sanity_val_steps to -1 and "
                "trainer.val_check_interval so that one falls at the end."
            )
        for path in paths:
            console.print(f"wrote {path}", soft_wrap=True, markup=False, highlight=False)
        if self.next_steps:
            console.print("\nWhat to try next:")
            for line in self.next_steps:
                console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)


def metrics_of(trainer: Trainer) -> dict[str, float]:
    """The last results of the trainer's metric callbacks; a name that two of them use gets the second's class name."""
    found: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MetricCallback):
            for name, value in callback.results.items():
                found[f"{type(callback).__name__}/{name}" if name in found else name] = value
    return found


def panel(sample: Sample, seen: Mapping[str, Any] | None) -> Panel | None:
    """The picture of a sample with an answer to it, as remembered; None without an answer."""
    if seen is None:
        return None
    image, target = sample.load_image(), sample.target
    assert target is not None
    if isinstance(target, ClassTarget | PresenceTarget):
        said = seen["label"] or "no answer"
        right = target.label if isinstance(target, ClassTarget) else f"{target.category}: {_yes_or_no(target)}"
        title = "\n".join(textwrap.wrap(f"{_short(said, 60)} (right: {right})", 42))
        return Panel(image, title, right=seen["right"])
    truth = target.boxes[:1] if isinstance(target, GroundingTarget) else target.boxes
    answer = as_boxes(seen["boxes"])
    answer = answer[:1] if isinstance(target, GroundingTarget) else answer
    asked = target.expression if isinstance(target, GroundingTarget) else target.category
    title = "\n".join([*textwrap.wrap(_short(asked, 80), 42), _overlap(answer, truth, bool(seen["parsed"]))])
    return Panel(image, title, truth.tolist(), answer.tolist())


def _overlap(answer: torch.Tensor, truth: torch.Tensor, parsed: bool) -> str:
    if not parsed:
        return "answer not parsed"
    if len(truth) == 0:
        return f"no objects, {len(answer)} answered"
    return f"IoU {float(matched_iou_sum(answer, truth)) / len(truth):.2f}"


def _remembered(prediction: Prediction) -> dict[str, Any]:
    """An answer as plain data, which a checkpoint can hold."""
    answer: Answer = prediction.answer
    right = None
    if isinstance(prediction.target, ClassTarget):
        right = accuracy_reward(answer, prediction.target, rules="strict", step=None) == 1
    elif isinstance(prediction.target, PresenceTarget):
        right = presence_reward(answer, prediction.target) == 1
    return {
        "id": prediction.sample.id,
        "text": prediction.text,
        "label": answer.label,
        "boxes": answer.boxes.tolist(),
        "parsed": answer.parsed,
        "right": right,
    }


def _yes_or_no(target: PresenceTarget) -> str:
    return "yes" if target.present else "no"


def _fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit"


def _table(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Table:
    table = Table("", title="Before and after training")
    for heading, seen in (("before", before), ("after", after)):
        table.add_column(f"{heading} (step {seen['step']})" if seen else heading, justify="right")
    old, new = before["metrics"] if before else {}, after["metrics"] if after else {}
    names = {**old, **new}
    details = ("map_", "mar_")
    others = [name for name in names if name not in _WORDS and not name.startswith(details)]
    for name in [*(name for name in _WORDS if name in names), *others]:
        table.add_row(_WORDS.get(name, name), _number(name, old.get(name)), _number(name, new.get(name)))
    return table


def _number(name: str, value: float | None) -> str:
    absent = value == ABSENT and "giou" not in name  # a GIoU can be -1
    return "-" if value is None or absent or not math.isfinite(value) else f"{value:.3f}"


def _short(text: str, width: int) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _finite(value: Any) -> Any:
    """The same structure with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["BeforeAfter"]
