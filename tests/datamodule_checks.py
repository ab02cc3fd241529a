"""DataModuleChecks: what every data set on disk has to hold; its test file subclasses it.

    from tests.datamodule_checks import DataModuleChecks

    class TestFlowers102(DataModuleChecks):
        @pytest.fixture
        def make(self, tmp_path):
            write_flowers(tmp_path)     # a fake tree in the true on-disk layout, a second or less
            return lambda **kwargs: Flowers102DataModule(root=tmp_path, **kwargs)

`make` passes every argument on, so that the checks can set shots, seed, manifest, processor and so on. The tree needs
`shots` + 1 training pictures in at least one class, and two training rows. Class attributes state what differs:

- `shots`: the shots that the checks draw.
- `val_shots`: validation pictures that the checks hold out, for a set without a validation split of its own.
- `picture(sample)`: what says whether two samples show one picture; the file by default.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rft_lightning.datamodules.labelled import LabelledDataModule
from rft_lightning.sample import PromptBatch

SPLITS = ("train", "val", "test")


class DataModuleChecks:
    """See the module: subclass it, name the subclass ``Test...`` and give it the fixture `make`."""

    shots = 2
    val_shots = 1

    @pytest.fixture
    def make(self, tmp_path):
        raise NotImplementedError("A subclass says how its datamodule is built on a fake tree: make(**kwargs).")

    @pytest.fixture(autouse=True)
    def _few_examples_are_fine(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield

    def picture(self, sample) -> Any:
        return str(sample.image) if isinstance(sample.image, Path) else sample.image_id

    # Rows

    def test_samples_are_complete_and_their_ids_unique(self, make):
        data = make()
        assert isinstance(data, LabelledDataModule)
        for split in SPLITS:
            samples, rows = data.split(split), data.chosen(split)
            assert [sample.id for sample in samples] == [row.id for row in rows]
            assert len({sample.id for sample in samples}) == len(samples) > 0
            for sample in samples[:20]:
                assert sample.load_image().size == sample.image_size
                assert sample.load_image().mode == "RGB"
                assert sample.target is not None

    def test_splits_share_no_picture(self, make):
        for settings in ({}, {"val_shots": self.val_shots}, {"val_shots": self.val_shots, "shots": self.shots}):
            data = make(**settings)
            train, val, test = ({self.picture(s) for s in data.split(split)} for split in SPLITS)
            assert not train & test
            assert not train & val

    def test_shots_per_class(self, make):
        everything = pictures_by_class(make().chosen("train"))
        drawn = pictures_by_class(make(shots=self.shots).chosen("train"))
        assert drawn.keys() == everything.keys()
        assert {name: len(found) for name, found in drawn.items()} == {
            name: min(self.shots, len(found)) for name, found in everything.items()
        }
        assert len(drawn) == 1 or any(len(found) > self.shots for found in everything.values())

    def test_instances_as_shots_are_at_most_k_objects_and_whole_pictures(self, make):
        everything = objects_by_picture(make().chosen("train"))
        drawn = objects_by_picture(make(shots=self.shots, shot_unit="instance").chosen("train"))
        assert drawn.items() <= everything.items()
        counts: Counter[str] = Counter()
        for (name, _), objects in drawn.items():
            counts[name] += objects
        assert counts
        assert max(counts.values()) <= self.shots

    @pytest.mark.parametrize("unit", ["image", "instance"])
    def test_shots_are_nested(self, make, unit):
        draws = [ids(make(shots=k, shot_unit=unit).chosen("train")) for k in range(1, self.shots + 2)]
        assert all(set(small) <= set(large) for small, large in pairwise(draws))
        assert unit == "instance" or len(draws[0]) < len(draws[-1])

    def test_validation_shots(self, make):
        drawn = pictures_by_class(make(val_shots=self.val_shots).chosen("val"))
        again = make(val_shots=self.val_shots, shots=1).chosen("val")
        assert drawn
        assert pictures_by_class(again) == drawn, "the number of training shots changes nothing in validation"

    def test_max_rows_and_val_limit(self, make):
        assert len(make(max_rows=2).chosen("train")) == 2
        limited = make(val_limit=1)
        assert 1 <= len(limited.chosen("val")) <= len(make().chosen("val"))
        assert ids(limited.chosen("test")) == ids(make().chosen("test"))

    def test_excluded_pictures_are_in_no_training_row(self, make):
        image = make().chosen("train")[0].image
        left = make(exclude_image_ids=[image]).chosen("train")
        assert image not in {row.image for row in left}
        assert left

    # Determinism

    def test_another_process_with_other_hashes_chooses_the_same(self, make, tmp_path):
        data = make(shots=self.shots, val_shots=self.val_shots)
        file = tmp_path / "datamodule.pickle"
        file.write_bytes(pickle.dumps(data))
        assert elsewhere(file) == json.loads(json.dumps(data.manifest_data()))

    def test_the_seed_decides(self, make):
        first = ids(make(shots=1, seed=0).chosen("train"))
        assert ids(make(shots=1, seed=0).chosen("train")) == first
        assert any(ids(make(shots=1, seed=seed).chosen("train")) != first for seed in range(1, 20))

    def test_a_manifest_gives_the_rows_back(self, make, tmp_path):
        data = make(shots=self.shots, val_shots=self.val_shots, seed=3)
        file, copy = tmp_path / "manifest.json", tmp_path / "copy.json"
        data.write_manifest(file)
        again = make(manifest=file, seed=4)
        for split in SPLITS:
            assert ids(again.chosen(split)) == ids(data.chosen(split))
            assert [s.id for s in again.split(split)] == [s.id for s in data.split(split)]
        again.write_manifest(copy)
        assert copy.read_bytes() == file.read_bytes()
        assert str(tmp_path) not in file.read_text()

    def test_datamodule_and_samples_can_be_pickled(self, make):
        data = make(shots=self.shots)
        samples = data.split("train")
        # Our own bytes, as a spawned worker gets them.
        copies = pickle.loads(pickle.dumps(samples)), pickle.loads(pickle.dumps(data)).split("train")
        for copy in copies:
            assert [sample.id for sample in copy] == [sample.id for sample in samples]
            assert copy[0].load_image().tobytes() == samples[0].load_image().tobytes()

    # Batches

    def test_batches_have_the_right_shapes_with_any_number_of_workers(self, make, tiny_policy):
        batches = {}
        for workers in (0, 2):
            data = self._with_policy(make, tiny_policy, num_workers=workers)
            batches[workers] = list(data.train_dataloader())
            check_shapes(batches[workers][0], size=2)
            assert sum(map(len, data.val_dataloader())) == len(data.split("val"))
        assert len(batches[0]) == len(batches[2])
        for alone, worked in zip(batches[0], batches[2], strict=True):
            assert [(s.id, s.occurrence) for s in alone.samples] == [(s.id, s.occurrence) for s in worked.samples]
            check_equal(alone, worked)

    def test_prompts_are_the_same_in_training_and_validation(self, make, tiny_policy):
        data = self._with_policy(make, tiny_policy)
        sample = data.split("train")[0]
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()
        first, *others = (loader.collate_fn([sample]) for loader in loaders)
        for other in others:
            check_equal(first, other)
            assert first.samples[0].question == other.samples[0].question
        assert type(sample.task) is type(data.split("val")[0].task)

    def _with_policy(self, make, tiny_policy, **kwargs):
        settings = {"processor": tiny_policy, "batch_size": 2, "eval_batch_size": 2, "max_prompt_length": None}
        return make(**settings, shots=self.shots, val_limit=2, **kwargs)

    # Reports

    def test_the_summary_counts_what_is_chosen(self, make):
        data = make(shots=self.shots)
        summary = data.summary()
        assert set(summary) == set(SPLITS)
        for split in SPLITS:
            rows = data.chosen(split)
            per_class = Counter(row.label for row in rows)
            assert summary[split]["rows"] == len(rows)
            assert summary[split]["images"] == len({row.image for row in rows})
            assert summary[split]["classes"] == len(per_class)
            assert summary[split]["rows_per_class"] == {"min": min(per_class.values()), "max": max(per_class.values())}
        drawn = pictures_by_class(data.chosen("train"))
        short = {name: len(found) for name, found in drawn.items() if len(found) < self.shots}
        assert short.items() <= summary["train"]["short"].items()
        json.dumps(summary)


def ids(rows) -> list[str]:
    return [row.id for row in rows]


def pictures_by_class(rows) -> dict[str, set]:
    """Class -> the pictures whose rows show it."""
    found = defaultdict(set)
    for row in rows:
        if row.instances:
            found[row.label].add(row.image)
    return dict(found)


def objects_by_picture(rows) -> dict[tuple, int]:
    """(class, picture) -> number of objects; several rows about them (wordings) count once."""
    return {(row.label, row.image): row.instances for row in rows if row.instances}


def check_shapes(batch: PromptBatch, size: int) -> None:
    assert len(batch.samples) == len(batch) == size
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert batch.input_ids.shape[0] == size
    assert batch.image_counts == [1] * size
    assert batch.vision["pixel_values"].shape[0] == sum(batch.patch_counts)


def check_equal(one: PromptBatch, other: PromptBatch) -> None:
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.attention_mask, other.attention_mask)
    assert one.vision.keys() == other.vision.keys()
    assert all(torch.equal(one.vision[name], other.vision[name]) for name in one.vision)


_ANSWER = """
import json, pickle, sys, warnings
warnings.simplefilter("ignore")
from rft_lightning.datamodules.labelled import LabelledDataModule
out, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    with open(line.strip(), "rb") as file:
        data = pickle.load(file)  # written by this very test
    print(json.dumps(data.manifest_data()), file=out, flush=True)
"""


@cache
def _other_process() -> subprocess.Popen:
    """One process for all data sets, because importing takes longer than all it is asked."""
    here = os.environ.get("PYTHONHASHSEED", "")
    environment = {**os.environ, "PYTHONHASHSEED": "4711" if here != "4711" else "17", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", _ANSWER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=root,
    )
    atexit.register(lambda: (process.stdin.close(), process.wait(10)))
    return process


def elsewhere(file: Path) -> dict[str, Any]:
    """The manifest of a pickled datamodule, made in a process that hashes strings differently."""
    process = _other_process()
    process.stdin.write(f"{file}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, "the other process ended; its error stands above"
    return json.loads(answer)
