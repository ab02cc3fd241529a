"""The four classification sets of the paper, on fakes in their true layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from scipy.io import savemat

from rft_lightning.datamodules import Cars196DataModule, FGVCAircraftDataModule, Flowers102DataModule, Pets37DataModule
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.rewards import accuracy_reward
from rft_lightning.sample import Answer
from tests.datamodule_checks import DataModuleChecks
from tests.fakes import classification as fakes

# A fake has three of the 102 flowers.
pytestmark = pytest.mark.filterwarnings("ignore:Left out of training:UserWarning")


def labels(data, split: str = "train") -> dict[str, str]:
    """Picture -> class of all rows."""
    return {row.image: row.label for row in data.rows(split)}


class TestFlowers102(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        fakes.write_flowers(tmp_path)
        return lambda **kwargs: Flowers102DataModule(root=tmp_path, **kwargs)


class TestFlowers102OnCoOpsSplit(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        fakes.write_coop_flowers(fakes.write_flowers(tmp_path))
        (tmp_path / "setid.mat").unlink()
        return lambda **kwargs: Flowers102DataModule(root=tmp_path, split_protocol="coop", **kwargs)


class TestPets37(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        fakes.write_pets(tmp_path)
        return lambda **kwargs: Pets37DataModule(root=tmp_path, **kwargs)


class TestFGVCAircraft(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        fakes.write_aircraft(tmp_path)
        return lambda **kwargs: FGVCAircraftDataModule(root=tmp_path, **kwargs)


class TestFGVCAircraftWithoutBanner(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        fakes.write_aircraft(tmp_path)
        return lambda **kwargs: FGVCAircraftDataModule(root=tmp_path, crop_banner=True, level="manufacturer", **kwargs)


class TestCars196(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        fakes.write_car_pictures(tmp_path)
        fakes.write_car_labels(tmp_path / "devkit", tmp_path / "cars_test_annos_withlabels.mat")
        return lambda **kwargs: Cars196DataModule(root=tmp_path, **kwargs)


# Questions and answers -----------------------------------------------------------------------------------------------

QUESTIONS = {
    Flowers102DataModule: "This is an image containing a plant. Please identify the species of the plant",
    Pets37DataModule: "This is an image containing a pet. Please identify the species of the pet",
    FGVCAircraftDataModule: "This is an image containing an aircraft. Please identify the model of the aircraft",
    Cars196DataModule: "This is an image containing a car. Please identify the model of the car",
}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_are_the_papers(kind, tmp_path):
    task = kind(root=tmp_path).task
    assert task.question(None, CoordinateFrame()) == (
        f"{QUESTIONS[kind]} based on the image.\nOutput the thinking process in <think> </think> and final answer in "
        "<answer> </answer> tags.The output answer format should be as follows:\n<think> ... </think> <answer>species "
        "name</answer>\nPlease strictly follow the format."
    )


def test_a_name_may_be_answered_in_either_spelling(tmp_path):
    data = Flowers102DataModule(root=fakes.write_flowers(tmp_path), classes=["colt's foot"])
    target = data.split("train")[0].target
    assert (target.label, target.aliases) == ("colts foot", ("colt's foot",))
    assert data.task.solution(target, CoordinateFrame()) == "<answer>colts foot</answer>"
    for said in ("colts foot", "Colt's foot"):
        assert accuracy_reward(Answer(text=said, label=said), target) == 1
    official = Flowers102DataModule(root=tmp_path, class_name_style="official", classes="colts foot")
    assert official.class_names == ["colt's foot"]
    assert official.split("train")[0].target.aliases == ("colts foot",)


def test_spellings_of_all_sets(tmp_path):
    pets = Pets37DataModule(root=fakes.write_pets(tmp_path / "pets"))
    assert pets.class_names == ["abyssinian", "american_bulldog", "english_cocker_spaniel"]
    fakes.write_car_pictures(tmp_path / "cars")
    fakes.write_car_labels(tmp_path / "cars/devkit", None)
    for style, names in (
        ("visual_rft", [f"{name[-4:]} {name[:-5]}" for name in fakes.CARS]),
        ("official", fakes.CARS),
    ):
        data = Cars196DataModule(root=tmp_path / "cars", class_name_style=style)
        assert data.class_names == names
        assert [set(data.aliases(name)[0].split()) for name in names] == [set(name.split()) for name in names]
    with pytest.raises(ConfigConflictError, match="class_name_style official or visual_rft, found 'paper'"):
        Cars196DataModule(root=tmp_path, class_name_style="paper")


def test_unknown_classes_are_named_with_close_matches(tmp_path):
    data = Flowers102DataModule(root=fakes.write_flowers(tmp_path), classes=["rose", "marigolt", "zzz"])
    with pytest.raises(ConfigConflictError) as caught:
        data.split("train")
    assert "'marigolt' (did you mean 'marigold'" in str(caught.value)
    assert "'zzz'" in str(caught.value)
    assert "has 102 classes: pink primrose, " in str(caught.value)


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "flowers-102", "oxford_flowers"])
def test_flowers_below_the_root(tmp_path, place):
    fakes.write_flowers(tmp_path / place)
    data = Flowers102DataModule(root=tmp_path)
    assert [len(data.rows(split)) for split in ("train", "val", "test")] == [12, 6, 6]
    assert labels(data)["jpg/image_00001.jpg"] == "colts foot"
    assert data.split("train")[0].id == "flowers102/jpg/image_00001.jpg"
    assert data.split("train")[0].image == tmp_path / place / "jpg/image_00001.jpg"


def test_coops_split_of_flowers_lies_across_the_official_one(tmp_path):
    fakes.write_coop_flowers(fakes.write_flowers(tmp_path))
    official = Flowers102DataModule(root=tmp_path)
    every = {image: name for split in ("train", "val", "test") for image, name in labels(official, split).items()}
    for protocol in ("coop", "split_zhou_OxfordFlowers.json", str(tmp_path / "split_zhou_OxfordFlowers.json")):
        data = Flowers102DataModule(root=tmp_path, split_protocol=protocol)
        assert [len(data.rows(split)) for split in ("train", "val", "test")] == [12, 6, 6]
        assert labels(data, "test").items() <= every.items()
        assert set(labels(data, "test")) & set(labels(official))


def test_a_split_file_without_validation_holds_pictures_out(tmp_path):
    file = fakes.write_coop_flowers(fakes.write_flowers(tmp_path))
    content = json.loads(file.read_text())
    del content["val"]
    file.write_text(json.dumps(content))
    data = Flowers102DataModule(root=tmp_path, split_protocol="coop", val_shots=1)
    assert data.has_val is False
    assert {sample.id for sample in data.split("val")} < {row.id for row in data.rows("train")}


def test_odd_pets_are_read_as_rgb(tmp_path):
    data = Pets37DataModule(root=fakes.write_pets(tmp_path), val_shots=1)
    assert [len(data.rows(split)) for split in ("train", "test")] == [15, 9]
    odd = {sample.image_id: sample for sample in data.split("test")}
    with Image.open(odd["images/Abyssinian_6.jpg"].image) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGBA")
    assert odd["images/Abyssinian_6.jpg"].load_image().mode == "RGB"
    assert labels(data)["images/english_cocker_spaniel_1.jpg"] == "english_cocker_spaniel"


@pytest.mark.parametrize("place", [".", "data", "fgvc-aircraft-2013b/data", "fgvc_aircraft"])
@pytest.mark.parametrize(("level", "count"), [("variant", 3), ("family", 3), ("manufacturer", 2)])
def test_aircraft_levels(tmp_path, place, level, count):
    fakes.write_aircraft(tmp_path / place)
    data = FGVCAircraftDataModule(root=tmp_path, level=level, split_protocol="coop")
    assert len(data.class_names) == count
    expected = {"variant": "F-16A/B", "family": "F-16", "manufacturer": "Lockheed Martin"}[level]
    assert labels(data)["images/0000009.jpg"] == expected
    assert data.split("train")[0].load_image().size == (40, 60)


def test_aircraft_without_banner_and_with_a_split_of_variants(tmp_path):
    fakes.write_aircraft(tmp_path)
    splits = {"train": [["x/images/0000009.jpg", 1, "F-16A/B"]], "test": [["0000001.jpg", 0, "707-320"]]}
    fakes.write_split(tmp_path / "mine.json", splits)
    data = FGVCAircraftDataModule(root=tmp_path, level="family", crop_banner=True, split_protocol="mine.json")
    sample = data.split("train")[0]
    assert sample.target.label == "F-16"
    assert sample.image_size == sample.target.image_size == sample.load_image().size == (40, 40)
    with pytest.raises(ConfigConflictError, match="level to be one of variant, family, manufacturer, found 'model'"):
        FGVCAircraftDataModule(root=tmp_path, level="model")


DEVKITS = [
    ("devkit", "cars_test_annos_withlabels.mat"),
    ("devkit", "devkit/cars_test_annos_withlabels.mat"),
    ("devkit", "cars_test_annos_withlabels (1).mat"),
    ("car_devkit/devkit", "cars_test_annos_withlabels.mat"),
    (".", "cars_test_annos_withlabels (1).mat"),
]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("devkit", "file"), DEVKITS)
def test_cars_with_a_devkit(tmp_path, devkit, file, double):
    fakes.write_car_pictures(tmp_path / "stanford_cars", double)
    fakes.write_car_labels(tmp_path / "stanford_cars" / devkit, tmp_path / "stanford_cars" / file)
    data = Cars196DataModule(root=tmp_path, val_shots=1)
    assert [len(data.rows(split)) for split in ("train", "test")] == [15, 6]
    assert labels(data)["cars_train/00003.jpg"] == "2012 Ram C/V Cargo Van Minivan"
    assert {sample.load_image().mode for sample in data.split("test")} == {"RGB"}
    assert data.split("test")[0].id == "cars196/cars_test/00001.jpg"


@pytest.mark.parametrize("place", [".", "car_data/car_data"])
def test_cars_in_class_folders(tmp_path, place):
    fakes.write_cars_by_class(tmp_path / place)
    data = Cars196DataModule(root=tmp_path, val_shots=1)
    assert [len(data.rows(split)) for split in ("train", "test")] == [15, 6]
    assert labels(data)["train/Ram C-V Cargo Van Minivan 2012/00003.jpg"] == "2012 Ram C/V Cargo Van Minivan"
    assert len(data.split("test")) == 6


def test_cars_in_one_folder(tmp_path):
    data = Cars196DataModule(root=fakes.write_car_ims(tmp_path), val_shots=1)
    assert [len(data.rows(split)) for split in ("train", "test")] == [15, 6]
    assert labels(data)["car_ims/000002.jpg"] == "2012 Audi TTS Coupe"
    assert len(data.split("test")) == 6


def test_cars_with_coops_split(tmp_path):
    fakes.write_coop_cars(fakes.write_car_pictures(tmp_path))
    alone = Cars196DataModule(root=tmp_path)
    fakes.write_car_labels(tmp_path / "devkit", tmp_path / "devkit/cars_test_annos_withlabels.mat")
    official = Cars196DataModule(root=tmp_path)
    assert labels(alone) == labels(official)
    assert labels(alone, "test") == labels(official, "test")
    assert alone.class_names == official.class_names
    data = Cars196DataModule(root=tmp_path, split_protocol="coop")
    assert [len(data.rows(split)) for split in ("train", "val", "test")] == [12, 3, 6]
    assert {**labels(data), **labels(data, "val")} == labels(official)


# Files that are missing or damaged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_missing_root_is_explained(kind, tmp_path):
    (tmp_path / "other.txt").write_text("")
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DatasetNotFoundError) as caught:
            kind(root=root).split("train")
        text = str(caught.value)
        found = "holds other.txt" if root == tmp_path else "does not exist"
        assert found in text
        assert kind.tree.strip() in text
        assert kind.origin in text


def test_cars_say_everything_that_was_looked_for(tmp_path):
    (tmp_path / "cars_train").mkdir()
    with pytest.raises(DatasetNotFoundError) as caught:
        Cars196DataModule(root=tmp_path).split("train")
    for word in (
        "cars_meta.mat", "car_devkit/devkit", "cars_test_annos_withlabels", "cars_train/cars_train/", "car_ims/",
        "cars_annos.mat", "train/<class>/", "car_data/car_data", "split_zhou_StanfordCars.json", "holds cars_train",
        str(tmp_path / "stanford_cars"), "issues/7545",
    ):  # fmt: skip
        assert word in str(caught.value)


def test_cars_without_test_labels_can_be_trained_on(tmp_path):
    fakes.write_car_labels(fakes.write_car_pictures(tmp_path) / "devkit", None)
    data = Cars196DataModule(root=tmp_path, val_shots=1, shots=2)
    data.setup("fit")
    with pytest.raises(DatasetNotFoundError, match="labels of the test pictures are missing: looked for") as caught:
        data.split("test")
    assert str(tmp_path / "cars_test_annos_withlabels*.mat") in str(caught.value)
    assert str(tmp_path / "devkit/cars_test_annos_withlabels*.mat") in str(caught.value)


def test_test_annotations_without_labels_are_no_labels(tmp_path):
    fakes.write_car_labels(fakes.write_car_pictures(tmp_path) / "devkit", None)
    shutil.copy(tmp_path / "devkit/cars_test_annos.mat", tmp_path / "cars_test_annos_withlabels.mat")
    with pytest.raises(AnnotationError, match="expected fname, class among them"):
        Cars196DataModule(root=tmp_path).split("test")


def test_a_missing_file_is_named(tmp_path):
    (fakes.write_flowers(tmp_path) / "setid.mat").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"setid\.mat is missing"):
        Flowers102DataModule(root=tmp_path).split("train")


@pytest.mark.parametrize("kind", [Flowers102DataModule, Pets37DataModule, Cars196DataModule])
def test_a_missing_split_file_is_explained(kind, tmp_path):
    fakes.write_pets(tmp_path)
    fakes.write_car_labels(tmp_path / "devkit", None)
    with pytest.raises(DatasetNotFoundError) as caught:
        kind(root=tmp_path, split_protocol="coop").split("train")
    assert str(tmp_path / kind.coop_file) in str(caught.value)
    assert kind.coop_link in str(caught.value)
    assert "KaiyangZhou/CoOp" in str(caught.value)
    with pytest.raises(DatasetNotFoundError, match=r"split_protocol is 'offical'.*Set data\.split_protocol to"):
        kind(root=tmp_path, split_protocol="offical").split("train")


def test_split_files_that_do_not_fit(tmp_path):
    file = fakes.write_coop_flowers(fakes.write_flowers(tmp_path))
    content = json.loads(file.read_text())
    content["train"][0][2] = "roose"
    file.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=r"image_00005.jpg in train the class 'roose' \(did you mean 'rose'"):
        Flowers102DataModule(root=tmp_path, split_protocol="coop").split("train")
    for text in ("[]", "{}", '{"train": [["a.jpg", 1]], "test": []}', "<html>"):
        file.write_text(text)
        with pytest.raises(AnnotationError, match="is no split file"):
            Flowers102DataModule(root=tmp_path, split_protocol="coop").split("train")


def test_damaged_mat_files(tmp_path):
    fakes.write_flowers(tmp_path)
    data = Flowers102DataModule(root=tmp_path)
    savemat(tmp_path / "setid.mat", {"trnid": [[1, 2, 99]]})
    with pytest.raises(AnnotationError, match="picture 99, expected pictures 1 to 24"):
        data.rows("train")
    with pytest.raises(AnnotationError, match="no variable 'tstid', but trnid"):
        data.rows("test")
    (tmp_path / "setid.mat").write_text("<html>404</html>")
    with pytest.raises(AnnotationError, match=r"setid\.mat is no readable MATLAB file"):
        data.rows("train")


def test_damaged_lists(tmp_path):
    fakes.write_pets(tmp_path / "pets")
    (tmp_path / "pets/annotations/trainval.txt").write_text("Abyssinian_1 1 1 1\nBengal_1 1 1 1\n")
    with pytest.raises(AnnotationError, match="gives Bengal_1 the class 1, which is 'Abyssinian'"):
        Pets37DataModule(root=tmp_path / "pets").rows("train")
    (tmp_path / "pets/annotations/trainval.txt").write_text("# a comment\n\nAbyssinian_1 1\n")
    with pytest.raises(AnnotationError, match=r"line 3: expected .* found 'Abyssinian_1 1'"):
        Pets37DataModule(root=tmp_path / "pets").rows("train")
    fakes.write_aircraft(tmp_path / "aircraft")
    (tmp_path / "aircraft/images_variant_train.txt").write_text("0000001 707-32\n")
    with pytest.raises(AnnotationError, match=r"line 1: '707-32' \(did you mean '707-320'"):
        FGVCAircraftDataModule(root=tmp_path / "aircraft").rows("train")


def test_a_picture_that_is_listed_twice(tmp_path):
    file = fakes.write_aircraft(tmp_path) / "images_variant_train.txt"
    file.write_text(file.read_text() + "0000001 F-16A/B\n")
    with pytest.raises(AnnotationError, match=r"images/0000001.jpg \(as '707-320', 'F-16A/B'\)"):
        FGVCAircraftDataModule(root=tmp_path).rows("train")


def test_missing_and_broken_pictures_are_named(tmp_path):
    fakes.write_flowers(tmp_path)
    picture = tmp_path / "jpg/image_00001.jpg"
    Image.effect_noise((64, 64), 80).save(picture)
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) * 3 // 4])
    sample = Flowers102DataModule(root=tmp_path).split("train")[0]
    with pytest.raises(DatasetNotFoundError, match=r"image_00001\.jpg cannot be read .*truncated"):
        sample.load_image()
    with pytest.warns(UserWarning, match="image_00001"):
        left = Flowers102DataModule(root=tmp_path, on_bad_image="skip").split("train")
    assert len(left) == 11
    picture.write_text("<html>404</html>")
    with pytest.raises(DatasetNotFoundError, match=r"image_00001\.jpg cannot be read"):
        Flowers102DataModule(root=tmp_path).split("train")
    picture.unlink()
    with pytest.raises(DatasetNotFoundError, match=r"1 of the 12 pictures used of the train split.*image_00001\.jpg"):
        Flowers102DataModule(root=tmp_path).split("train")
    assert Flowers102DataModule(root=tmp_path, classes=["rose"]).split("train")


# Downloads, and a run ------------------------------------------------------------------------------------------------


def test_downloads_are_stated():
    files = {kind: [download.file for download in kind.downloads] for kind in QUESTIONS}
    assert files[Flowers102DataModule] == ["102flowers.tgz", "imagelabels.mat", "setid.mat"]
    assert files[Pets37DataModule] == ["images.tar.gz", "annotations.tar.gz"]
    assert files[FGVCAircraftDataModule] == ["fgvc-aircraft-2013b.tar.gz"]
    assert files[Cars196DataModule] == []
    assert all(len(download.md5 or "") == 32 for kind in QUESTIONS for download in kind.downloads)


def test_a_run_of_the_shipped_file_keeps_the_best_checkpoint(tmp_path, tiny_policy, monkeypatch):
    from rft_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    fakes.write_pets(tmp_path / "data/pets37")
    small = {
        "model.policy": tiny_policy, "model.group_size": 2, "model.max_completion_length": 6, "trainer.max_steps": 2,
        "trainer.val_check_interval": 1, "trainer.precision": "32-true", "trainer.accelerator": "cpu",
        "trainer.devices": 1, "data.val_limit": 2, "data.num_workers": 0, "data.max_pixels": 3136,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in small.items()]
    config = Path(__file__).parent.parent / "configs/pets37.yaml"
    # Shots: 4 for validation, so that one of the five training pictures is left of each breed.
    with pytest.warns(UserWarning, match="Fewer than 4 images of 3 of 3 classes"):
        main(["fit", "--config", str(config), *arguments])
    written = {path.name for path in (tmp_path / "runs/csv/version_0").rglob("*")}
    assert {"last.ckpt", "policy"} <= written
    assert sum(name.startswith("best-step") for name in written) == 1
