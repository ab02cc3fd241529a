"""MixtureDataModule: several data sets in one run, with weights."""

from __future__ import annotations

import bisect
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from rft_lightning.datamodules.base import RFTDataModule
from rft_lightning.datamodules.samplers import RolloutBatchSampler
from rft_lightning.errors import ConfigConflictError
from rft_lightning.sample import DetectionTarget, PresenceTarget, Sample
from rft_lightning.seeding import derived_seed

# Apart from each other, so that category 1 of one member is not category 1 of the next.
_CATEGORIES = 1_000_000
_SHARED = ("processor", "batch_size", "oversample", "eval_batch_size", "num_workers")


@dataclass
class Member:
    """One data set of a mixture.

    Attributes:
        data: the datamodule; what all members share (processor, batch sizes, prompt settings) is left to the mixture.
        weight: its share of the training rows, relative to the others; greater than 0.
    """

    data: RFTDataModule
    weight: float = 1.0


class MixtureDataModule(RFTDataModule):
    """Several data sets in one run, each sample with its own task.

    Training rows of the members alternate at random, by `seed`, so that every global batch holds them in the proportion
    of their weights on average, and one pass of as many rows as all members have together holds them in it exactly (up
    to one row). A member that is small for its weight is repeated, in a new order each time; of one that is large a
    part is left for the next passes. Validation, test and prediction ask everything of every member once, so their
    metrics are those of the samples of all members together.

    Sample and picture ids begin with the member's number, and its categories are told apart from those of others.

    Args:
        members: the data sets with their weights. A member takes processor, batch sizes, number of workers and prompt
            settings from the mixture, and its `seed` where it has none of its own.
        **kwargs: see :class:`RFTDataModule`.

    Raises:
        ConfigConflictError: no members, a weight that is not positive, or a member that sets something shared to
            another value.
    """

    def __init__(self, *, members: list[Member], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not members or not all(0 < member.weight < float("inf") for member in members):
            raise ConfigConflictError(
                f"Expected members with weights greater than 0, found {[member.weight for member in members]}."
            )
        self.members = members
        for number, member in enumerate(members):
            self._check_member(number, member.data)
            if not member.data.has_own_seed:
                member.data.seed = self.seed

    def parts(self) -> dict[str, RFTDataModule]:
        """See the base class; a member is named by its number and class."""
        for member in self.members:
            self._share(member.data)
        return {f"{n}-{type(member.data).__name__}": member.data for n, member in enumerate(self.members)}

    def summary(self) -> dict[str, Any]:
        """See the base class: a line per member and split."""
        parts = self.parts().items()
        return {f"{name} {split}": numbers for name, part in parts for split, numbers in part.summary().items()}

    def prepare_data(self) -> None:
        """Those of the members."""
        for member in self.members:
            member.data.prepare_data()

    def setup(self, stage: str) -> None:
        """See the base class. The members' own also lets go of what their samples do not need."""
        for part in self.parts().values():
            part.setup(stage)
        super().setup(stage)

    def samples(self, split: str) -> Sequence[Sample]:
        """See the base class."""
        return MixedSamples([part.split(split) for part in self.parts().values()])

    def unasked(self, split: str, limit: int | None = None) -> Sequence[Sample]:
        """See the base class: those of all members, which are asked one after the other."""
        found = []
        for part in self.parts().values():
            if limit is not None and limit <= 0:
                break
            found.append(part.unasked(split, limit))
            limit = None if limit is None else limit - len(part.split(split))
        return MixedSamples(found)

    def train_sampler(self, size: int, *, rank: int, world_size: int) -> RolloutBatchSampler:
        """See the base class."""
        sizes = [len(member.data.split("train")) for member in self.members]
        weights = [member.weight for member in self.members]
        return MixtureBatchSampler(
            sizes,
            weights,
            self.batch_size,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            oversample=self.oversample,
        )

    def _check_member(self, number: int, data: RFTDataModule) -> None:
        defaults, shared = inspect.signature(RFTDataModule).parameters, _shared(self)
        for name, value in _shared(data).items():
            own = shared[name]
            if value not in (defaults[name].default, own):
                raise ConfigConflictError(
                    f"Member {number} of the mixture ({type(data).__name__}) sets {name} to {value!r}, the mixture "
                    f"{own!r}. All members share it: set it for the mixture and leave it out of the member."
                )

    def _share(self, data: RFTDataModule) -> None:
        """Give a member what the mixture has; the processor is known only after it was made."""
        for name in _SHARED:
            setattr(data, name, getattr(self, name))
        data.encoder_settings = self.encoder_settings
        data._encoder = None if self.processor is None else self.encoder


class MixtureBatchSampler(RolloutBatchSampler):
    """A stream of rows of several data sets, which lie behind one another, in the proportion of weights.

    A pass has as many entries as there are rows. How many of them a member gets is its share of the pass, rounded up or
    down at random so that the mean is exact; which they are continues the member's own stream of permutations.

    Args:
        sizes: number of rows of each member.
        weights: their weights.
        batch_size: see :class:`RolloutBatchSampler`, as for what follows.
        rank: this process.
        world_size: number of processes.
        seed: seed of the order.
        oversample: waves per batch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        oversample: int = 1,
    ) -> None:
        super().__init__(sum(sizes), batch_size, rank=rank, world_size=world_size, seed=seed, oversample=oversample)
        self.weights = list(weights)
        self._members = [RolloutBatchSampler(n, 1, seed=derived_seed(seed, m)) for m, n in enumerate(sizes)]
        self._offsets = [0, *accumulate(sizes)][:-1]
        self._used = [[0] * len(sizes)]  # entries of each member before each pass

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {**super().state_dict(), "weights": self.weights, "sizes": [member.size for member in self._members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class.

        Raises:
            ConfigConflictError: the members or their weights are others, too.
        """
        own = self.state_dict()
        for name, word in (("sizes", "rows per member"), ("weights", "weights")):
            if state[name] != own[name]:
                raise ConfigConflictError(
                    f"The checkpoint was written with a mixture of {word} {state[name]}, now they are {own[name]}; "
                    "resume with the same data settings, or start a new run from the exported policy."
                )
        super().load_state_dict(state)

    def _permutation(self, number: int) -> list[int]:
        while len(self._used) <= number + 1:
            counts = self._counts(len(self._used) - 1)
            self._used.append([used + count for used, count in zip(self._used[-1], counts, strict=True)])
        spans = zip(self._members, self._used[number], self._used[number + 1], strict=True)
        streams = [member._stream(start, stop) for member, start, stop in spans]
        # Only whose turn it is is shuffled: a member's rows come in the order of its own stream.
        turns = [member for member, rows in enumerate(streams) for _ in rows]
        order = torch.randperm(len(turns), generator=self._generator(1, number)).tolist()
        rows = [iter(stream) for stream in streams]
        return [self._offsets[member] + next(rows[member]) for member in (turns[place] for place in order)]

    def _counts(self, number: int) -> list[int]:
        """How many entries of a pass each member gets: points at distance 1 from a random start fall into its share."""
        start = float(torch.rand((), generator=self._generator(0, number), dtype=torch.float64))
        total = sum(self.weights)
        ends = [self.size * reached / total for reached in accumulate(self.weights)]
        reached = [*(min(self.size, max(0, math.ceil(end - start))) for end in ends[:-1]), self.size]
        return [stop - begin for begin, stop in pairwise([0, *reached])]

    def _generator(self, *words: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, *words))


class MixedSamples(Sequence):
    """The samples of all members behind one another, ids and categories told apart."""

    def __init__(self, members: Sequence[Sequence[Sample]]) -> None:
        self.members = members
        self._ends = list(accumulate(map(len, members)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        position %= len(self)
        member = bisect.bisect_right(self._ends, position)
        sample = self.members[member][position - (self._ends[member - 1] if member else 0)]
        target = sample.target
        if isinstance(target, DetectionTarget | PresenceTarget):
            target = replace(target, category_id=member * _CATEGORIES + target.category_id)
        return replace(sample, id=f"{member}/{sample.id}", image_id=f"{member}/{sample.image_id}", target=target)


def _shared(data: RFTDataModule) -> dict[str, Any]:
    return {**{name: getattr(data, name) for name in _SHARED}, **data.encoder_settings}


__all__ = ["Member", "MixedSamples", "MixtureBatchSampler", "MixtureDataModule"]
