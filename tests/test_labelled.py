"""LabelledDataModule: validation shots, exclusions, bad pictures, manifests and published draws.

On the fake of COCO and on a small classification set.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from rft_lightning.datamodules import COCODetectionDataModule, RFTDataModule, bad_images
from rft_lightning.datamodules.labelled import LabelledDataModule
from rft_lightning.datamodules.published_draws import Entry, match
from rft_lightning.datamodules.rows import Row
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError, EmptyClassError
from rft_lightning.sample import ClassTarget, Sample
from rft_lightning.tasks import ClassificationTask
from tests.datamodule_checks import DataModuleChecks
from tests.fakes.coco import SIZES, edit, file_name, write_coco

pytestmark = pytest.mark.filterwarnings("ignore:.*share pictures:UserWarning", "ignore:Fewer than:UserWarning")
NAMES = ("rose", "tulip", "daisy")


class Flowers(LabelledDataModule):
    """Pictures of three classes; a picture's number says its class and its split."""

    has_val = False

    @property
    def class_names(self) -> list[str]:
        return [name for name in NAMES if self.classes is None or name in self.classes]

    def rows(self, split):
        numbers = range(12) if split == "train" else range(12, 18)
        rows = [Row(f"flowers/jpg/{n:03}.jpg", f"jpg/{n:03}.jpg", NAMES[n % 3]) for n in numbers]
        return [row for row in rows if row.label in self.class_names]

    def maker(self, split, rows):
        return Maker(self.root)


class Maker:
    def __init__(self, root):
        self.root = root

    def __call__(self, row):
        with Image.open(self.root / row.image) as picture:
            size = picture.size
        return Sample(row.id, self.root / row.image, ClassTarget(row.label), ClassificationTask(), size, row.image)


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "jpg").mkdir()
    for n in range(18):
        Image.effect_noise((64, 48), 20 + n).convert("RGB").save(tmp_path / f"jpg/{n:03}.jpg")
    return tmp_path


@pytest.fixture
def coco(tmp_path) -> Path:
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "coco", split)
    return tmp_path / "coco"


def detection(coco: Path, **kwargs) -> COCODetectionDataModule:
    return COCODetectionDataModule(root=coco, **{"classes": ["cat", "dog", "person"], **kwargs})


def ids(rows) -> list[str]:
    return [row.id for row in rows]


def images(rows) -> set:
    return {row.image for row in rows}


def damage(path: Path) -> None:
    """Keep the header: only decoding shows that the picture is cut off."""
    path.write_bytes(path.read_bytes()[:-400])


class TestFlowers(DataModuleChecks):
    @pytest.fixture
    def make(self, root):
        return lambda **kwargs: Flowers(root=root, **kwargs)


# Settings


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"val_shots": 0}, "val_shots >= 1 or null, found 0"),
        ({"shot_unit": "box"}, "shot_unit image or instance, found 'box'"),
        ({"on_bad_image": "ignore"}, "on_bad_image raise or skip, found 'ignore'"),
    ],
)
def test_settings_out_of_range(root, setting, expected):
    with pytest.raises(ConfigConflictError, match=expected):
        Flowers(root=root, **setting)


def test_classes_without_examples_are_left_out_or_an_error(coco):
    with pytest.warns(UserWarning, match="Left out of training, no example in train2017: car, toothbrush"):
        detection(coco, classes=None).chosen("train")
    with pytest.raises(EmptyClassError, match="'car'"):
        detection(coco, classes=["cat", "car"]).chosen("train")


@pytest.mark.parametrize(
    ("text", "expected"), [("[9, x30]", [9, "x30"]), ("lvis_v1_val.json", "lvis_v1_val.json"), ("null", None)]
)
def test_exclusions_and_manifest_on_the_command_line(text, expected):
    parser = ArgumentParser()
    parser.add_subclass_arguments(RFTDataModule, "data")
    words = ["--data=COCODetectionDataModule", "--data.root=x", f"--data.exclude_image_ids={text}", "--data.manifest=m"]
    parsed = parser.parse_args(words).data.init_args
    assert parsed.exclude_image_ids == expected
    assert str(parsed.manifest) == "m"


# Validation


def test_held_out_pictures_are_in_no_training_row_of_any_class(coco):
    data = detection(coco, val_split=None, val_shots=1)
    held_out = images(data.chosen("val"))
    assert data.source("val") == "train"
    assert not held_out & images(data.chosen("train"))
    assert {sample.image.parent.name for sample in data.split("val")} == {"train2017"}
    # everything is asked of them, as of any validation picture
    assert len(data.chosen("val")) == 3 * len(held_out)
    shown = {(row.image, row.label) for row in detection(coco).rows("train")}
    assert {name for image, name in shown if image in held_out} == {"cat", "dog", "person"}
    negatives = detection(coco, val_split=None, val_shots=1, negative_fraction=0.5).chosen("train")
    assert any(row.instances == 0 for row in negatives)
    assert not held_out & images(negatives)


def test_validation_shots_of_a_split_of_its_own(coco):
    data = detection(coco, val_shots=1, classes=["bus", "backpack"])
    assert data.source("val") == "val"
    assert images(data.chosen("val")) == {139, 285}
    assert [row.label for row in data.chosen("val")] == ["bus", "backpack"] * 2
    assert ids(data.chosen("train")) == ids(detection(coco, classes=["bus", "backpack"]).chosen("train"))


def test_without_validation_pictures_the_test_split_serves(root):
    data = Flowers(root=root)
    assert data.source("val") == "test"
    assert ids(data.chosen("val")) == ids(data.chosen("test"))


def test_val_limit_is_spread_over_the_classes_and_the_same_for_all_seeds(root):
    limited = [Flowers(root=root, val_limit=n).chosen("val") for n in range(1, 7)]
    assert [len(rows) for rows in limited] == [1, 2, 3, 4, 5, 6]
    assert Counter(row.label for row in limited[2]) == dict.fromkeys(NAMES, 1)
    assert ids(Flowers(root=root, val_limit=3, seed=5).chosen("val")) == ids(limited[2])


# Excluded pictures


def test_excluded_pictures_by_id_file_and_annotation_file(coco, tmp_path):
    expected = ids(detection(coco, exclude_image_ids=[9, "30"], negative_fraction=0.4).chosen("train"))
    assert not {9, 30} & {int(name.split("/")[2]) for name in expected}
    listed, lvis = tmp_path / "ids.json", tmp_path / "lvis_v1_val.json"
    listed.write_text("[9, 30, 777]")
    lvis.write_text(json.dumps({"images": [{"id": 30, "coco_url": "x"}, {"id": 9}], "annotations": []}))
    for file in (listed, lvis, str(lvis)):
        data = detection(coco, exclude_image_ids=file, negative_fraction=0.4)
        assert ids(data.chosen("train")) == expected
    assert ids(data.chosen("val")) == ids(detection(coco).chosen("val"))
    held_out = detection(coco, val_split=None, val_shots=4, exclude_image_ids=lvis).chosen("val")
    assert not {9, 30} & images(held_out)


def test_exclusions_that_meet_nothing_are_reported(coco):
    with pytest.warns(UserWarning, match=r"No training row of train2017 shows one of the 1 pictures .*look like 9"):
        detection(coco, exclude_image_ids=["train2017/000000000009.jpg"]).chosen("train")


def test_exclusion_files_that_cannot_be_used(coco, tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"data.exclude_image_ids: no file at .*gone.json"):
        detection(coco, exclude_image_ids=tmp_path / "gone.json").chosen("train")
    for content in ("{}", "[[1]]", "3", "no"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(AnnotationError, match=r"bad.json is not usable .*a list of ids"):
            detection(coco, exclude_image_ids=tmp_path / "bad.json").chosen("train")


# Bad pictures


def test_a_header_that_cannot_be_read_is_an_error_at_the_start(root):
    (root / "jpg/004.jpg").write_text("<html>")
    with pytest.raises(DatasetNotFoundError, match=r"'flowers/jpg/004.jpg'.*set data.on_bad_image to skip"):
        Flowers(root=root).split("train")


def test_a_picture_that_cannot_be_decoded_names_sample_and_file(root):
    damage(root / "jpg/004.jpg")
    samples = Flowers(root=root).split("train")
    with pytest.raises(DatasetNotFoundError, match=r"'flowers/jpg/004.jpg'.*jpg/004.jpg cannot be read"):
        samples[4].load_image()


@pytest.mark.parametrize("fault", ["cut", "gone", "text"])
def test_a_bad_picture_is_replaced_in_a_draw(root, fault):
    drawn = Flowers(root=root, shots=2).chosen("train")
    path = root / drawn[0].image
    {"cut": damage, "gone": Path.unlink, "text": lambda p: p.write_text("x")}[fault](path)
    with pytest.warns(UserWarning, match=rf"1 pictures of train cannot be used and are left out.*{drawn[0].id}: "):
        again = Flowers(root=root, shots=2, on_bad_image="skip").chosen("train")
    assert set(ids(drawn)) - set(ids(again)) == {drawn[0].id}
    assert Counter(row.label for row in again) == dict.fromkeys(NAMES, 2)


def test_a_bad_picture_is_left_out_of_evaluation_and_of_the_rest(root):
    damage(root / "jpg/013.jpg")
    damage(root / "jpg/003.jpg")
    data = Flowers(root=root, on_bad_image="skip")
    with pytest.warns(UserWarning, match=r"1 pictures of test .*flowers/jpg/013.jpg: .*[Tt]runcated"):
        assert len(data.split("test")) == 5
    with pytest.warns(UserWarning, match=r"1 pictures of train .*flowers/jpg/003.jpg"):
        assert len(data.split("train")) == 11
    with pytest.warns(UserWarning, match="1 pictures of train"):
        assert len(Flowers(root=root, on_bad_image="skip", max_rows=12).chosen("train")) == 11


def test_of_very_many_pictures_only_headers_are_read(root, monkeypatch):
    monkeypatch.setattr(bad_images, "AT_START", 3)
    damage(root / "jpg/013.jpg")
    (root / "jpg/014.jpg").write_text("x")
    with pytest.warns(UserWarning, match=r"1 pictures of test .*014"):
        assert len(Flowers(root=root, on_bad_image="skip").split("test")) == 5
    assert len(Flowers(root=root).split("test")) == 6


def test_bad_pictures_of_coco(coco):
    few = detection(coco, shots=1, classes=["cat"])
    bad = few.chosen("train")[0].image
    (coco / "train2017" / file_name("train2017", bad)).unlink()
    Image.new("RGB", (5, 5)).save(coco / "val2017" / file_name("val2017", 25))
    data = detection(coco, shots=1, classes=["cat"], on_bad_image="skip", negative_fraction=0.5)
    with pytest.warns(UserWarning, match="does not exist"):
        rows = data.split("train")
    assert len(rows) == 2
    assert bad not in {sample.image_id for sample in rows}
    with pytest.warns(UserWarning, match=r"1 pictures of val2017 .*5x5 pixels"):
        assert len(data.split("val")) == len(SIZES) - 1


# What a loader's workers hold


def test_samples_hold_what_their_rows_need(coco):
    data = detection(coco, shots=1, classes=["dog"])
    samples = data.split("train")
    assert len(samples.make.pictures) == len(samples.make.objects) == 1
    assert len(pickle.dumps(samples)) < len(pickle.dumps(detection(coco).split("val")))
    data.setup("fit")
    assert not data._annotations


# Manifests


def written(data: LabelledDataModule, file: Path) -> dict:
    data.write_manifest(file)
    return json.loads(file.read_text())


def test_a_manifest_says_what_the_rows_are_and_how_they_came_about(coco, tmp_path):
    data = detection(coco, shots=2, negative_fraction=0.4, exclude_image_ids=[61], seed=7)
    content = written(data, tmp_path / "deep/manifest.json")
    assert content == data.manifest_data()
    assert (content["dataset"], content["seed"], content["format_version"]) == ("COCODetectionDataModule", 7, 1)
    settings = content["settings"]
    assert (settings["shots"], settings["shot_unit"], settings["train_split"]) == (2, "image", "train2017")
    assert (settings["classes"], settings["negative_fraction"]) == (["cat", "dog", "person"], 0.4)
    assert settings["exclude_image_ids"]["count"] == 1
    assert not {"processor", "batch_size", "root", "task"} & settings.keys()
    assert content["splits"]["train"]["ids"] == ids(data.chosen("train"))
    assert content["splits"]["train"]["count"] == len(data.chosen("train"))
    assert str(tmp_path) not in (tmp_path / "deep/manifest.json").read_text()
    assert not list(tmp_path.glob("deep/.*"))


def test_classes_short_of_shots_are_stated(coco, tmp_path):
    content = written(detection(coco, shots=3, val_shots=4), tmp_path / "m.json")
    assert content["splits"]["train"]["short"] == {"dog": 2, "person": 2}
    assert content["splits"]["val"]["short"] == {"dog": 2, "person": 2}
    by_objects = detection(coco, shots=3, shot_unit="instance").summary()["train"]["short"]
    assert by_objects == {"dog": 2, "person": 2}


def test_negatives_come_back_from_a_manifest(coco, tmp_path):
    data = detection(coco, shots=2, negative_fraction=0.4, seed=7)
    written(data, tmp_path / "m.json")
    again = detection(coco, manifest=tmp_path / "m.json")
    assert ids(again.chosen("train")) == ids(data.chosen("train"))
    assert sum(len(sample.target.boxes) == 0 for sample in again.split("train")) > 0


def test_a_large_test_split_is_stated_by_its_hash(coco, tmp_path, monkeypatch):
    monkeypatch.setattr("rft_lightning.datamodules.manifest._TEST_IDS", 5)
    content = written(detection(coco, shots=1), tmp_path / "m.json")
    assert "ids" not in content["splits"]["test"]
    assert detection(coco, manifest=tmp_path / "m.json").chosen("test")
    with pytest.raises(ConfigConflictError, match=r"states 21 rows in test; the data has 7, or others"):
        detection(coco, manifest=tmp_path / "m.json", classes=["cat"]).chosen("test")


def test_manifests_that_do_not_fit(coco, root, tmp_path):
    file = tmp_path / "m.json"
    with pytest.raises(DatasetNotFoundError, match=r"data.manifest: no file or folder at .*m.json"):
        detection(coco, manifest=file).chosen("train")
    good = written(detection(coco, shots=1), file)
    with pytest.raises(ConfigConflictError, match=r"is of COCODetectionDataModule, but the data set is Flowers"):
        Flowers(root=root, manifest=file).chosen("train")
    with pytest.raises(ConfigConflictError, match=r"1 of the 3 train rows .*'coco/train2017/\d+/18'.* differs"):
        detection(coco, manifest=file, classes=["cat", "person"]).chosen("train")
    good["splits"]["train"]["ids"].pop()
    file.write_text(json.dumps(good))
    with pytest.raises(AnnotationError, match=r"The train rows .* are missing or do not fit their hash, so it was"):
        detection(coco, manifest=file).chosen("train")
    file.write_text(json.dumps({**good, "format_version": 99}))
    with pytest.raises(ConfigConflictError, match="format version 99, expected 1"):
        detection(coco, manifest=file).chosen("train")
    file.write_text(json.dumps({**good, "splits": {}}))
    with pytest.raises(AnnotationError, match="do not fit their hash"):
        detection(coco, manifest=file).chosen("train")
    for content in ("[]", "{}", '{"train": 3}', "no json"):
        file.write_text(content)
        with pytest.raises(AnnotationError, match=r"Expected a manifest of `rft prepare`|expected a manifest of"):
            detection(coco, manifest=file).chosen("train")


def test_a_tree_that_lacks_a_picture_of_the_manifest(coco, tmp_path):
    data = detection(coco, shots=1)
    written(data, tmp_path / "m.json")
    gone = data.chosen("train")[0].image

    def drop(content):
        for key, name in (("images", "id"), ("annotations", "image_id")):
            content[key] = [entry for entry in content[key] if entry[name] != gone]

    edit(coco / "annotations/instances_train2017.json", drop)
    with pytest.raises(ConfigConflictError, match=f"'coco/train2017/{gone}/.*The tree in .* differs"):
        detection(coco, manifest=tmp_path / "m.json").chosen("train")


# Published draws


def few_shot_file(root: Path, **splits: list[int]) -> Path:
    entries = {
        split: {
            "data": [
                {"impath": f"./data/oxford_flowers/jpg/{n:03}.jpg", "label": n % 3, "classname": NAMES[n % 3].upper()}
                for n in numbers
            ],
            "indices": numbers,
        }
        for split, numbers in splits.items()
    }
    file = root / "shot_1-seed_1.json"
    file.write_text(json.dumps(entries))
    return file


def test_a_published_few_shot_draw(root):
    data = Flowers(root=root, manifest=few_shot_file(root, train=[7, 3, 2], val=[4, 5, 6]), shots=1)
    assert ids(data.chosen("train")) == [f"flowers/jpg/{n:03}.jpg" for n in (7, 3, 2)]
    assert ids(data.chosen("val")) == [f"flowers/jpg/{n:03}.jpg" for n in (4, 5, 6)]
    assert data.source("val") == "train"
    assert len(data.chosen("test")) == 6
    some = Flowers(root=root, manifest=few_shot_file(root, train=[7, 3, 2], val=[4, 5, 6]), classes=["rose"])
    assert ids(some.chosen("train")) == ["flowers/jpg/003.jpg"]
    held_out = Flowers(root=root, manifest=few_shot_file(root, train=[7, 3, 2]), val_shots=4)
    assert len(held_out.chosen("val")) == 9
    assert not images(held_out.chosen("val")) & images(held_out.chosen("train"))


def test_a_published_draw_of_other_splits_or_classes_is_an_error(root):
    with pytest.raises(ConfigConflictError, match=r"1 of the 3 train rows .*\./data/oxford_flowers/jpg/014.jpg"):
        Flowers(root=root, manifest=few_shot_file(root, train=[14, 3, 4])).chosen("train")
    file = few_shot_file(root, train=[3, 4])
    file.write_text(file.read_text().replace('"label": 1', '"label": 0'))
    with pytest.raises(AnnotationError, match=r"gives .*004.jpg the same class as a picture of 'rose', but the data"):
        Flowers(root=root, manifest=file).chosen("train")
    file.write_text('{"train": {"data": [{"path": 1}]}}')
    with pytest.raises(AnnotationError, match="no few-shot file of cross_modal_adaptation"):
        Flowers(root=root, manifest=file).chosen("train")


def coop_split(root: Path) -> Path:
    numbers = {"train": range(17, 8, -1), "val": range(6, 9), "test": range(6)}
    content = {split: [[f"{n:03}.jpg", n % 3, NAMES[n % 3]] for n in ns] for split, ns in numbers.items()}
    file = root / "split_zhou.json"
    file.write_text(json.dumps(content))
    return file


def test_a_coop_split_is_drawn_from(root):
    data = Flowers(root=root, manifest=coop_split(root))
    assert ids(data.chosen("train")) == [f"flowers/jpg/{n:03}.jpg" for n in range(17, 8, -1)]
    assert ids(data.chosen("val")) == [f"flowers/jpg/{n:03}.jpg" for n in range(6, 9)]
    assert ids(data.chosen("test")) == [f"flowers/jpg/{n:03}.jpg" for n in range(6)]
    few = Flowers(root=root, manifest=coop_split(root), shots=2).chosen("train")
    assert set(ids(few)) < set(ids(data.chosen("train")))
    assert Counter(row.label for row in few) == dict.fromkeys(NAMES, 2)
    assert [sample.id for sample in data.split("train")] == ids(data.chosen("train"))
    (root / "split_zhou.json").write_text('{"train": [["a.jpg", 1]], "test": []}')
    with pytest.raises(AnnotationError, match="no CoOp split"):
        Flowers(root=root, manifest=root / "split_zhou.json").chosen("train")


def full_box(folder: Path, shots: int, name: str, pairs: list[tuple[int, int]]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"full_box_{shots}shot_{name}_trainval.json"
    content = {
        "images": [{"id": image, "file_name": f"COCO_train2014_{image:012}.jpg"} for image, _ in pairs],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": [1, 2, 3, 4]} for image, category in pairs
        ],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    }
    file.write_text(json.dumps(content))
    return file


def test_draws_of_few_shot_detection(coco, tmp_path):
    folder = tmp_path / "cocosplit"
    cats = full_box(folder, 2, "cat", [(42, 17), (9, 17)])
    full_box(folder, 2, "dog", [(42, 18)])
    full_box(folder, 1, "cat", [(42, 17)])
    data = detection(coco, classes=["cat", "dog"], shots=2, manifest=folder)
    assert ids(data.chosen("train")) == [f"coco/train2017/{pair}" for pair in ("9/17", "42/17", "42/18")]
    assert len(data.split("train")[0].target.boxes) == 2
    assert len(data.chosen("val")) == 2 * len(SIZES)
    single = detection(coco, classes=["cat"], manifest=cats)
    assert images(single.chosen("train")) == {9, 42}
    with pytest.raises(ConfigConflictError, match=r"files of 1, 2 shots, but data.shots is 4"):
        detection(coco, shots=4, manifest=folder).chosen("train")
    with pytest.raises(DatasetNotFoundError, match=r"No full_box_2shot_person_trainval.json"):
        detection(coco, shots=2, manifest=folder).chosen("train")
    full_box(folder, 2, "dog", [(777, 18)])
    with pytest.raises(ConfigConflictError, match=r"\(777, 'dog'\).*train2017"):
        detection(coco, classes=["cat", "dog"], shots=2, manifest=folder).chosen("train")


@pytest.mark.parametrize(
    ("published", "own", "fits"),
    [
        ("./data/flowers/jpg/1.jpg", "jpg/1.jpg", True),
        ("1.jpg", "jpg/1.jpg", True),
        ("jpg/1.jpg", "1.jpg", True),
        ("./data/cars/cars_train/1.jpg", "cars_train/cars_train/1.jpg", True),
        ("cars_train/1.jpg", "cars_test/1.jpg", False),
        ("jpg/2.jpg", "jpg/1.jpg", False),
    ],
)
def test_published_paths_fit_by_their_ends(published, own, fits):
    found, missing = match([Entry(published, 0)], [Row("x", own, "rose")], False, Path("f"))
    assert (len(found), len(missing)) == ((1, 0) if fits else (0, 1))


def test_the_best_of_several_fits_and_none_of_equals():
    rows = [Row("train", "cars_train/1.jpg", "a"), Row("test", "cars_test/1.jpg", "a")]
    found, _ = match([Entry("data/cars_test/1.jpg", 0)], rows, False, Path("f"))
    assert ids(found) == ["test"]
    assert match([Entry("1.jpg", 0)], rows, False, Path("f")) == ([], ["1.jpg"])


@pytest.mark.sample_data
@pytest.mark.parametrize("shots", [1, 4])
def test_real_published_draws_are_read(sample_data, shots, root):
    for name, classes in (("oxford_flowers", 102), ("oxford_pets", 37), ("stanford_cars", 196), ("fgvc_aircraft", 100)):
        file = sample_data / "coop_fewshot/indices" / name / f"shot_{shots}-seed_1.json"
        given = Flowers(root=root, manifest=file).given
        assert Counter(Counter(e.label for e in given.splits["train"]).values()) == {shots: classes}
        assert len({entry.path for part in given.splits.values() for entry in part}) == 2 * shots * classes


# What a review found


class WithAbsent(Flowers):
    """Half of the rows of every class ask for what is not there."""

    def rows(self, split):
        return [Row(row.id, row.image, row.label, instances=n // 3 % 2) for n, row in enumerate(super().rows(split))]


def test_a_question_about_what_is_not_there_is_no_shot(root):
    assert all(row.instances for row in WithAbsent(root=root, shots=2).chosen("train"))
    assert Counter(row.instances for row in WithAbsent(root=root).chosen("train")) == {0: 6, 1: 6}


def test_a_short_validation_holds_positives_of_every_class(root):
    rows = WithAbsent(root=root, val_limit=3).chosen("val")
    assert {row.label for row in rows if row.instances} == set(NAMES)


def test_val_limit_makes_no_class_short(root):
    data = Flowers(root=root, val_shots=2, val_limit=2)
    assert len(data.chosen("val")) == 2
    assert data.short("val") == {}


def test_too_many_validation_shots_say_so(root):
    with pytest.raises(
        EmptyClassError, match=r"No training picture is left of 'daisy', 'rose', 'tulip': .*val_shots=4 holds 12"
    ):
        Flowers(root=root, val_shots=4).chosen("train")
    excluded = [f"jpg/{n:03}.jpg" for n in (0, 3, 6, 9)]
    with pytest.raises(EmptyClassError, match=r"left of 'rose'.*exclude_image_ids leaves 4 out"):
        Flowers(root=root, classes=["rose"], exclude_image_ids=excluded).chosen("train")


def test_an_unreadable_validation_shot_is_replaced(root):
    kept = Flowers(root=root, val_shots=2).chosen("val")
    damage(root / kept[0].image)
    with pytest.warns(UserWarning, match="1 pictures of"):
        rows = Flowers(root=root, val_shots=2, on_bad_image="skip").chosen("val")
    assert Counter(row.label for row in rows) == dict.fromkeys(NAMES, 2)
    assert kept[0].image not in images(rows)


def test_a_manifest_does_not_get_round_an_exclusion(root, tmp_path):
    data = Flowers(root=root, shots=1)
    data.write_manifest(tmp_path / "m.json")
    shown = data.chosen("train")[0].image
    with pytest.raises(
        ConfigConflictError, match=r"1 training rows of .*m\.json show pictures that data\.exclude_image_ids"
    ):
        Flowers(root=root, manifest=tmp_path / "m.json", exclude_image_ids=[shown]).chosen("train")


class Levelled(Flowers):
    def __init__(self, *, level="variant", **kwargs):
        super().__init__(**kwargs)
        self.level = level


def test_a_manifest_of_another_level_is_refused(root, tmp_path):
    Levelled(root=root, shots=1).write_manifest(tmp_path / "m.json")
    Levelled(root=root, manifest=tmp_path / "m.json").chosen("train")
    with pytest.raises(ConfigConflictError, match=r"level='variant', but data\.level is 'family'"):
        Levelled(root=root, level="family", manifest=tmp_path / "m.json").chosen("train")


def test_a_named_class_without_examples_and_an_exclusion(coco):
    with pytest.raises(EmptyClassError):
        detection(coco, classes=["car"], exclude_image_ids=[1]).chosen("train")


def test_16_bit_grey_pictures_are_scaled(tmp_path):
    Image.new("I;16", (4, 4), 30000).save(tmp_path / "a.png")
    sample = Sample("a", tmp_path / "a.png", ClassTarget("x"), ClassificationTask(), (4, 4))
    assert sample.load_image().getpixel((0, 0)) == (116, 116, 116)
