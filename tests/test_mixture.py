"""MixtureDataModule: shares of a batch, shared settings, ids told apart."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from rft_lightning.cli import main
from rft_lightning.datamodules import COCODetectionDataModule, Member, MixtureDataModule, ShapesDataModule
from rft_lightning.datamodules.mixture import MixtureBatchSampler
from rft_lightning.errors import ConfigConflictError
from rft_lightning.tasks import ClassificationTask, DetectionTask

CONFIGS = Path(__file__).parent.parent / "configs"


def shapes(task=None, **kwargs) -> ShapesDataModule:
    return ShapesDataModule(task=task or DetectionTask(), **{"train_size": 6, "val_size": 3, "test_size": 2, **kwargs})


def mixture(weights=(1.0, 1.0), **kwargs) -> MixtureDataModule:
    members = [shapes(), shapes(ClassificationTask(), train_size=4)]
    pairs = zip(members, weights, strict=True)
    return MixtureDataModule(members=[Member(data, weight) for data, weight in pairs], **kwargs)


def stream(sampler: MixtureBatchSampler, batches: int) -> list[int]:
    return [row for number in range(batches) for row, _ in sampler.batch(number)]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1), (5, 1e-3)])
def test_rows_follow_the_weights(weights):
    sizes = [50, 7, 30][: len(weights)]
    sampler = MixtureBatchSampler(sizes, weights, 8, seed=3)
    rows = stream(sampler, 2000)
    members = Counter(0 if row < 50 else 1 if row < 57 else 2 for row in rows)
    for member, weight in enumerate(weights):
        # Each pass is off by less than one row; 16,000 rows are a few hundred passes.
        assert members[member] == pytest.approx(len(rows) * weight / sum(weights), abs=30)


def test_every_pass_holds_the_weights_exactly():
    sampler = MixtureBatchSampler([50, 10], (3, 1), 60, seed=1)
    for number in range(20):
        assert sum(row < 50 for row, _ in sampler.batch(number)) == 45


def test_every_row_of_a_member_comes_before_one_comes_again():
    sampler = MixtureBatchSampler([50, 7], (1, 1), 4, seed=0)
    small = [row for row in stream(sampler, 200) if row >= 50]
    for start in range(0, len(small) - 7, 7):
        assert len(set(small[start : start + 7])) == 7


def test_a_global_batch_is_the_same_on_any_number_of_processes():
    alone = MixtureBatchSampler([20, 5], (1, 2), 8, seed=2)
    parts = [MixtureBatchSampler([20, 5], (1, 2), 2, rank=rank, world_size=4, seed=2) for rank in range(4)]
    for number in (0, 7, 3):
        assert alone.batch(number) == [entry for part in parts for entry in part.batch(number)]


def test_small_members_are_repeated_and_their_occurrences_counted():
    sampler = MixtureBatchSampler([20, 1], (1, 1), 8, seed=2)
    entries = [entry for entry in sampler.batch(0) if entry[0] == 20]
    assert [occurrence for _, occurrence in entries] == list(range(len(entries)))
    assert len(entries) > 1


def test_it_resumes_in_the_middle_and_refuses_another_mixture():
    def made(*weights):
        return MixtureBatchSampler([20, 5], weights, 2, seed=2)

    whole = made(1, 2)
    expected = [*whole, *whole]
    first = made(1, 2)
    begun = list(islice(iter(first), 5))
    second = made(1, 2)
    second.load_state_dict(first.state_dict())
    assert [*begun, *second, *second] == expected
    with pytest.raises(ConfigConflictError, match=r"weights \[1, 2\], now they are \[2, 1\]"):
        made(2, 1).load_state_dict(first.state_dict())
    with pytest.raises(ConfigConflictError, match="rows per member"):
        MixtureBatchSampler([21, 4], (1, 2), 2, seed=2).load_state_dict(first.state_dict())


def test_samples_of_members_are_told_apart(tiny_policy):
    data = MixtureDataModule(
        members=[Member(shapes()), Member(shapes()), Member(shapes(ClassificationTask()))], processor=tiny_policy
    )
    for split, size in (("train", 18), ("val", 9), ("test", 6)):
        samples = data.split(split)
        assert len(samples) == size
        assert len({sample.id for sample in samples}) == size
        assert len({sample.image_id for sample in samples}) == size
    first, second = data.split("train")[0].target, data.split("train")[6].target
    assert first.category == second.category
    assert first.category_id != second.category_id
    assert [s.id for s in data.split("train")[-2:]] == ["2/shapes/0/train/4", "2/shapes/0/train/5"]
    with pytest.raises(IndexError):
        data.split("train")[18]


def test_batches_mix_tasks_and_members_get_what_is_shared(tiny_policy):
    data = mixture(processor=tiny_policy, batch_size=8, eval_batch_size=5, max_pixels=1600, seed=5)
    (batch,) = data.train_dataloader()
    assert {sample.task.name for sample in batch.samples} == {"detection", "classification"}
    assert sum(map(len, data.val_dataloader())) == 6
    member = data.members[0].data
    assert (member.processor, member.batch_size, member.seed) == (tiny_policy, 8, 5)
    assert member.encoder is data.encoder


def test_the_loader_resumes_in_the_middle(tiny_policy):
    def ids(batches):
        return [[sample.id for sample in batch.samples] for batch in batches]

    whole = ids(mixture((1.0, 3.0), processor=tiny_policy, batch_size=2).train_dataloader())
    loader = mixture((1.0, 3.0), processor=tiny_policy, batch_size=2).train_dataloader()
    begun = ids(islice(iter(loader), 2))
    again = mixture((1.0, 3.0), processor=tiny_policy, batch_size=2).train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert begun + ids(again) == whole
    assert len(whole) == 5


def test_a_member_keeps_its_own_seed():
    data = MixtureDataModule(members=[Member(shapes(seed=0)), Member(shapes())], seed=5)
    assert [member.data.seed for member in data.members] == [0, 5]


def test_members_let_go_of_their_annotations(tmp_path, tiny_policy):
    from PIL import Image

    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "val2017" / "000000000001.jpg")
    box = {"id": 1, "image_id": 1, "category_id": 17, "bbox": [1, 2, 20, 30], "area": 600, "iscrowd": 0}
    picture = {"id": 1, "file_name": "000000000001.jpg", "width": 60, "height": 40}
    content = {"images": [picture], "annotations": [box], "categories": [{"id": 17, "name": "cat"}]}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    coco = COCODetectionDataModule(root=tmp_path, train_split="val2017")
    data = MixtureDataModule(members=[Member(coco), Member(shapes())], processor=tiny_policy)
    with pytest.warns(UserWarning, match="share pictures"):
        data.setup("fit")
    assert not coco._annotations
    assert len(data.split("train")) == 7
    assert data.split("train")[0].target.category == "cat"
    assert not coco._annotations


@pytest.mark.parametrize(("name", "value"), [("batch_size", 3), ("max_pixels", 784), ("processor", "x")])
def test_a_member_that_sets_what_is_shared_is_refused(name, value):
    with pytest.raises(ConfigConflictError, match=rf"Member 1 .*ShapesDataModule\) sets {name} to {value!r}.*leave it"):
        MixtureDataModule(members=[Member(shapes()), Member(shapes(**{name: value}))])
    if name == "batch_size":
        MixtureDataModule(members=[Member(shapes(batch_size=3))], batch_size=3)


@pytest.mark.parametrize("weights", [(1, 0), (1, -1), (1, float("nan")), (1, float("inf"))])
def test_weights_are_positive(weights):
    with pytest.raises(ConfigConflictError, match="greater than 0"):
        mixture(weights)
    with pytest.raises(ConfigConflictError, match="greater than 0"):
        MixtureDataModule(members=[])


def test_fit_on_the_shipped_file(tiny_policy, tmp_path, monkeypatch):
    import csv

    monkeypatch.chdir(tmp_path)
    main([
        "fit", "--config", str(CONFIGS / "mixture.yaml"), "--model.policy", tiny_policy, "--model.group_size", "2",
        "--model.max_completion_length", "4", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2",
        "--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "8", "--data.eval_batch_size", "32",
    ])  # fmt: skip
    (metrics,) = tmp_path.rglob("metrics.csv")
    columns = {name for row in csv.DictReader(metrics.open()) for name, value in row.items() if value}
    assert {"val/map", "val/accuracy", "train/rewards/iou/mean", "train/rewards/accuracy/mean"} <= columns
