"""The four classification sets of the paper on their real lists and a few real pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rft_lightning.datamodules import Cars196DataModule, FGVCAircraftDataModule, Flowers102DataModule, Pets37DataModule
from rft_lightning.errors import DatasetNotFoundError

pytestmark = pytest.mark.sample_data


def labels(data, split: str = "train") -> dict[str, str]:
    """Picture -> class of all rows."""
    return {row.image: row.label for row in data.rows(split)}


def names(folder: Path, file: str) -> list[str]:
    return (folder / "class_names" / file).read_text(encoding="utf-8").splitlines()


def test_real_flowers(sample_data):
    folder = sample_data / "flowers102_official_mats"
    data = Flowers102DataModule(root=folder)
    assert data.class_names == names(sample_data, "visual_rft/flowers102.txt")
    assert Flowers102DataModule(root=folder, class_name_style="official").class_names == names(
        sample_data, "flowers102.txt"
    )
    rows = {split: labels(data, split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 1020, "val": 1020, "test": 6149}
    every = {**rows["train"], **rows["val"], **rows["test"]}
    assert set(every) == {f"jpg/image_{number:05}.jpg" for number in range(1, 8190)}
    counts = {split: sorted(map(list(found.values()).count, data.class_names)) for split, found in rows.items()}
    assert (counts["train"], counts["val"]) == ([10] * 102, [10] * 102)
    assert (counts["test"][0], counts["test"][-1]) == (20, 238)
    with pytest.raises(DatasetNotFoundError, match="1020 of the 1020 pictures used of the train split do not exist"):
        data.split("train")
    for shots in (1, 4):
        check_draw(sample_data, "oxford_flowers", shots, data, every)


def test_real_pets(sample_data):
    data = Pets37DataModule(root=sample_data / "oxford_pets_mini", val_shots=2)
    assert set(data.class_names) < set(names(sample_data, "visual_rft/oxford_pets37.txt"))
    assert [len(data.rows(split)) for split in ("train", "test")] == [19, 13]
    assert len(data.split("val")) == 6
    odd = next(sample for sample in data.split("test") if sample.image.name == "Abyssinian_5.jpg")
    with Image.open(odd.image) as picture:
        assert picture.mode == "RGBA"
    for split in ("train", "val", "test"):
        assert {sample.load_image().mode for sample in data.split(split)} == {"RGB"}


def test_real_aircraft_lists(sample_data):
    root = sample_data / "fgvc_aircraft_lists"
    for level, file in (("variant", "variants100"), ("family", "families70"), ("manufacturer", "manufacturers30")):
        data = FGVCAircraftDataModule(root=root, level=level)
        assert data.class_names == names(sample_data, f"fgvc_aircraft_{file}.txt")
    data = FGVCAircraftDataModule(root=root)
    rows = {split: labels(data, split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 3219, "val": 2516, "test": 303}
    assert rows["train"]["images/0817494.jpg"] == "707-320"
    for shots in (1, 4):
        check_draw(sample_data, "fgvc_aircraft", shots, data, {**rows["train"], **rows["val"]})
    draw = sample_data / "coop_fewshot/indices/fgvc_aircraft/shot_4-seed_1.json"
    assert len(FGVCAircraftDataModule(root=root, manifest=draw).chosen("train")) == 400
    with pytest.raises(DatasetNotFoundError, match=r"images_family_train\.txt is missing"):
        FGVCAircraftDataModule(root=root, level="family").rows("train")


def test_real_cars_devkit(sample_data):
    root = sample_data / "stanford_cars_devkit"
    data = Cars196DataModule(root=root)
    assert data.class_names == names(sample_data, "visual_rft/stanford_cars196.txt")
    assert Cars196DataModule(root=root, class_name_style="official").class_names == names(
        sample_data, "stanford_cars196.txt"
    )
    for split, count in (("train", 8144), ("test", 8041)):
        found = labels(data, split)
        assert len(found) == count
        counts = sorted(map(list(found.values()).count, data.class_names))
        assert (counts[0], counts[-1]) == (24, 68)
    for shots in (1, 4):
        check_draw(sample_data, "stanford_cars", shots, data, labels(data))
    draw = sample_data / "coop_fewshot/indices/stanford_cars/shot_4-seed_1.json"
    given = Cars196DataModule(root=root, manifest=draw)
    assert [len(given.chosen(split)) for split in ("train", "val")] == [784, 784]


@pytest.mark.parametrize("kind", [Flowers102DataModule, Pets37DataModule, FGVCAircraftDataModule, Cars196DataModule])
def test_spellings_of_the_real_classes_are_told_apart(sample_data, kind, tmp_path, monkeypatch):
    file = {
        Flowers102DataModule: "flowers102",
        Pets37DataModule: "oxford_pets37",
        FGVCAircraftDataModule: "fgvc_aircraft_variants100",
        Cars196DataModule: "stanford_cars196",
    }[kind]
    monkeypatch.setattr(kind, "official_names", lambda self: names(sample_data, f"{file}.txt"))
    data = kind(root=tmp_path)
    assert data.class_names == names(sample_data, f"visual_rft/{file}.txt")
    for official, shown in zip(data.official_names(), data.class_names, strict=True):
        assert data.official_name("x", official) == data.official_name("x", shown) == official


def check_draw(sample_data: Path, name: str, shots: int, data, rows: dict[str, str]) -> None:
    """Every picture of a published draw is a row of the class that the draw says."""
    file = sample_data / f"coop_fewshot/indices/{name}/shot_{shots}-seed_1.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for part in content.values():
        for entry in part["data"]:
            path = data.plain_path(entry["impath"])
            assert data.official_name(path, entry["classname"]) == data.official_name(path, rows[path])
