"""`rft evaluate`: ask a split of a data set, write the answers as they come, go on where it stopped, and score them.

The folder of an evaluation, when it is complete:

- ``predictions.jsonl``: one answer per line in the order of the data, see :mod:`rft_lightning.evaluation.rows`;
- ``metrics.json``: what was measured and of what, see :mod:`rft_lightning.evaluation.results`;
- ``failures.jsonl``: the rows that could not be read as an answer of their kind;
- ``results.json``: detections in COCO's (and LVIS's) results format; ``presence_map.json`` of a presence task;
- ``config.yaml``: the configuration, where the command line made one.

Until then ``parts/`` holds the answers so far. Batches are cut from the data in the same places however often an
evaluation is stopped, so that it ends with the same answers.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from rft_lightning.errors import AnnotationError, ConfigConflictError
from rft_lightning.evaluation.experiment import describe
from rft_lightning.evaluation.parts import Parts
from rft_lightning.evaluation.results import PREDICTIONS, record_table, write_results
from rft_lightning.evaluation.rows import read_rows, row_of
from rft_lightning.evaluation.settings import check_settings, configured, settings_of
from rft_lightning.evaluation.voting import Voting
from rft_lightning.model_card import configuration
from rft_lightning.placing import claimed
from rft_lightning.sample import Prediction, Sample, unasked

SPLITS = ("test", "val", "train")


def evaluate(
    trainer: Trainer,
    model: LightningModule,
    datamodule: Any,
    *,
    split: str = "test",
    ckpt_path: str | None = None,
    output_dir: str | Path | None = None,
    voting: Voting | None = None,
    limit: int | None = None,
) -> dict[str, Any] | None:
    """Answer the questions of a split, as far as they have no answer yet, and score all.

    Args:
        trainer: its metric callbacks score; its other callbacks, but for the progress bar, and its loggers are left
            out.
        model: a PolicyModule or a baseline.
        datamodule: where the questions come from.
        split: test, val or train.
        ckpt_path: a checkpoint of `fit` whose policy answers; the policy as it starts when None.
        output_dir: folder of the evaluation; one beside the checkpoint, or below the Trainer's root, when None.
        voting: how many answers are drawn, and which of them counts; one when None.
        limit: ask only the first questions, so many.

    Returns:
        what ``metrics.json`` holds, on the process of rank zero; None on the others.

    Raises:
        ConfigConflictError: a setting is out of its range, or the folder holds answers of another evaluation.
    """
    if split not in SPLITS:
        raise ConfigConflictError(f"Expected split to be one of {', '.join(SPLITS)}, found {split!r}.")
    if ckpt_path is None and getattr(model, "trained_here", False):
        raise ConfigConflictError(
            "The policy was trained in this process, and no file says how: its answers could not be told from those of "
            "another one. Give ckpt_path, a checkpoint of the run (such as that of its RolloutCheckpoint)."
        )
    if limit is not None and limit < 1:
        raise ConfigConflictError(f"Expected limit >= 1 or none, found {limit}.")
    folder = Path(output_dir) if output_dir else default_folder(trainer, model, datamodule, split, ckpt_path)
    evaluation = Evaluation(trainer, model, datamodule, folder)
    return evaluation.run(split, ckpt_path, voting or Voting(), limit)


def default_folder(trainer: Trainer, model: Any, datamodule: Any, split: str, ckpt_path: str | None) -> Path:
    """Beside the folder of the checkpoint; of a policy as it starts, below the Trainer's root."""
    if ckpt_path:
        checkpoint = Path(ckpt_path)
        return checkpoint.parent.parent / "evaluation" / f"{checkpoint.name.removesuffix('.ckpt')}_{split}"
    who = str(getattr(model, "checkpoint", None) or type(model).__name__).rstrip("/").rsplit("/", 1)[-1]
    data = type(datamodule).__name__.removesuffix("DataModule")
    return Path(trainer.default_root_dir) / "evaluation" / f"{who.replace(':', '_')}_{data}_{split}"


class Evaluation(Callback):
    """The callback that keeps the answers of a prediction run, with what is done before and after it.

    Args:
        trainer: see :func:`evaluate`, as for the others.
        model: what answers.
        datamodule: what asks.
        folder: of the evaluation.

    Raises:
        ConfigConflictError: the Trainer predicts on a part of the data, or has two metric callbacks of one class.
    """

    def __init__(self, trainer: Trainer, model: LightningModule, datamodule: Any, folder: Path) -> None:
        if isinstance(trainer.limit_predict_batches, int) or trainer.limit_predict_batches != 1.0:
            raise ConfigConflictError(
                f"trainer.limit_predict_batches is {trainer.limit_predict_batches} (fast_dev_run sets it, too), and an "
                "evaluation is complete when all questions are answered. Use --limit, a number of questions."
            )
        self.trainer, self.model, self.datamodule, self.folder = trainer, model, datamodule, folder
        self.parts = Parts(folder)
        self.config = configuration(trainer)
        self.record: dict[str, Any] | None = None
        self.callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.metrics: list[Any] = [callback for callback in self.callbacks if hasattr(callback, "score")]
        for callback in self.metrics:
            callback.setup(trainer, model, "predict")

    def run(self, split: str, ckpt_path: str | None, voting: Voting, limit: int | None) -> dict[str, Any] | None:
        """Ask what has no answer, put the answers in order, and score them; see :func:`evaluate`."""
        with ExitStack() as claim:
            if rank_zero_only.rank == 0 and not claim.enter_context(claimed(self.folder)):  # type: ignore[attr-defined]
                raise ConfigConflictError(
                    f"Another process is evaluating in {self.folder}. Wait for its end, or give this one a folder of "
                    "its own (--output_dir)."
                )
            try:
                return self._run(split, ckpt_path, voting, limit)
            except OSError as error:
                error.add_note(
                    f"rft: the evaluation in {self.folder} stopped here. What was answered is kept there: once the "
                    "cause is gone (a full disk, a folder that cannot be written), the same command goes on."
                )
                raise
            finally:
                self.parts.close()

    def _run(self, split: str, ckpt_path: str | None, voting: Voting, limit: int | None) -> dict[str, Any] | None:
        self.datamodule.prepare_data()
        self.ids = self.datamodule.ids(split)
        if limit is not None and limit >= len(self.ids):
            limit = None  # what is not cut must not count as cut
        self.split, self.limit = split, limit
        self.ids = self.ids[:limit]
        asked: dict[str, Any] = {"split": split, "voting": voting, "callbacks": self.metrics}
        self.experiment = describe(self.model, self.datamodule, self.config, ckpt_path, limit=limit, **asked)
        found = yaml.safe_load(self.config) if self.config else configured(self.trainer, self.model, self.datamodule)
        self.settings = settings_of(self.model, found, self.ids, ckpt_path, folder=self.folder, **asked)
        before = self.parts.settings()
        if before is None and (self.folder / PREDICTIONS).exists():
            raise ConfigConflictError(
                f"{self.folder} holds a {PREDICTIONS} that no evaluation wrote. Give this one a folder of its own "
                "(--output_dir); `rft score` scores that file."
            )
        check_settings(before, self.settings, self.folder)
        answered = self._answered()
        left = sum(name not in answered for name in self.ids)
        if not left:
            if before is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                self.parts.begin(self.settings)  # of an evaluation in which a presence map leaves nothing to ask
            self._finish()
            return self.record
        if left < len(self.ids) and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            print(f"evaluation: {len(self.ids) - left} of {len(self.ids)} questions are answered; {left} are left")
        self._predict(ckpt_path, voting, answered)
        return self.record

    def _predict(self, ckpt_path: str | None, voting: Voting, answered: set[str]) -> None:
        """Lightning's prediction run, without the callbacks and loggers of training; leaves no setting behind."""
        trainer, model = cast(Any, self.trainer), cast(Any, self.model)
        usual = getattr(model, "voting", None)
        if usual is None and voting.answers > 1:
            raise ConfigConflictError(f"{type(model).__name__} gives one answer; leave --answers out.")
        self.datamodule.ask(self.split, limit=self.limit, answered=answered)
        bars = [callback for callback in self.callbacks if isinstance(callback, ProgressBar)]
        loggers, trainer.loggers = trainer.loggers, []
        trainer.callbacks = [*self.metrics, *bars, self]
        if usual is not None:
            model.voting = voting
        collate = self.datamodule.collate
        if collate is None and hasattr(model, "encoder_for"):
            self.datamodule.collate = model.encoder_for(self.datamodule)
        try:
            trainer.predict(model, datamodule=self.datamodule, return_predictions=False, ckpt_path=ckpt_path)
        finally:
            trainer.callbacks, trainer.loggers = self.callbacks, loggers
            self.datamodule.ask()
            self.datamodule.collate = collate
            if usual is not None:
                model.voting = usual

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.parts.begin(self.settings)
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[Prediction],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for callback in self.metrics:
            callback.add_to_answers(outputs)
        if outputs:
            self.parts.append([row_of(prediction) for prediction in outputs], trainer.global_rank)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parts.close()
        trainer.strategy.barrier()  # rank zero reads the files of all
        self._finish()
        trainer.strategy.barrier()

    def _answered(self) -> set[str]:
        """The questions that an earlier run answered, whether it came to its end or not."""
        complete = self.folder / PREDICTIONS
        if not complete.is_file():
            try:
                return {row["id"] for row in self.parts.rows()}
            except (AnnotationError, FileNotFoundError):
                # Another process of this run found all answers there, and has put them in their place.
                if not complete.is_file():
                    raise
        changed = f"It was complete once and has been changed since; remove {self.folder} to evaluate again."
        try:
            answered = {row["id"] for _, row in read_rows(complete)}
        except AnnotationError as error:
            raise AnnotationError(f"{error} {changed}") from error
        if missing := set(self.ids) - answered:
            raise AnnotationError(f"{complete} has no answer to {len(missing)} questions. {changed}")
        return answered

    @rank_zero_only
    def _finish(self) -> None:
        """Put the answers in the order of the data, score them, and write all files; the parts are of no use then.

        Answers are compared with the annotations as they are now, which may have been corrected since.
        """
        file = self.folder / PREDICTIONS
        found = [row for _, row in read_rows(file)] if file.is_file() else list(self.parts.rows())
        by_id: dict[str, dict[str, Any]] = {}
        for row in found:
            by_id.setdefault(row["id"], row)
        samples = self.datamodule.split(self.split)
        rows = [self._annotated(by_id[name], samples[number]) for number, name in enumerate(self.ids)]
        rows += [row_of(unasked(sample)) for sample in self.datamodule.unasked(self.split, self.limit)]
        self.record = write_results(self.folder, rows, self.metrics, self.experiment, self.config)
        self.parts.remove()
        print("\n".join([*record_table(self.record), f"evaluation: {self.folder}"]))

    def _annotated(self, row: dict[str, Any], sample: Sample) -> dict[str, Any]:
        """A row with what the data set says of its sample now."""
        now = row_of(unasked(sample))
        if now["image_size"] != row["image_size"]:
            raise ConfigConflictError(
                f"{self.folder} holds an answer about another picture: that of sample {sample.id!r} was of "
                f"{row['image_size']} pixels and is of {now['image_size']}. Give this evaluation a folder of its own "
                "(--output_dir), or remove that one."
            )
        return {**row, **{name: now[name] for name in ("labelled", "asked", "target")}}


__all__ = ["SPLITS", "Evaluation", "default_folder", "evaluate"]
