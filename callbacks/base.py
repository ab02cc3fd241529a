"""MetricCallback: metrics of one kind of target over the predictions of a validation or test run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torchmetrics import Metric

from rft_lightning.errors import ConfigConflictError
from rft_lightning.metrics import ParseRate
from rft_lightning.metrics.base import SampleId
from rft_lightning.sample import Prediction, unasked


class MetricCallback(Callback, ABC):
    """Computes metrics from the ``predictions`` that validation and test steps return.

    A callback acts on the predictions of its own kind of target and stays silent when a run has none, so that one
    config can carry the callbacks of all tasks. The first completion of each sample counts (``Prediction.index`` 0).

    Logged under ``val/`` or ``test/``: what the subclass computes, and ``parse_rate``, the share of its answers that
    could be read. All ranks log the same numbers. Where two callbacks of a mixture log the same name, Lightning
    averages them weighted by their samples; `results` of each callback keeps its own.

    Attributes:
        results: the numbers of the last run without prefix, also of the sanity check (which Lightning does not log);
            empty if it had no sample of this kind.
        per_class: class name -> value of the last run, for metrics that have it.
        device: of the module, once a run began.
    """

    target_type: ClassVar[type]
    # Of the answers, in names of numbers where several kinds are scored together.
    kind: ClassVar[str]
    table_title: ClassVar[str] = "value per class"

    def __init__(self) -> None:
        self.results: dict[str, float] = {}
        self.per_class: dict[str, float] = {}
        self.parse_rate = ParseRate()
        self.device = torch.device("cpu")  # of the module, while it runs

    def complete(self, predictions: list[Prediction]) -> None:
        """Add to answers, in place, what the metric needs beyond them and the picture is needed for; nothing here.

        Called once for the predictions of a batch, before they are scored or written to a file: what it adds is not
        computed again when they are read from there.
        """

    @property
    def completed_by(self) -> dict[str, Any]:
        """What the additions of :meth:`complete` depend on, as plain data; nothing where it adds nothing."""
        return {}

    @abstractmethod
    def metrics(self) -> list[Metric]:
        """The metrics of the subclass; they are moved to the device and reset here."""

    @abstractmethod
    def update(self, predictions: list[Prediction], targets: list[Any], ids: list[SampleId], loader: int) -> None:
        """Add predictions with their targets, all of `target_type`, and the ids of their samples.

        Further ids go through :func:`loader_id` with `loader`, the index of the dataloader.
        """

    @abstractmethod
    def compute(self) -> tuple[dict[str, float], dict[str, float]]:
        """Numbers to log, and the value per class; called on every rank, whether it saw samples or not."""

    @property
    def scoring(self) -> dict[str, str]:
        """By which rules it scores, in facts that an evaluation states with its numbers; none by default."""
        return {}

    def summary(self) -> str:
        """One line about `results`, printed after a run; empty for none. Says what the numbers depend on."""
        return ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback of this class: both would log under the same names, and Lightning averages them."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(type(callback) is type(self) for callback in callbacks) > 1:
            raise ConfigConflictError(
                f"Expected one {type(self).__name__}, found several, which would log under the same names. Leave one, "
                "or evaluate again with the other (rft validate)."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(outputs, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(outputs, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.device = pl_module.device

    def add_to_answers(self, predictions: Sequence[Prediction]) -> None:
        """Call :meth:`complete` with those of a batch that this callback measures."""
        kept = self._measured(predictions)
        if kept:
            self.complete(kept)

    def choose_from(self, predictions: Sequence[Prediction]) -> None:
        """Look at all predictions of a file before :meth:`score` is called with some of them; nothing here.

        For what an evaluation does with the answers about a picture together, whatever is chosen of them.
        """

    def score(self, predictions: Sequence[Prediction]) -> tuple[dict[str, float], dict[str, float]]:
        """Numbers and value per class of predictions that are complete, on this process alone and on the CPU.

        Returns:
            `results` and `per_class`, which are set too; both empty if there is nothing that this callback measures.
        """
        self.reset(torch.device("cpu"))
        metrics = self._all_metrics()
        asks = [metric.distributed_available_fn for metric in metrics]
        for metric in metrics:
            metric.distributed_available_fn = _alone
        self._update(self._measured(predictions), 0)
        self._compute()
        for metric, ask in zip(metrics, asks, strict=True):
            metric.distributed_available_fn = ask
        return self.results, self.per_class

    def _start(self, pl_module: LightningModule) -> None:
        self.device = pl_module.device
        # A callback's metrics do not move with the module. MPS has no float64.
        self.reset(torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device)

    def reset(self, device: torch.device) -> None:
        """Forget all samples, and measure on `device`."""
        for metric in self._all_metrics():
            metric.to(device).reset()
        self._update([], 0)  # torchmetrics warns about a compute() without any update()

    def _measured(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        return [p for p in predictions if isinstance(p.target, self.target_type) and p.index == 0]

    def _add(self, outputs: Any, loader: int) -> None:
        kept = self._measured(predictions_of(outputs))
        if kept:
            self.complete(kept)
            self._update(kept, loader)

    def _update(self, predictions: list[Prediction], loader: int) -> None:
        ids = [loader_id(prediction.sample.id, loader) for prediction in predictions]
        unasked = [prediction.unasked for prediction in predictions]
        self.parse_rate.update([prediction.answer for prediction in predictions], ids, unasked=unasked)
        self.update(predictions, [prediction.target for prediction in predictions], ids, loader)

    def _add_unasked(self, trainer: Trainer, prefix: str) -> None:
        """What a presence map kept from being asked counts as answered with nothing; rank zero knows all of it."""
        data = getattr(trainer, "datamodule", None)
        if data is not None and trainer.is_global_zero and not trainer.sanity_checking:
            left = data.unasked(prefix, questions_asked(trainer, data, prefix))
            self._update(self._measured([unasked(sample) for sample in left]), 0)

    def _compute(self) -> int:
        """Set `results` and `per_class`; the number of questions that were asked.

        compute() syncs, so every rank calls it whatever it saw; only the synced count says whether there is anything.
        """
        parsed = self.parse_rate.compute()
        results, per_class = self.compute()
        for metric in self._all_metrics():
            metric.reset()
        count = int(parsed["n_samples"])
        # What was not asked counts as missed, also where nothing else is left.
        measured = count + int(parsed["n_unasked"]) > 0
        self.results = {**results, "parse_rate": float(parsed["parse_rate"])} if measured else {}
        self.per_class = per_class if measured else {}
        return count

    def _finish(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        self._add_unasked(trainer, prefix)
        count = self._compute()
        if not self.results:
            return
        named = {f"{prefix}/{name}": value for name, value in self.results.items()}
        pl_module.log_dict(named, rank_zero_only=False, sync_dist=False, batch_size=max(count, 1))
        if self.summary() and not trainer.sanity_checking:
            rank_zero_info(f"{prefix}: {self.summary()}, over {count} samples")
        if self.per_class and not trainer.sanity_checking and trainer.is_global_zero:
            for logger in trainer.loggers:
                write_table(logger, f"{prefix}/per_class", self.table_title, self.per_class, trainer.global_step)

    def _all_metrics(self) -> list[Metric]:
        return [self.parse_rate, *self.metrics()]


def _alone() -> bool:
    """Whether there are other processes to sync with, of metrics that are computed on one of them."""
    return False


def predictions_of(outputs: Any) -> list[Prediction]:
    """The predictions in what a validation or test step returned; none where it returned something else."""
    return list(outputs.get("predictions", ())) if isinstance(outputs, Mapping) else []


def loader_id(value: SampleId, loader: int) -> SampleId:
    """An id that differs between the dataloaders of a run: their data sets number pictures independently."""
    return f"{loader}/{value}" if loader else value


def questions_asked(trainer: Trainer, data: Any, split: str) -> int | None:
    """How many questions of "val" or "test", the first ones, all processes asked; None where the Trainer limits none.

    Args:
        trainer: with ``limit_val_batches`` and ``limit_test_batches``, which count for each process on its own.
        data: the datamodule; its EvaluationSampler deals batches out to the processes in turn, so that what they asked
            together stands at the beginning.
        split: val or test.
    """
    limit = getattr(trainer, f"limit_{split}_batches")
    size, at_once, processes = len(data.split(split)), data.eval_batch_size, trainer.world_size
    batches = range(0, size, at_once)
    dealt = [len(batches[rank::processes]) for rank in range(processes)]
    done = sum(int(count * limit) if isinstance(limit, float) else min(count, limit) for count in dealt)
    return None if done == len(batches) else min(done * at_once, size)


def write_table(logger: Any, name: str, title: str, values: Mapping[str, float], step: int) -> None:
    """Write class -> value as one table to loggers that can show it: a table (W&B) or text (TensorBoard)."""
    if hasattr(logger, "log_table"):
        logger.log_table(key=name, columns=["class", title], data=[list(row) for row in values.items()], step=step)
    elif hasattr(logger.experiment, "add_text"):
        rows = [f"| {key} | {value:.4f} |" for key, value in values.items()]
        logger.experiment.add_text(name, "\n".join([f"| class | {title} |", "| --- | ---: |", *rows]), step)


__all__ = ["MetricCallback", "loader_id", "predictions_of", "questions_asked", "write_table"]
