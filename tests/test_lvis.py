"""LVISDetectionDataModule on a rendered tree in the true format, and on sample data where there is some."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from rft_lightning.datamodules import LVISDetectionDataModule, annotation_cache, lvis_annotations
from rft_lightning.datamodules.lvis import CLASS_SETS, FEW_SHOT_6, RARE_13
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError, EmptyClassError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.tasks import DetectionTask
from tests.datamodule_checks import DataModuleChecks
from tests.fakes.lvis import CATEGORIES, PICTURES, write_lvis

pytestmark = pytest.mark.filterwarnings("ignore:Fewer than:UserWarning", "ignore:Left out of training:UserWarning")
RARE = ["die", "papaya", "stepladder"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_lvis(tmp_path)
    return tmp_path


def data(root: Path, **kwargs) -> LVISDetectionDataModule:
    return LVISDetectionDataModule(root=root, **{"classes": RARE, **kwargs})


def pairs(samples) -> list[tuple[int, str]]:
    return [(sample.image_id, sample.target.category) for sample in samples]


def find(samples, image: int, name: str):
    return next(s for s in samples if (s.image_id, s.target.category) == (image, name))


class TestLVIS(DataModuleChecks):
    @pytest.fixture
    def make(self, root):
        return lambda **kwargs: data(root, **kwargs)


class TestLVISWithNegatives(DataModuleChecks):
    @pytest.fixture
    def make(self, root):
        return lambda **kwargs: data(root, **{"negative_fraction": 0.5, **kwargs})

    def test_shots_are_nested(self):
        """Negatives follow the number of rows, so they are not a part of the nesting."""

    def test_excluded_pictures_are_in_no_training_row(self, make):
        rows = make(exclude_image_ids=[101, 105]).chosen("train")
        assert not {101, 105} & {row.image for row in rows}
        assert any(row.instances == 0 for row in rows)


def test_a_sample_is_complete(root):
    sample = find(data(root).split("train"), 101, "die")
    assert sample.id == "lvis/train/101/365"
    assert sample.image == root / "coco/train2017/000000000101.jpg"
    assert sample.image_size == sample.target.image_size == (60, 40)
    assert sample.target.boxes.tolist() == [[4, 5, 24.5, 15.25], [30, 8, 50, 30]]
    assert sample.target.areas.tolist() == [20.5 * 10.25 * 0.75, 20 * 22 * 0.75]
    assert (sample.target.category_id, sample.target.frequency) == (365, "r")
    assert len(sample.target.ignore_boxes) == 0


def test_training_rows_are_annotated_pairs_with_a_box_inside_the_picture(root):
    rows = data(root, classes=None).split("train")
    expected = [
        (image, CATEGORIES[c][0])
        for image, (_, _, objects, _, _) in PICTURES["train"].items()
        for c in sorted(objects)
        if (image, c) != (106, 733)
    ]
    assert pairs(rows) == expected
    assert find(rows, 103, "die").target.boxes.tolist() == [[0, 30, 17.5, 50]]


def test_pictures_of_validation_are_found_in_both_folders(root):
    folders = {sample.image_id: sample.image.parent.name for sample in data(root, classes=None).split("val")}
    assert folders == {201: "train2017", 202: "val2017", 203: "val2017", 204: "train2017"}


def test_only_what_is_known_is_asked_in_evaluation(root):
    rows = data(root, classes=None).split("val")
    known = {
        (image, CATEGORIES[c][0])
        for image, (_, _, objects, negative, _) in PICTURES["val"].items()
        for c in [*objects, *negative]
    }
    assert set(pairs(rows)) == known
    assert len(rows) == len(known)
    assert pairs(data(root, query_mode="gt").split("test")) == [(201, "die"), (202, "papaya"), (203, "stepladder")]


def test_the_target_says_where_more_objects_may_be(root):
    rows = data(root).split("val")
    assert find(rows, 202, "papaya").target.not_exhaustive
    assert not find(rows, 201, "die").target.not_exhaustive
    assert find(data(root).split("train"), 104, "papaya").target.not_exhaustive


def test_negatives_are_verified_ones(root):
    rows = data(root, negative_fraction=0.5, seed=1).chosen("train")
    ids = {name: number for number, (name, _) in CATEGORIES.items()}
    negatives = [row for row in rows if row.instances == 0]
    assert len(negatives) == sum(row.instances > 0 for row in rows) == 7
    assert all(ids[row.label] in PICTURES["train"][row.image][3] for row in negatives)
    sample = next(s for s in data(root, negative_fraction=0.5, seed=1).split("train") if len(s.target.boxes) == 0)
    assert DetectionTask().solution(sample.target, CoordinateFrame()) == "<answer>No Objects</answer>"


def test_max_rows_counts_negatives(root):
    rows = data(root, negative_fraction=0.5, max_rows=4).chosen("train")
    assert Counter(row.instances == 0 for row in rows) == {True: 2, False: 2}


def test_shots_beyond_what_exists_take_what_there_is_and_say_so(root):
    with pytest.warns(UserWarning, match=r"Fewer than 10 images of 3 of 3 classes.*papaya \(1\)"):
        rows = data(root, shots=10).chosen("train")
    assert Counter(row.label for row in rows) == {"die": 3, "papaya": 1, "stepladder": 3}


def test_class_sets(root):
    rare = data(root, classes="rare", negative_fraction=0)
    assert rare.class_names == ["die", "omelet", "papaya", "stepladder"]
    assert data(root, classes="common").class_names == ["teapot"]
    assert data(root, classes="frequent").class_names == ["car_(automobile)", "person"]
    assert data(root, classes="teapot").class_names == ["teapot"]
    with pytest.raises(EmptyClassError, match=r"'omelet' in .*lvis_v1_train.json"):
        data(root, classes=["die", "omelet"]).split("train")


def test_unknown_classes_are_named_with_what_was_meant(root):
    with pytest.raises(ConfigConflictError, match=r"'stepladdr' \(did you mean 'stepladder'\?\)"):
        data(root, classes=["stepladdr"]).split("train")
    with pytest.raises(ConfigConflictError, match=r"'horse_buggy'.*few_shot_6, rare_13, rare, common, frequent"):
        data(root, classes="few_shot_6").split("train")


def test_minival_is_the_part_of_validation_in_val2017(root):
    rows = data(root, classes=None, val_split="minival").split("val")
    assert {sample.image_id for sample in rows} == {202, 203}
    assert rows[0].id.startswith("lvis/minival/")


def test_root_may_be_the_lvis_folder_and_pictures_elsewhere(root):
    inside = data(root / "lvis").split("train")
    assert [sample.image for sample in inside] == [sample.image for sample in data(root).split("train")]
    shutil.move(root / "coco", root / "elsewhere")
    moved = data(root, image_root=root / "elsewhere").split("train")
    assert moved[0].image == root / "elsewhere/train2017/000000000101.jpg"
    with pytest.raises(DatasetNotFoundError, match="image_root"):
        data(root).split("train")


@pytest.mark.parametrize("name", ["COCO_train2014_000000000101.jpg", "000000000101.jpg"])
def test_file_names_of_version_05(root, name):
    file = root / "lvis/annotations/lvis_v1_train.json"
    found = json.loads(file.read_text())
    for entry in found["images"]:
        del entry["coco_url"]
        entry["file_name"] = name.replace("101", str(entry["id"]))
    file.unlink()
    (root / "lvis/lvis_v0.5_train.json").write_text(json.dumps(found))
    assert data(root).split("train")[0].image == root / "coco/train2017/000000000101.jpg"


def test_missing_files_are_listed_with_the_expected_tree(root):
    with pytest.raises(DatasetNotFoundError, match=r"lvis_v1_test.json.*found lvis_v1_train.json, lvis_v1_val.json"):
        data(root, test_split="test").split("test")
    with pytest.raises(DatasetNotFoundError, match=r"does not exist.*lvisdataset\.org"):
        data(root / "nowhere").split("train")
    (root / "coco/train2017/000000000105.jpg").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"Image 105 .*1 of the 7 pictures"):
        data(root).split("train")


@pytest.mark.parametrize("damage", ["cut", "field", "box"])
def test_damaged_files_are_named(root, damage):
    file = root / "lvis/annotations/lvis_v1_train.json"
    content = json.loads(file.read_text())
    if damage == "field":
        del content["images"][0]["neg_category_ids"]
    if damage == "box":
        content["annotations"][0]["bbox"] = [1, 2, 3]
    text = json.dumps(content)
    file.write_text(text[:-100] if damage == "cut" else text)
    with pytest.raises(AnnotationError, match=r"lvis_v1_train.json is no usable LVIS file"):
        data(root).split("train")


@pytest.mark.parametrize("kind", ["image", "category", "annotation"])
def test_an_id_that_occurs_twice_is_named(root, kind):
    file = root / "lvis/annotations/lvis_v1_train.json"
    content = json.loads(file.read_text())
    entries = content[{"image": "images", "category": "categories", "annotation": "annotations"}[kind]]
    entries.append({**entries[0], "name": "rat"})
    file.write_text(json.dumps(content))
    with pytest.raises(AnnotationError) as caught:
        data(root).split("train")
    expected = f"{file} has the {kind} id {entries[0]['id']} twice; expected it once. Rename or remove one."
    assert str(caught.value) == expected


@pytest.mark.parametrize("kind", ["image", "category"])
def test_annotations_of_what_is_not_listed_are_named(root, kind):
    file = root / "lvis/annotations/lvis_v1_train.json"
    content = json.loads(file.read_text())
    content["annotations"][2][f"{kind}_id"] = 777
    file.write_text(json.dumps(content))
    with pytest.raises(AnnotationError) as caught:
        data(root).split("train")
    assert str(caught.value) == (
        f"Annotation 3 in {file} belongs to {kind} 777, which the file does not list. Add the {kind} or remove the "
        "annotation."
    )


def test_a_file_that_is_replaced_while_it_is_parsed_is_not_kept(root, monkeypatch):
    monkeypatch.setattr(annotation_cache, "SMALLEST_SOURCE", 0)
    file = root / "lvis/annotations/lvis_v1_train.json"
    parse = lvis_annotations._parse

    def replaced(source, split):
        arrays = parse(source, split)
        content = json.loads(source.read_text())
        content["annotations"][0]["bbox"] = [1, 2, 3, 4]
        source.write_text(json.dumps(content))
        return arrays

    monkeypatch.setattr(lvis_annotations, "_parse", replaced)
    data(root).split("train")
    monkeypatch.setattr(lvis_annotations, "_parse", parse)
    assert find(data(root).split("train"), 101, "die").target.boxes[0].tolist() == [1, 2, 4, 6]
    assert file.with_name(f".{file.name}.rft.npz").is_file()


def test_a_large_file_is_parsed_once(root, monkeypatch):
    monkeypatch.setattr(annotation_cache, "SMALLEST_SOURCE", 0)
    before = [(s.id, s.target.boxes.tolist()) for s in data(root).split("val")]
    assert (root / "lvis/annotations/.lvis_v1_val.json.rft.npz").is_file()
    monkeypatch.setattr("rft_lightning.datamodules.lvis_annotations._parse", None)
    again = data(root).split("val")
    assert [(s.id, s.target.boxes.tolist()) for s in again] == before
    assert find(again, 202, "papaya").target.not_exhaustive


def test_downloads_are_the_official_archives():
    files = {entry.file: entry for entry in LVISDetectionDataModule.downloads}
    assert set(files) == {"lvis_v1_train.json.zip", "lvis_v1_val.json.zip", "train2017.zip", "val2017.zip"}
    assert all(len(entry.md5) == 32 for entry in files.values())


# --- real category table, real pictures -------------------------------------------------------------------------------


@pytest.fixture
def real(sample_data):
    places = {"root": sample_data / "lvis_v1_mini", "image_root": sample_data / "coco2017_mini/coco"}
    return lambda **kwargs: LVISDetectionDataModule(**places, train_split="val", **kwargs)


@pytest.mark.sample_data
def test_the_real_category_table(real, sample_data):
    counts = {name: len(real(classes=name).class_names) for name in ("rare", "common", "frequent")}
    assert counts == {"rare": 337, "common": 461, "frequent": 405}
    lines = (sample_data / "class_names/lvis_v1_categories.tsv").read_text().splitlines()[1:]
    listed = [line.split("\t")[:3] for line in lines]
    assert real().class_names == [name for _, name, _ in listed]
    assert [number for number, _, _ in listed] == [str(n) for n in range(1, 1204)]
    frequency = real().annotations("val").frequency
    assert {str(number): code for number, code in frequency.items()} == {number: code for number, _, code in listed}
    rare = {name for _, name, code in listed if code == "r"}
    assert set(FEW_SHOT_6) | set(RARE_13) <= rare
    for file, names in (("fewshot6", FEW_SHOT_6), ("ov13", RARE_13)):
        published = (sample_data / f"class_names/lvis_visual_rft_{file}.txt").read_text().split()
        assert sorted(published) == sorted(names)
    assert {k: len(v) for k, v in CLASS_SETS.items()} == {"few_shot_6": 6, "rare_13": 13}
    ids = {"horse_buggy": 161, "die": 365, "kitchen_table": 610, "omelet": 733, "papaya": 755, "stepladder": 1012}
    assert {name: number for number, name in real(classes="few_shot_6").annotations("val").categories.items()} == ids


@pytest.mark.sample_data
def test_real_pictures_and_negatives(real):
    samples = real(classes="few_shot_6").split("test")
    assert pairs(samples) == [
        (89, "horse_buggy"),
        (128372, "die"),
        (194216, "stepladder"),
        (343934, "papaya"),
        (404249, "kitchen_table"),
        (464689, "omelet"),
    ]
    assert all(len(sample.target.boxes) == 0 for sample in samples)
    everything = real().split("train")
    assert sum(len(sample.target.boxes) for sample in everything) == 35
    assert {sample.image.parent.name for sample in everything} <= {"train2017", "val2017"}
    assert find(everything, 128372, "person").target.not_exhaustive
    assert all(sample.load_image().size == sample.image_size for sample in everything)
