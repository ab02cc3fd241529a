"""CustomClassificationDataModule: class folders and CSV files."""

from __future__ import annotations

import pytest

from rft_lightning.datamodules import CustomClassificationDataModule
from rft_lightning.errors import AnnotationError, DatasetNotFoundError, EmptyClassError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.tasks import ClassificationTask
from tests.datamodule_checks import DataModuleChecks
from tests.fakes import classification as fakes

SPLITS = ("train", "val", "test")


def counts(data) -> list[int]:
    return [len(data.split(split)) for split in SPLITS]


class TestClassFolders(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        fakes.write_class_folders(tmp_path)
        return lambda **kwargs: CustomClassificationDataModule(root=tmp_path, **kwargs)


class TestCSVFile(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        fakes.write_csv(tmp_path, {"all.csv": SPLITS})
        return lambda **kwargs: CustomClassificationDataModule(root=tmp_path, csv="all.csv", **kwargs)


def test_class_folders(tmp_path):
    data = CustomClassificationDataModule(root=fakes.write_class_folders(tmp_path))
    assert counts(data) == [12, 6, 6]
    assert data.class_names == sorted(fakes.MUSHROOMS)
    labels = {row.id: row.label for row in data.rows("train")}
    assert labels["custom/train/fly agaric/more/1.JPG"] == "fly agaric"
    assert labels["custom/train/Chanterelle_1/2.png"] == "Chanterelle_1"
    assert not any("._" in name for name in labels)
    assert data.split("train")[0].image.is_file()


@pytest.mark.parametrize("val", ["valid", "validation"])
def test_other_names_of_splits(tmp_path, val):
    fakes.write_class_folders(tmp_path, ("training", val))
    (tmp_path / "training").rename(tmp_path / "train")
    data = CustomClassificationDataModule(root=tmp_path)
    assert {row.image for row in data.chosen("test")} == {row.image for row in data.rows("val")}
    assert data.source("test") == "test"
    assert len(data.split("predict")) == len(data.split("test")) == 18


def test_folders_without_splits(tmp_path):
    fakes.write_class_folders(tmp_path, (".",))
    data = CustomClassificationDataModule(root=tmp_path, val_shots=2, shots=3)
    assert counts(data) == [9, 6, 6]
    held_out = {row.image for row in data.chosen("val")}
    assert not held_out & {row.image for row in data.chosen("train")}
    assert {row.image for row in data.chosen("test")} == held_out
    assert data.source("test") == "train"
    with pytest.raises(DatasetNotFoundError, match=r"no test pictures, found train\. Add them, or set data.val_shots"):
        CustomClassificationDataModule(root=tmp_path).split("val")


def test_csv_files_of_the_splits(tmp_path):
    fakes.write_csv(tmp_path, {"train.csv": ["train"], "valid.csv": ["val"], "test.csv": ["test"]})
    data = CustomClassificationDataModule(root=tmp_path)
    assert counts(data) == [12, 6, 6]
    assert data.class_names == sorted(fakes.MUSHROOMS)


def test_a_csv_file_without_splits(tmp_path):
    fakes.write_csv(tmp_path, {"all.csv": ["train"]})
    data = CustomClassificationDataModule(root=tmp_path, csv=tmp_path / "all.csv", val_shots=1)
    assert counts(data) == [9, 3, 3]


def test_words_of_the_question(tmp_path):
    fakes.write_class_folders(tmp_path)
    data = CustomClassificationDataModule(root=tmp_path)
    assert data.task.question(None, CoordinateFrame()).startswith("This is an image containing an object. Please")
    task = ClassificationTask(subject="a mushroom", noun="the species of the mushroom")
    sample = CustomClassificationDataModule(root=tmp_path, task=task).split("train")[0]
    assert sample.task.question(None, CoordinateFrame()).startswith("This is an image containing a mushroom. Please")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path;label\na.jpg;x\n", "no column path and no column label, it begins 'path;label'"),
        ("path,class\na.jpg,x\n", "has no column label"),
        ("", "has no column path"),
        ("path,label\na.jpg,\n", r"line 2: path='a.jpg', label=''\. Expected a path seen from the root"),
        ("path,label\n/data/a.jpg,x\n", "line 2: path='/data/a.jpg'"),
        ("path,label,split\na.jpg,x,dev\n", "split='dev'.*a split that is train, val or test"),
        ("path,label\na.jpg,x\n./a.jpg,y\n", r"1 pictures are listed more than once .* a\.jpg \(as 'x', 'y'\)"),
        ("path,label\np/a.jpg,x\np/../p/a.jpg,y\n", r"listed more than once .* p/a\.jpg \(as 'x', 'y'\)"),
        ("path,label\n../a.jpg,x\n", r"line 2: path='\.\./a\.jpg'.* the root and below it"),
        ("path,label\np/../../a.jpg,x\n", "line 2: path='p/../../a.jpg'.* the root and below it"),
    ],
)
def test_unusable_csv_files(tmp_path, text, expected):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(AnnotationError, match=expected):
        CustomClassificationDataModule(root=tmp_path).split("train")


def test_text_in_another_encoding(tmp_path):
    (tmp_path / "train.csv").write_bytes("path,label\na.jpg,Pfüfferling\n".encode("latin-1"))
    with pytest.raises(AnnotationError, match="Save it as CSV in UTF-8"):
        CustomClassificationDataModule(root=tmp_path).split("train")


def test_nothing_there(tmp_path):
    for root, found in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "holds nothing")):
        with pytest.raises(DatasetNotFoundError) as caught:
            CustomClassificationDataModule(root=root).split("train")
        assert found in str(caught.value)
        assert "train/<class>/*.jpg" in str(caught.value)
    with pytest.raises(DatasetNotFoundError, match=r"data\.csv: no file at .*gone\.csv"):
        CustomClassificationDataModule(root=tmp_path, csv="gone.csv").split("train")


def test_missing_pictures_are_named(tmp_path):
    fakes.write_csv(tmp_path, {"train.csv": ["train"]})
    (tmp_path / "pictures/3.jpg").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"1 of the 12 pictures used .*pictures/3\.jpg"):
        CustomClassificationDataModule(root=tmp_path).split("train")


def test_pictures_in_train_and_test_are_reported(tmp_path):
    fakes.write_csv(tmp_path, {"train.csv": ["train"]})
    (tmp_path / "test.csv").write_text("path,label\npictures/1.jpg,fly agaric\n")
    with pytest.warns(UserWarning, match=r"1 pictures of .* are in train and in test, such as pictures/1\.jpg"):
        CustomClassificationDataModule(root=tmp_path).split("test")


def test_a_class_without_training_pictures(tmp_path):
    fakes.write_class_folders(tmp_path)
    fakes.draw(tmp_path / "test/morel/1.jpg", 5)
    with pytest.warns(UserWarning, match="Left out of training, no example in train: morel"):
        CustomClassificationDataModule(root=tmp_path).split("train")
    with pytest.raises(EmptyClassError, match="No example of 'morel'"):
        CustomClassificationDataModule(root=tmp_path, classes=["morel"]).split("train")


@pytest.mark.sample_data
def test_real_class_folders(sample_data):
    data = CustomClassificationDataModule(root=sample_data / "custom_formats/imagefolder", val_shots=1)
    assert data.class_names == ["Abyssinian", "Bengal", "american_bulldog"]
    assert counts(data) == [3, 3, 3]
    assert data.split("train")[0].load_image().mode == "RGB"
