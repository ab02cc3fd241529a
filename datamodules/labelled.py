"""LabelledDataModule: what the data sets on disk share: few-shot draws, validation shots, exclusions, manifests."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from rft_lightning.datamodules import bad_images
from rft_lightning.datamodules import manifest as manifests
from rft_lightning.datamodules.bad_images import ReadableRows, check_headers
from rft_lightning.datamodules.base import RFTDataModule
from rft_lightning.datamodules.fewshot import draw_shots, hash_order, in_turn
from rft_lightning.datamodules.picture_ids import read_ids
from rft_lightning.datamodules.published_draws import CoOpSplit, GivenRows, read_given
from rft_lightning.datamodules.rows import Row, SampleRows
from rft_lightning.errors import ConfigConflictError, EmptyClassError
from rft_lightning.sample import Sample


class LabelledDataModule(RFTDataModule):
    """A data set on disk with a reproducible few-shot training split.

    A subclass lists the rows of its splits and makes samples of them; everything that chooses among rows is done here,
    by `seed` and stable names alone, so that a split is the same on any machine and number of processes. Where the
    files have no validation split, validation uses training pictures that `val_shots` holds out, else the test split.

    Args:
        root: folder of the data set.
        classes: names of the classes to ask for; null for all. A class without training examples is then left out with
            a warning, while one that was named is an error.
        shots: training examples per class; null for all.
        shot_unit: what a shot is: ``image`` (a picture with all its objects of the class, as in Visual-RFT) or
            ``instance`` (an object, as in few-shot detection: pictures are taken while all their objects fit, see
            :mod:`rft_lightning.datamodules.fewshot`).
        nested_shots: whether k shots contain k - 1 shots of the same seed; false draws anew for every k.
        val_shots: pictures per class in validation, drawn by `seed` whatever `shots` is, with all that is asked about
            them; null for all. A data set without a validation split of its own holds them out of training.
        val_limit: validate on so many rows at most, spread over the classes, the same for every seed; null for all.
        max_rows: most training rows, drawn after the shots; null for no limit.
        exclude_image_ids: pictures that no training row (nor a row held out of training) may show: their ids, or a JSON
            file with a list of ids or with COCO's or LVIS's `images`.
        manifest: a manifest that `rft prepare` wrote, or a published draw: its rows are used, in its order, and nothing
            is drawn (see :mod:`rft_lightning.datamodules.published_draws` for what is recognised, and for the one kind
            that is drawn from).
        on_bad_image: what to do with a picture that cannot be read. ``raise`` at the start, as far as its header shows
            it (of up to 10,000 pictures per split), else when it is decoded. ``skip`` decodes the pictures at the start
            (of more than 10,000 it reads the headers), names the bad ones in a warning and takes the next picture of
            the class in a draw; elsewhere their rows are left out.
        **kwargs: see :class:`RFTDataModule`.

    Raises:
        ConfigConflictError: an argument is out of its range, or (in `samples`) a manifest does not fit the data.
        DatasetNotFoundError: (in `samples`) files are missing, or a picture cannot be read.
        AnnotationError: (in `samples`) files cannot be used.
        EmptyClassError: (in `samples`) a named class has no training example.
    """

    # Whether the official files have a validation split of their own.
    has_val: ClassVar[bool] = True

    def __init__(
        self,
        *,
        root: str | Path,
        classes: list[str] | str | None = None,
        shots: int | None = None,
        shot_unit: Literal["image", "instance"] = "image",
        nested_shots: bool = True,
        val_shots: int | None = None,
        val_limit: int | None = None,
        max_rows: int | None = None,
        exclude_image_ids: list[int | str] | str | Path | None = None,
        manifest: str | Path | None = None,
        on_bad_image: Literal["raise", "skip"] = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (
            ("shots", shots), ("val_shots", val_shots), ("val_limit", val_limit), ("max_rows", max_rows),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise ConfigConflictError(f"Expected {name} >= 1 or null, found {value}.")
        if shot_unit not in ("image", "instance"):
            raise ConfigConflictError(f"Expected shot_unit image or instance, found {shot_unit!r}.")
        if on_bad_image not in ("raise", "skip"):
            raise ConfigConflictError(f"Expected on_bad_image raise or skip, found {on_bad_image!r}.")
        self.root, self.classes = Path(root).expanduser(), classes
        self.shots, self.shot_unit, self.nested_shots = shots, shot_unit, nested_shots
        self.val_shots, self.val_limit, self.max_rows = val_shots, val_limit, max_rows
        self.exclude_image_ids, self.on_bad_image = exclude_image_ids, on_bad_image
        self.manifest = None if manifest is None else Path(manifest).expanduser()
        self._chosen: dict[str, tuple[str, list[Row]]] = {}

    @abstractmethod
    def rows(self, split: str) -> Sequence[Row]:
        """All rows of "train", "val" or "test" about the wanted classes, in a stable order; "val" only with `has_val`.

        Raises:
            DatasetNotFoundError: files are missing.
            AnnotationError: files cannot be used.
            ConfigConflictError: a class is not in the data set.
        """

    @abstractmethod
    def maker(self, split: str, rows: Sequence[Row]) -> Callable[[Row], Sample]:
        """The function that makes samples of these rows, holding no more of the data set than they need; picklable.

        Args:
            split: the split that lists the rows, see :meth:`source`.
            rows: the rows.

        Raises:
            DatasetNotFoundError: a picture is missing.
            AnnotationError: a picture does not fit its annotation.
        """

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes that are asked for, in the data set's order; [] where there are none."""

    # What a subclass may add

    def complete(self, rows: list[Row], usable: Callable[[Row], bool] | None) -> list[Row]:
        """The training rows, made of the drawn ones: at most `max_rows`; negatives may be added here.

        Args:
            rows: the rows of the drawn shots.
            usable: whether the picture of a row can be read; None: take it.
        """
        return self.limit(rows, self.max_rows, salt="rows", usable=usable)

    def questions(self, rows: list[Row]) -> list[Row]:
        """What validation asks about training pictures that are held out; `rows` are all their training rows."""
        return rows

    def limit_validation(self, rows: list[Row]) -> list[Row]:
        """At most `val_limit` rows, taken from all classes in turn, with and without an object of the class in turn."""
        if self.val_limit is None or len(rows) <= self.val_limit:
            return rows
        kept = set(in_turn({row.id: (row.label, row.instances == 0) for row in rows})[: self.val_limit])
        return [row for row in rows if row.id in kept]

    def look_up(self, split: str, ids: Iterable[str]) -> dict[str, Row]:
        """The rows with these ids, as far as `split` has them; rows that a manifest may name and `rows` not, too."""
        wanted = set(ids)
        return {row.id: row for row in self.rows(split) if row.id in wanted}

    def wording(self, split: str) -> dict[str, Any]:
        """How a split is spoken of in messages: the arguments `split`, `looked_at` and `remark` of `draw_shots`."""
        return {"split": split}

    # What is chosen

    def samples(self, split: str) -> Sequence[Sample]:
        """See the base class."""
        rows = self.chosen(split)
        make = self.maker(self.source(split), rows)
        if self.on_bad_image == "raise":
            check_headers(rows, make)
        return SampleRows(rows, make)

    def drawn(self, split: str) -> list[Row]:
        """The rows that a split holds: what a manifest states."""
        return self._choice(split)[1]

    def chosen(self, split: str) -> list[Row]:
        """The rows that a split uses: of those that it holds, the ones that are asked."""
        return self.drawn(split)

    def source(self, split: str) -> str:
        """The split whose rows `split` uses: another one where validation has none of its own."""
        return self._choice(split)[0]

    @cached_property
    def given(self) -> GivenRows | None:
        """What `manifest` states."""
        return None if self.manifest is None else read_given(self.manifest, self)

    @cached_property
    def excluded(self) -> frozenset[str]:
        """Ids of the pictures that no training row may show, as text."""
        listed = self.exclude_image_ids
        if listed is None:
            return frozenset()
        return frozenset(map(str, listed if isinstance(listed, list) else read_ids(Path(listed).expanduser())))

    def manifest_data(self) -> dict[str, Any]:
        """The rows of all splits with the settings that decided them, as JSON: ids, hashes, classes short of shots."""
        return manifests.describe(self)

    def write_manifest(self, path: str | Path) -> None:
        """Write :meth:`manifest_data` in one step; the same bytes on every machine."""
        manifests.write(self.manifest_data(), Path(path).expanduser())

    def summary(self) -> dict[str, Any]:
        """Per split: number of images, rows and classes, fewest and most rows of a class, classes short of shots."""
        return {split: self._summary(split) for split in self.splits}

    def short(self, split: str) -> dict[str, int]:
        """Wanted classes with fewer examples in a split than were asked for, and how many they have."""
        shots = {"train": self.shots, "val": self.val_shots}.get(split)
        if shots is None:
            return {}
        by_instance = split == "train" and self.shot_unit == "instance"
        rows = self.drawn(split)
        if split == "val" and self._given_rows("val") is None:
            rows = self._validation_pool[1]  # what `val_limit` leaves out is there
        shown = {(row.label, row.image): row.instances if by_instance else 1 for row in rows if row.instances}
        counts = Counter({name: 0 for name in self.class_names})
        for (label, _), count in shown.items():
            counts[label] += count
        return {name: count for name, count in counts.items() if count < shots}

    def limit(
        self, rows: list[Row], limit: int | None, *, salt: str, usable: Callable[[Row], bool] | None = None
    ) -> list[Row]:
        """At most `limit` of the rows, drawn by `seed`, in their order."""
        if limit is None:
            return rows
        by_key = {self.key(row): row for row in rows}
        kept: set[Any] = set()
        for key in hash_order(by_key, seed=self.seed, salt=salt):
            if len(kept) == limit:
                break
            if usable is None or usable(by_key[key]):
                kept.add(key)
        return [row for row in rows if self.key(row) in kept]

    def key(self, row: Row) -> Any:
        """What `max_rows` is drawn by: text, or numbers."""
        return row.id

    def _check_excluded(self, rows: list[Row]) -> None:
        """The rows of a manifest may not show what must not be trained on."""
        shown = [row.id for row in rows if str(row.image) in self.excluded]
        if shown:
            raise ConfigConflictError(
                f"{len(shown)} training rows of {self.manifest} show pictures that data.exclude_image_ids rules out: "
                f"{', '.join(shown[:3])}{', ...' * (len(shown) > 3)}. Draw anew without data.manifest, or take those "
                "pictures out of data.exclude_image_ids."
            )

    def _choice(self, split: str) -> tuple[str, list[Row]]:
        split = "test" if split == "predict" else split
        if split not in self._chosen:
            given = self._given_rows(split)
            if given is not None and split == "train":
                self._check_excluded(given[1])
            if given is not None or split != "train":
                source, rows = given or (self._validation_rows() if split == "val" else self._listed("test"))
                self._chosen[split] = source, self._readable(source, rows)
            else:
                self._chosen[split] = self._training_rows()
        return self._chosen[split]

    def _listed(self, split: str) -> tuple[str, list[Row]]:
        """All rows of a split, before anything is drawn."""
        given = self.given.choose(self, split) if isinstance(self.given, CoOpSplit) else None
        return given or (split, list(self.rows(split)))

    def _given_rows(self, split: str) -> tuple[str, list[Row]] | None:
        """The rows that the manifest fixes; a CoOp split is drawn from like the data set's own."""
        return None if self.given is None or isinstance(self.given, CoOpSplit) else self.given.choose(self, split)

    def _training_rows(self) -> tuple[str, list[Row]]:
        source, listed = self._listed("train")
        held_out = {row.image for row in self._held_out}
        pool = [row for row in self._allowed(listed) if row.image not in held_out]
        self._check_left(listed, pool)
        few = self.shots is not None or self.max_rows is not None
        usable = self._readable_rows(source, decode=few or len(pool) <= bad_images.AT_START)
        drawn = self._draw(pool, self.shots, "train", usable=usable if self.shots is not None else None)
        if usable is not None and not few:
            drawn = usable.keep(drawn)
        rows = self.complete(drawn, usable)
        if usable is not None:
            usable.warn(self.wording("train")["split"])
        self._warn_about_left_out(drawn)
        return source, rows

    def _validation_rows(self) -> tuple[str, list[Row]]:
        source, rows = self._validation_pool
        return source, self.limit_validation(rows)

    @cached_property
    def _validation_pool(self) -> tuple[str, list[Row]]:
        """What validation may ask, before `val_limit`."""
        if self._has_val():
            source, rows = self._listed("val")
            if self.val_shots is not None:
                drawn = {row.image for row in self._draw_readable(source, rows)}
                rows = [row for row in rows if row.image in drawn]
        elif self.val_shots is not None:
            source, rows = self._listed("train")[0], self.questions(self._held_out)
        else:
            source, rows = self._listed("test")
        return source, rows

    def _draw_readable(self, source: str, pool: list[Row]) -> list[Row]:
        """The `val_shots` rows, the next picture of the class in the place of one that cannot be read."""
        usable = self._readable_rows(source, decode=True)
        drawn = self._draw(pool, self.val_shots, "val", usable=usable)
        if usable is not None:
            usable.warn(self.wording(source)["split"])
        return drawn

    def _has_val(self) -> bool:
        return "val" in self.given.splits if isinstance(self.given, CoOpSplit) else self.has_val

    @cached_property
    def _held_out(self) -> list[Row]:
        """All training rows of the pictures that serve as validation where there is no split for it."""
        if self.val_shots is None or self._has_val():
            return []
        given = self._given_rows("train")
        trained = {row.image for row in given[1]} if given else set()
        source, listed = self._listed("train")
        pool = [row for row in self._allowed(listed) if row.image not in trained]
        drawn = {row.image for row in self._draw_readable(source, pool)}
        return [row for row in pool if row.image in drawn]

    def _allowed(self, rows: list[Row]) -> list[Row]:
        """Those that show no excluded picture."""
        if self.exclude_image_ids is None:
            return rows
        left = [row for row in rows if str(row.image) not in self.excluded]
        if rows and len(left) == len(rows) and self.excluded:
            warnings.warn(
                f"No training row of {self.wording('train')['split']} shows one of the {len(self.excluded)} pictures "
                f"in data.exclude_image_ids (ids there look like {rows[0].image!r}).",
                stacklevel=2,
            )
        return left

    def _draw(
        self, pool: list[Row], shots: int | None, split: str, *, usable: Callable[[Row], bool] | None = None
    ) -> list[Row]:
        """The rows of the drawn (picture, class) pairs, in the order of the pool; what is not there is no shot."""
        pool = pool if shots is None else [row for row in pool if row.instances]
        rows = {(row.image, row.label): row for row in pool}
        training = split == "train"
        drawn = set(
            draw_shots(
                rows,
                shots,
                seed=self.seed,
                classes=self.class_names if training and self.classes is not None else None,
                unit=self.shot_unit if training else "image",
                instances={pair: row.instances for pair, row in rows.items()},
                nested=self.nested_shots,
                usable=None if usable is None else lambda image, label: usable(rows[image, label]),
                salt="shots" if training else "val_shots",
                **self.wording(split if training or self._has_val() else "train"),
            )
        )
        return [row for row in pool if (row.image, row.label) in drawn]

    def _check_left(self, listed: list[Row], pool: list[Row]) -> None:
        """Say so where it is our settings that leave nothing of a class, or nothing at all."""
        left = {row.label for row in pool if row.instances}
        lost = sorted({row.label for row in listed if row.instances} - left)
        if lost and (self.classes is not None or not left):
            held_out, excluded = {row.image for row in self._held_out}, self.excluded
            taken = sum(row.image in held_out for row in listed if row.label in lost)
            out = sum(str(row.image) in excluded for row in listed if row.label in lost)
            raise EmptyClassError(
                f"No training picture is left of {', '.join(map(repr, lost[:5]))}{', ...' * (len(lost) > 5)}: "
                f"data.val_shots={self.val_shots} holds {taken} out for validation and data.exclude_image_ids leaves "
                f"{out} out. Lower data.val_shots, or exclude fewer pictures."
            )

    def _warn_about_left_out(self, rows: list[Row]) -> None:
        drawn = {row.label for row in rows}
        absent = [name for name in self.class_names if name not in drawn]
        if absent:
            split = self.wording("train")["split"]
            warnings.warn(f"Left out of training, no example in {split}: {', '.join(absent)}.", stacklevel=2)

    def _readable_rows(self, source: str, *, decode: bool) -> ReadableRows | None:
        if self.on_bad_image == "raise":
            return None
        return ReadableRows(lambda rows: self.maker(source, rows), decode=decode)

    def _readable(self, source: str, rows: list[Row]) -> list[Row]:
        """The rows of a split that is not drawn, or whose draw is fixed, without those of bad pictures."""
        usable = self._readable_rows(source, decode=len({row.image for row in rows}) <= bad_images.AT_START)
        if usable is None:
            return rows
        kept = usable.keep(rows)
        usable.warn(self.wording(source)["split"])
        return kept

    def _summary(self, split: str) -> dict[str, Any]:
        rows = self.chosen(split)
        per_class = Counter(row.label for row in rows)
        return {
            "images": len({row.image for row in rows}),
            "rows": len(rows),
            "classes": len(per_class),
            "rows_per_class": {"min": min(per_class.values(), default=0), "max": max(per_class.values(), default=0)},
            "short": self.short(split),
        }


__all__ = ["LabelledDataModule"]
