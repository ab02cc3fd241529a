"""BaselineModule: what the comparison systems share. They answer the samples of any datamodule and learn nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from rft_lightning.errors import ConfigConflictError
from rft_lightning.evaluation.rows import asked_of, task_of
from rft_lightning.prompts import picture_loader
from rft_lightning.sample import NOT_COUNTED, Answer, Prediction, Sample


@dataclass
class SampleBatch:
    """Samples with their pictures: the batch of systems that need no prompt.

    Attributes:
        samples: B samples.
        images: their pictures, RGB, at their original size, one object for samples that show one picture; none where
            the system does not look at them.
    """

    samples: list[Sample]
    images: list[Image.Image]

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device | str, **kwargs: Any) -> SampleBatch:
        """Itself: pictures become tensors in the forward."""
        return self

    def select(self, rows: Sequence[int]) -> SampleBatch:
        """The samples of these numbers."""
        images = [self.images[row] for row in rows] if self.images else []
        return SampleBatch([self.samples[row] for row in rows], images)

    def by_size(self) -> list[list[int]]:
        """The numbers of the samples, put together by the size of their pictures.

        Pictures of one size need no padding in a batch, so that no answer depends on the other pictures there.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(self.images):
            groups.setdefault(image.size, []).append(row)
        return list(groups.values())


class BaselineModule(LightningModule, ABC):
    """A system to compare with: validates, tests and predicts like a policy, behind the same data and metrics.

    Its models compute in the dtype they are loaded in, whatever `trainer.precision` is.

    Attributes:
        tasks: names of the tasks whose samples it answers.
        needs_images: whether it looks at the pictures.
        checkpoint: hub id or folder of its (first) model, None without one.
    """

    tasks: ClassVar[tuple[str, ...]]
    needs_images: ClassVar[bool] = True
    checkpoint: str | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return type(self).__name__

    @abstractmethod
    def answers(self, batch: SampleBatch) -> list[Answer]:
        """One answer per sample, all of `tasks`; without gradients and without autocast."""

    def question(self, sample: Sample) -> str | None:
        """What the system is asked, in its own words; the class or expression where it does not say."""
        return asked_of(sample)

    def encoder_for(self, datamodule: Any) -> Callable[[Sequence[Sample]], SampleBatch]:
        """What makes batches of the samples of `datamodule`, in place of its PromptEncoder."""
        # Not a method: processes that load data are given it, and need no models.
        return partial(load_samples, images=self.needs_images)

    def collate(self, samples: Sequence[Sample]) -> SampleBatch:
        """A batch of samples."""
        return load_samples(samples, images=self.needs_images)

    def validation_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        """Answers as Predictions; callbacks turn them into metrics."""
        return {"predictions": self.predict_step(batch, batch_idx)}

    def test_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        """As in validation."""
        return {"predictions": self.predict_step(batch, batch_idx)}

    def predict_step(self, batch: SampleBatch, batch_idx: int) -> list[Prediction]:
        """One Prediction per sample that counts.

        Raises:
            ConfigConflictError: a sample is of a task that the system does not answer.
        """
        batch = batch.select([row for row, sample in enumerate(batch.samples) if sample.occurrence != NOT_COUNTED])
        for sample in batch.samples:
            self._check_task(sample)
        if not len(batch):
            return []
        self.configure_model()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            answers = self.answers(batch)
        return [
            Prediction(replace(sample, question=self.question(sample)), answer.text, answer)
            for sample, answer in zip(batch.samples, answers, strict=True)
        ]

    def configure_callbacks(self) -> list:
        """Refuse `fit`, in the earliest hook that sees the Trainer."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.training_step()
        return []

    def training_step(self, *args: Any) -> NoReturn:
        """Refused.

        Raises:
            ConfigConflictError: always.
        """
        raise ConfigConflictError(
            f"{type(self).__name__} is a comparison system and is not trained. Run it with rft evaluate (or test, "
            "validate, predict), or leave its overlay out of rft fit."
        )

    def configure_optimizers(self) -> None:
        """None."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what `fit` wrote of another module.

        Raises:
            ConfigConflictError: always.
        """
        raise ConfigConflictError(
            f"{type(self).__name__} is not trained, so no checkpoint of `fit` is one of it. Leave --ckpt_path out; its "
            "own weights are those that its arguments name."
        )

    def _check_task(self, sample: Sample) -> None:
        if task_of(sample) not in self.tasks:
            raise ConfigConflictError(
                f"{type(self).__name__} answers {' and '.join(self.tasks)} samples, found the {task_of(sample)} "
                f"sample {sample.id!r}. Take data with {' or '.join(self.tasks)} questions, or a system that answers "
                "such samples (docs/baselines.md)."
            )


def load_samples(samples: Sequence[Sample], *, images: bool = True) -> SampleBatch:
    """A batch of samples, their pictures read from disk, each once, where `images` are needed."""
    load = picture_loader()
    return SampleBatch(list(samples), [load(sample) for sample in samples] if images else [])


def asked(sample: Sample, system: str) -> str:
    """The class or expression that a sample asks for.

    Raises:
        ConfigConflictError: it asks for none.
    """
    words = asked_of(sample)
    if not words or not words.strip():
        raise ConfigConflictError(
            f"{system} looks for a class or an expression, and sample {sample.id!r} names none. Take a data set with "
            "annotations."
        )
    return words


__all__ = ["BaselineModule", "SampleBatch", "asked", "load_samples"]
