"""QueriedDataModule: which categories are asked of which pictures: all, an oracle's, or those of a presence map."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rft_lightning.datamodules.labelled import LabelledDataModule
from rft_lightning.datamodules.rows import Row, SampleRows
from rft_lightning.datamodules.selection import with_close_matches
from rft_lightning.errors import ConfigConflictError
from rft_lightning.presence_map import ImageId, PresenceMap
from rft_lightning.rewards.options import check_choice
from rft_lightning.sample import Sample
from rft_lightning.tasks import DetectionTask, PresenceTask

QUERY_MODES = ("all", "gt", "map")
_PREDICTIONS = (
    "If it asked for all of them, give its predictions.jsonl, which says so, in place of this file: `rft evaluate` "
    "then counts all objects as missed."
)


class QueriedDataModule(LabelledDataModule):
    """A set whose rows ask for one category of one picture.

    Under ``query_mode: map`` evaluation chooses its rows as under ``all`` and asks those alone that the map has: of the
    others, those with a box are :meth:`unasked` and count as missed, and those without are right to be left out. So
    `val_shots`, `val_limit` and a manifest choose among the same rows in both modes. Every chosen picture has to be in
    the map. A category that the published form of a map names nowhere is not asked, with a warning, since that form
    does not say what was asked; pictures of the map that the split does not have are counted in a warning. Where the
    predictions of a first stage show that it asked everything and found nothing, the split is empty, with a warning:
    `rft evaluate` then asks nothing and counts every object as missed.

    Args:
        negative_fraction: share of training rows, in [0, 1), that ask for what the picture does not show.
        query_mode: questions in validation, test and prediction: ``all``, ``gt`` or ``map``.
        presence_map: the map, see :meth:`rft_lightning.presence_map.PresenceMap.load`; null unless `query_mode` is
            ``map``.
        task: DetectionTask by default. Under a PresenceTask the same rows ask whether the category is there.
        **kwargs: see :class:`LabelledDataModule`.

    Raises:
        ConfigConflictError: an argument is out of its range or contradicts another one, or (in `samples`) the map does
            not fit the data; or (in `setup`) it leaves nothing to ask, which no loop of a Trainer can do.
        DatasetNotFoundError: (in `samples`) there is no such map.
        AnnotationError: (in `samples`) the map cannot be used.
    """

    def __init__(
        self,
        *,
        negative_fraction: float = 0.0,
        query_mode: Literal["all", "gt", "map"] = "all",
        presence_map: str | Path | None = None,
        task: DetectionTask | PresenceTask | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= negative_fraction < 1:
            raise ConfigConflictError(f"Expected 0 <= negative_fraction < 1, found {negative_fraction}.")
        check_choice("query_mode", query_mode, QUERY_MODES)
        if (presence_map is not None) != (query_mode == "map"):
            raise ConfigConflictError(
                f"data.query_mode is {query_mode} and data.presence_map {presence_map}; expected a map with query_mode "
                "map, and none with all and gt."
            )
        if query_mode == "map" and isinstance(task, PresenceTask):
            raise ConfigConflictError(
                "data.query_mode is map with a PresenceTask, which would ask again only where an earlier stage said "
                "yes. Ask with query_mode all, or take a DetectionTask."
            )
        self.negative_fraction, self.query_mode = negative_fraction, query_mode
        self.presence_map = None if presence_map is None else Path(presence_map).expanduser()
        self.task = task if task is not None else DetectionTask()
        self._asked_rows: dict[str, list[Row]] = {}
        # With each split's, how many questions come before it.
        self._unasked: dict[str, tuple[SampleRows, list[int]]] = {}

    @abstractmethod
    def pictures(self, split: str) -> Collection[ImageId]:
        """The ids of all pictures of "train", "val" or "test"."""

    def chosen(self, split: str) -> list[Row]:
        """See the base class; under ``query_mode: map`` the rows that the map asks."""
        drawn = self.drawn(split)
        if self.query_mode != "map" or split == "train":
            return drawn
        name = "test" if split == "predict" else split
        if name not in self._asked_rows:
            found = self._presence
            self._check_map(found, name, drawn)
            self._asked_rows[name] = [row for row in drawn if found.asks(row.image, row.label)]
        return self._asked_rows[name]

    def split(self, name: str) -> Sequence[Sample]:
        """See the base class; empty where a first stage that asked everything found nothing of what is there."""
        if name not in self._splits and self.unasked(name) and not self.chosen(name):
            self._splits[name] = self.samples(name)
        return super().split(name)

    def setup(self, stage: str) -> None:
        """See the base class."""
        super().setup(stage)
        if empty := [name for name, samples in self._splits.items() if not samples]:
            raise ConfigConflictError(
                f"By the presence map {self.presence_map} there is nothing to ask in the {empty[0]} split, and a loop "
                "without a question measures nothing. `rft evaluate` counts all objects as missed."
            )

    def samples(self, split: str) -> Sequence[Sample]:
        """See the base class."""
        self.unasked(split)  # while the annotations are at hand
        return super().samples(split)

    def unasked(self, split: str, limit: int | None = None) -> Sequence[Sample]:
        """See the base class."""
        if self.query_mode != "map" or split == "train":
            return ()
        if split not in self._unasked:
            rows, before = self._spared(split)
            self._unasked[split] = SampleRows(rows, self.maker(self.source(split), rows)), before
        samples, before = self._unasked[split]
        return samples if limit is None else samples[: bisect_left(before, limit)]

    def _spared(self, split: str) -> tuple[list[Row], list[int]]:
        """Rows about what is there that the map does not ask, and how many questions come before each."""
        asked = {row.id for row in self.chosen(split)}
        rows, before, count = [], [], 0
        for row in self.drawn(split):
            if row.id in asked:
                count += 1
            elif row.instances:
                rows.append(row)
                before.append(count)
        return rows, before

    def _summary(self, split: str) -> dict[str, Any]:
        mapped = self.query_mode == "map" and split != "train"
        return {**super()._summary(split), **({"unasked": len(self._spared(split)[0])} if mapped else {})}

    @cached_property
    def _presence(self) -> PresenceMap:
        assert self.presence_map is not None
        return PresenceMap.load(self.presence_map)

    def _check_map(self, found: PresenceMap, split: str, rows: Sequence[Row]) -> None:
        """See that the first stage asked what the second one needs to know."""
        images = {str(row.image) for row in rows}
        missing = sorted(images - found.present.keys())
        if missing:
            raise ConfigConflictError(
                f"{len(missing)} of the {len(images)} pictures of the {split} split are not in the presence map "
                f"{found.source}, such as {missing[0]}: nobody knows what they show. Run the first stage on the same "
                "pictures (data.root, split, data.val_limit), or, where it found nothing in them, list them with []."
            )
        known = set(map(str, self.pictures(self.source(split))))
        others = len(found.present.keys() - known)
        if others:
            warnings.warn(
                f"{others} of the {len(found.present)} pictures of the presence map {found.source} are not among the "
                f"{len(known)} of the {split} split; they are not used.",
                stacklevel=2,
            )
        if found.answered is None:
            _check_names(found, {row.label for row in rows})
        else:
            open_pairs = [row for row in rows if (str(row.image), row.label) not in found.answered]
            if open_pairs:
                raise ConfigConflictError(
                    f"{found.source} has no answer to {len(open_pairs)} of the {len(rows)} questions of the {split} "
                    f"split, such as {open_pairs[0].label!r} in image {open_pairs[0].image}. Run the first stage with "
                    "the same data.classes, or give data.classes that it was run with."
                )
        if not rows or any(found.asks(row.image, row.label) for row in rows):
            return
        nothing = f"By the presence map {found.source} no picture of the {split} split shows any of the wanted classes"
        if found.answered is None:
            raise ConfigConflictError(
                f"{nothing}, so there is nothing to ask. Is it of another data set? Else look at the answers of the "
                f"first stage. {_PREDICTIONS}"
            )
        warnings.warn(
            f"{nothing}: all {len(rows)} answers of the first stage are no, or could not be read. Nothing is asked, "
            "and all objects count as missed.",
            stacklevel=2,
        )


def _check_names(found: PresenceMap, wanted: set[str]) -> None:
    """See that a published map knows the wanted names: one that it spells otherwise would never be asked."""
    names = {name for listed in found.present.values() for name in listed}
    unknown = sorted(wanted - names)
    if not unknown:
        return
    if not names:
        raise ConfigConflictError(
            f"The presence map {found.source} names no category in any of its {len(found.present)} pictures: all "
            f"answers of the first stage were no, or could not be read, so there is nothing to ask. {_PREDICTIONS}"
        )
    matches = "; ".join(with_close_matches(name, names) for name in unknown[:5]) + "; ..." * (len(unknown) > 5)
    if len(unknown) == len(wanted):
        raise ConfigConflictError(
            f"The presence map {found.source} names none of the wanted classes: {matches}. It names "
            f"{', '.join(map(repr, sorted(names)[:20]))}. Give a map of the same data set and classes, or "
            "spell its names as the data set does."
        )
    warnings.warn(
        f"The presence map {found.source} names {len(unknown)} of the {len(wanted)} wanted classes nowhere: {matches}. "
        "The first stage found them in no picture, or was not asked: their objects count as missed.",
        stacklevel=2,
    )


__all__ = ["QUERY_MODES", "QueriedDataModule"]
