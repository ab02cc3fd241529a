"""RFTDataModule: what every datamodule shares; a data set adds its samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from rft_lightning.datamodules.download import Download, fetch_all
from rft_lightning.datamodules.rows import SampleRows
from rft_lightning.datamodules.samplers import EvaluationSampler, RolloutBatchSampler
from rft_lightning.errors import ConfigConflictError, DatasetNotFoundError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.interruption import leave_signals_to_parent
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import PromptBatch, Sample
from rft_lightning.seeding import run_seed

if TYPE_CHECKING:
    from PIL import Image


class SampleDataset(Dataset):
    """Rows by (row, occurrence)."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, entry: tuple[int, int]) -> Sample:
        row, occurrence = entry
        sample = self.samples[row]
        return replace(sample, occurrence=occurrence) if occurrence else sample


@dataclass(frozen=True)
class Asked:
    """What prediction asks; see :meth:`RFTDataModule.ask`."""

    split: str = "predict"
    limit: int | None = None
    answered: frozenset[str] = frozenset()


class RFTDataModule(LightningDataModule, ABC):
    """Loaders of PromptBatches; subclasses say which samples each split holds.

    Args:
        processor: checkpoint whose processor and chat template encode the prompts. On the command line it is taken
            from the model's `policy` and must not be set.
        batch_size: prompts per rollout and process.
        oversample: dynamic sampling: up to so many times `batch_size` prompts are loaded and, as far as they are
            needed, rolled out, to find `batch_size` groups whose answers differ in reward. 1 trains on every group.
        eval_batch_size: prompts per validation, test or prediction batch and process.
        num_workers: worker processes of each loader.
        seed: seed of the few-shot draw and of the order of the training rows; the run's `seed_everything` when None.
        min_pixels: fewest pixels of an image after resizing; the checkpoint's own when null.
        max_pixels: most pixels of an image after resizing; the checkpoint's own when null.
        system_prompt: text of a system turn; null leaves it to the chat template.
        max_prompt_length: most tokens of a prompt; a longer one is an error. null for no limit.
        frame: how the policy writes boxes; null for the convention of its family. A family whose convention is not
            known needs it.

    Raises:
        ConfigConflictError: a size is out of its range.
    """

    # What can be downloaded into `root`; where empty, the user puts the files there.
    downloads: Sequence[Download] = ()
    # The splits that `rft prepare` looks at.
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    def __init__(
        self,
        *,
        processor: str | None = None,
        batch_size: int = 8,
        oversample: int = 1,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        max_prompt_length: int | None = 1024,
        frame: CoordinateFrame | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "oversample": oversample, "eval_batch_size": eval_batch_size}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigConflictError(f"Expected {name} >= 1, found {value}.")
        self.processor = processor
        self.batch_size, self.oversample = batch_size, oversample
        self.eval_batch_size, self.num_workers = eval_batch_size, num_workers
        self.seed, self.has_own_seed = run_seed(seed), seed is not None
        self.encoder_settings: dict[str, Any] = {
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "system_prompt": system_prompt,
            "max_prompt_length": max_prompt_length,
            "frame": frame,
        }
        self._encoder: PromptEncoder | None = None
        # In the place of the prompt builder, for systems that take no prompts.
        self.collate: Callable[[Sequence[Sample]], Any] | None = None
        self._asked = Asked()
        self._splits: dict[str, Sequence[Sample]] = {}
        self._row_ids: dict[str, list[str]] = {}

    @abstractmethod
    def samples(self, split: str) -> Sequence[Sample]:
        """The samples of "train", "val", "test" or "predict"; called once per split and process."""

    def parts(self) -> dict[str, RFTDataModule]:
        """The datamodules this one consists of, by a name for each; itself where it is no mixture."""
        return {"": self}

    def download(self) -> None:
        """Fetch and unpack what the data set's publisher offers, as far as it is not there.

        What was unpacked once is not fetched again, see :func:`rft_lightning.datamodules.download.fetch_all`.

        Raises:
            DatasetNotFoundError: nothing is offered.
            DownloadError: it cannot be had, or not unpacked.
        """
        if not self.downloads:
            raise DatasetNotFoundError(
                f"{type(self).__name__} has nothing to download: leave --download out. Where its files come from and "
                "how they have to lie is said in the description of the class."
            )
        fetch_all(self.downloads, getattr(self, "root", "."))

    def summary(self) -> dict[str, Any]:
        """What each split holds, in numbers."""
        return {name: {"rows": len(self.split(name))} for name in self.splits}

    def plot(self, sample: Sample) -> Image.Image:
        """A sample as the model sees it: its picture as the processor resized it, question and solution below.

        The annotation's boxes are green; those that the solution text says, in the model's own coordinates, orange.
        """
        from rft_lightning.report.contact_sheet import draw_sample

        return draw_sample(sample, self.encoder)

    @property
    def encoder(self) -> PromptEncoder:
        """The prompt builder, made when it is first needed."""
        if self._encoder is None:
            if self.processor is None:
                raise ConfigConflictError(
                    f"{type(self).__name__} has no processor. From Python give processor=<the policy's checkpoint>; "
                    "on the command line it follows the model's policy."
                )
            self._encoder = PromptEncoder(self.processor, **self.encoder_settings)
        return self._encoder

    def split(self, name: str) -> Sequence[Sample]:
        """The samples of a split, built once.

        Raises:
            DatasetNotFoundError: the split is empty.
        """
        if name not in self._splits:
            samples = self.samples(name)
            if len(samples) == 0:
                raise DatasetNotFoundError(f"The {name} split of {type(self).__name__} has no samples.")
            self._splits[name] = samples
        return self._splits[name]

    def unasked(self, split: str, limit: int | None = None) -> Sequence[Sample]:
        """What `split` would ask about what is there, but a presence map ruled out: samples that count as missed.

        Args:
            split: "val", "test" or "predict".
            limit: those alone that stand before the end of the first questions, so many; all when None.
        """
        return ()

    def row_ids(self) -> dict[str, list[str]]:
        """The ids of the rows of every split that was built, in their order."""
        return {name: self.ids(name) for name in self._splits}

    def ids(self, split: str) -> list[str]:
        """The ids of the rows of a split, in their order."""
        if split not in self._row_ids:
            samples = self.split(split)
            # A sample of a file is made of its row, which knows the id already.
            rows = samples.rows if isinstance(samples, SampleRows) else samples
            self._row_ids[split] = [str(row.id) for row in rows]
        return self._row_ids[split]

    def ask(self, split: str = "predict", *, limit: int | None = None, answered: Collection[str] = ()) -> None:
        """Say which questions prediction asks.

        Args:
            split: of this split.
            limit: the first ones, so many; all when None.
            answered: ids of samples that have an answer already. A batch of which all samples have one is left out;
                batches are cut from the split in the same places whatever is left out.
        """
        self._asked = Asked(split, limit, frozenset(answered))

    def setup(self, stage: str) -> None:
        """Build the splits of a stage, so that missing data fails before the model is moved or trained."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": (self._asked.split,)}
        for name in needed.get(stage, ("train",)):
            self.split(name)
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigConflictError(
                "trainer.use_distributed_sampler is true, which would replace the loaders' own samplers and repeat "
                "samples. Set trainer.use_distributed_sampler to false (configs/base.yaml does)."
            )

    def train_dataloader(self) -> StatefulDataLoader:
        """Batches of `batch_size * oversample` prompts; its state is checkpointed and resumes at the next batch."""
        rank, world_size = self._process()
        samples = self.split("train")
        return StatefulDataLoader(
            SampleDataset(samples),
            batch_sampler=self.train_sampler(len(samples), rank=rank, world_size=world_size),
            collate_fn=partial(_encode_waves, self.encoder, self.oversample),
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_parent,
        )

    def train_sampler(self, size: int, *, rank: int, world_size: int) -> RolloutBatchSampler:
        """The order of `size` training rows."""
        return RolloutBatchSampler(
            size, self.batch_size, rank=rank, world_size=world_size, seed=self.seed, oversample=self.oversample
        )

    def val_dataloader(self) -> DataLoader:
        """The validation split, once."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        """The test split, once."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The prediction split, or what :meth:`ask` said, once."""
        asked = self._asked
        names = self.ids(asked.split) if asked.answered else []
        done = {row for row, name in enumerate(names) if name in asked.answered}
        return self._evaluation_loader(asked.split, limit=asked.limit, done=done)

    def transfer_batch_to_device(self, batch: PromptBatch, device: Any, dataloader_idx: int) -> PromptBatch:
        """Move the tensors; samples and pictures stay."""
        return batch.to(device)

    def _evaluation_loader(self, split: str, *, limit: int | None = None, done: Collection[int] = ()) -> DataLoader:
        rank, world_size = self._process()
        samples = self.split(split)
        size = len(samples) if limit is None else min(limit, len(samples))
        return DataLoader(
            SampleDataset(samples),
            batch_size=self.eval_batch_size,
            sampler=EvaluationSampler(
                size, rank=rank, world_size=world_size, batch_size=self.eval_batch_size, done=done
            ),
            collate_fn=self.collate or self.encoder,
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_parent,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the Trainer: where processes are not forked, those that load data would each get model and all."""
        return {**self.__dict__, "trainer": None}

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _encode_waves(encoder: PromptEncoder, waves: int, samples: Sequence[Sample]) -> PromptBatch:
    """A training batch that knows of how many waves it consists."""
    return replace(encoder(samples), waves=waves)
