"""COCODetectionDataModule on a rendered tree in the true format, and on real sample data where there is some."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from PIL import Image
from pycocotools.coco import COCO

from rft_lightning.datamodules import COCODetectionDataModule, RFTDataModule, bad_images, coco_annotations
from rft_lightning.datamodules.coco import BASE_65, CLASS_SETS, FEW_SHOT_8, NOVEL_15
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError, EmptyClassError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.tasks import DetectionTask
from tests.datamodule_checks import DataModuleChecks
from tests.fakes.coco import ANNOTATIONS, CATEGORIES, GREY, MASK_SHARE, ROTATED, SIZES, edit, file_name, write_coco

pytestmark = pytest.mark.filterwarnings("ignore:.*share pictures:UserWarning", "ignore:Fewer than:UserWarning")
IDS = {name: key for key, name in CATEGORIES.items()}
TRAINED = ["person", "bus", "cat", "dog", "backpack"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with train2017 and val2017."""
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "coco", split)
    return tmp_path / "coco"


def data(root: Path, **kwargs) -> COCODetectionDataModule:
    return COCODetectionDataModule(root=root, **{"classes": TRAINED, **kwargs})


def ids(samples) -> list[str]:
    return [sample.id for sample in samples]


def pairs(samples) -> list[tuple[int, str]]:
    return [(sample.image_id, sample.target.category) for sample in samples]


def find(samples, image: int, name: str):
    return next(s for s in samples if (s.image_id, s.target.category) == (image, name))


def message(caught: pytest.ExceptionInfo) -> str:
    return str(caught.value)


class TestCOCO(DataModuleChecks):
    @pytest.fixture
    def make(self, root):
        return lambda **kwargs: data(root, **kwargs)


class TestCOCOWithoutValidationSplit(DataModuleChecks):
    @pytest.fixture
    def make(self, root):
        return lambda **kwargs: data(root, **{"classes": ["cat", "person"], "val_split": None, **kwargs})


# --- samples ---------------------------------------------------------------------------------------------------------


def test_training_rows_are_the_pairs_with_a_box(root):
    rows = data(root).split("train")
    expected = sorted({(i, IDS[name], name) for _, i, name, box, crowd in ANNOTATIONS if not crowd and box[2] > 0})
    assert pairs(rows) == [(image, name) for image, _, name in expected]
    assert ids(rows) == [f"coco/train2017/{image}/{category}" for image, category, _ in expected]
    assert all(len(sample.target.boxes) > 0 for sample in rows)


def test_a_sample_is_complete(root):
    task = DetectionTask(rules="paper")
    sample = find(data(root, task=task).split("train"), 9, "cat")
    assert sample.id == "coco/train2017/9/17"
    assert sample.image == root / "train2017" / "000000000009.jpg"
    assert sample.image_id == 9
    assert sample.task is task
    assert sample.image_size == sample.target.image_size == (64, 48)
    assert sample.target.category_id == 17
    assert sample.target.boxes.dtype == torch.float64
    assert sample.target.boxes.tolist() == [[4, 5, 24.5, 35.25], [40, 2, 52, 12]]
    # COCO's own area, of the mask
    assert sample.target.areas.tolist() == [20.5 * 30.25 * MASK_SHARE, 12 * 10 * MASK_SHARE]
    assert sample.target.ignore_boxes.shape == (0, 4)
    assert sample.load_image().size == (64, 48)


def test_default_task_is_detection(root):
    assert isinstance(data(root).split("train")[0].task, DetectionTask)


def test_pictures_load_as_rgb_at_their_stored_size(root):
    rows = data(root).split("test")
    assert find(rows, GREY, "cat").load_image().mode == "RGB"
    with Image.open(find(rows, ROTATED, "cat").image) as picture:
        assert picture.getexif()[0x0112] == 6
    assert find(rows, ROTATED, "cat").load_image().size == SIZES[ROTATED]


def test_boxes_are_clipped_to_the_picture(root):
    target = find(data(root).split("train"), 30, "cat").target
    assert target.boxes.tolist() == [[0, 10, 27.5, 64]]
    assert target.areas.tolist() == [30 * 60.25 * MASK_SHARE]


@pytest.mark.parametrize("box", [[10, 10, 0, 5], [10, 10, 5, 0], [10, 10, -3, 5], [64, 0, 10, 10], [-9, 0, 9, 9]])
def test_boxes_without_area_inside_the_picture_are_dropped(root, box):
    edit(root / "annotations/instances_train2017.json", lambda d: _note(d, 1002).update(bbox=box))
    rows = data(root, classes=["cat", "dog"]).split("train")
    assert (9, "dog") not in pairs(rows)
    assert (9, "cat") in pairs(rows)


def test_crowds_are_no_answers_and_no_shots(root):
    rows = data(root).split("train")
    assert (25, "bus") not in pairs(rows)
    target = find(rows, 42, "cat").target
    assert target.boxes.tolist() == [[40, 6, 64, 36]]
    solution = DetectionTask().solution(target, CoordinateFrame())
    assert solution.count("Position") == 1
    few = data(root, classes=["bus"], shots=2).split("train")
    assert pairs(few) == [(139, "bus")]


def test_crowds_are_ignore_regions_in_evaluation(root):
    rows = data(root).split("val")
    target = find(rows, 42, "cat").target
    assert target.ignore_boxes.tolist() == [[0, 36, 72, 48]]
    assert target.ignore_areas.tolist() == [72 * 12 * MASK_SHARE]
    assert len(target.boxes) == 1
    only = find(rows, 25, "bus").target
    assert (len(only.boxes), only.ignore_boxes.tolist()) == (0, [[2, 2, 46, 14]])


def test_area_and_iscrowd_may_be_missing(root):
    def strip(content):
        for note in content["annotations"]:
            del note["area"], note["iscrowd"]

    edit(root / "annotations/instances_train2017.json", strip)
    rows = data(root).split("train")
    assert find(rows, 9, "dog").target.areas.tolist() == [25 * 32]
    assert (25, "bus") in pairs(rows)


def test_every_split_name_reads_its_own_tree(tmp_path):
    for split in ("train2014", "val2014"):
        write_coco(tmp_path, split)
    loader = data(tmp_path, train_split="val2014", val_split="train2014", test_split="val2014")
    assert loader.split("train")[0].image == tmp_path / "val2014" / "COCO_val2014_000000000009.jpg"
    assert loader.split("val")[0].image == tmp_path / "train2014" / "COCO_train2014_000000000009.jpg"
    assert loader.split("train")[0].load_image().size == SIZES[9]
    assert ids(loader.split("test")) == ids(loader.split("predict"))
    assert ids(loader.split("test"))[0] == "coco/val2014/9/1"


def test_root_may_be_the_folder_above_coco(root):
    assert ids(data(root.parent).split("train")) == ids(data(root).split("train"))
    assert ids(data(str(root)).split("train")) == ids(data(root).split("train"))


def test_splits_are_sequences_that_workers_can_take(root):
    rows = data(root).split("train")
    assert ids(rows[1:3]) == ids(rows)[1:3]
    assert rows[-1].id == ids(rows)[-1]
    with pytest.raises(IndexError):
        rows[len(rows)]
    # Our own bytes, as a spawned worker gets them.
    assert ids(pickle.loads(pickle.dumps(rows))) == ids(rows)


def test_samples_do_not_share_tensors(root):
    rows = data(root).split("train")
    rows[0].target.boxes.zero_()
    assert rows[0].target.boxes.abs().sum() > 0


def test_nothing_is_printed(root, capsys):
    data(root).split("train")
    assert capsys.readouterr() == ("", "")


# --- draws -----------------------------------------------------------------------------------------------------------


def test_golden_draws(root):
    # Derived apart from the package, by sorting on the documented hash.
    few = ["9/18", "30/17", "42/17", "42/18", "139/1", "139/6", "285/1", "285/27"]
    assert ids(data(root, shots=2).split("train")) == [f"coco/train2017/{row}" for row in few]
    one = ["30/17", "42/18", "139/6", "285/1", "285/27"]
    assert ids(data(root, shots=1, seed=1).split("train")) == [f"coco/train2017/{row}" for row in one]
    mixed = ["139/1", "139/27", "285/17", "285/18"]
    drawn = data(root, max_rows=4, negative_fraction=0.5).split("train")
    assert ids(drawn) == [f"coco/train2017/{row}" for row in mixed]


def test_shots_count_pictures_and_nest(root):
    draws = [set(ids(data(root, classes=["cat", "dog"], shots=shots).split("train"))) for shots in range(1, 6)]
    assert all(small <= large for small, large in pairwise(draws))
    # five pictures show cats, two dogs; picture 9 shows two cats and is one shot
    assert [len(draw) for draw in draws] == [2, 4, 5, 6, 7]
    assert draws[-1] == set(ids(data(root, classes=["cat", "dog"]).split("train")))


def test_the_draw_follows_the_seed_and_not_the_file(root):
    draws = {tuple(ids(data(root, classes=["cat"], shots=2, seed=seed).split("train"))) for seed in range(20)}
    assert len(draws) > 4
    before = ids(data(root, shots=1).split("train"))
    edit(root / "annotations/instances_train2017.json", lambda d: (d["annotations"].reverse(), d["images"].reverse()))
    assert ids(data(root, shots=1).split("train")) == before


def test_the_draw_of_a_class_does_not_depend_on_the_other_classes(root):
    alone = ids(data(root, classes=["cat"], shots=2).split("train"))
    assert set(alone) <= set(ids(data(root, classes=["dog", "cat"], shots=2).split("train")))


def test_too_few_pictures_are_reported(root):
    with pytest.warns(UserWarning, match=r"Fewer than 3 images of 2 of 3 classes in train2017.*bus \(1\), dog \(2\)"):
        rows = data(root, classes=["dog", "bus", "cat"], shots=3).split("train")
    assert Counter(name for _, name in pairs(rows)) == {"cat": 3, "dog": 2, "bus": 1}


def test_max_rows_is_a_nested_draw(root):
    everything = ids(data(root).split("train"))
    draws = [set(ids(data(root, max_rows=n).split("train"))) for n in range(1, len(everything) + 3)]
    assert [len(draw) for draw in draws] == [min(n, len(everything)) for n in range(1, len(everything) + 3)]
    assert all(small <= large for small, large in pairwise(draws))
    assert draws[-1] == set(everything)
    assert len(data(root, shots=2, max_rows=3).split("train")) == 3


def test_negatives_ask_for_what_is_not_there(root):
    positives = data(root).split("train")
    rows = data(root, negative_fraction=0.4).split("train")
    negatives = [sample for sample in rows if len(sample.target.boxes) == 0]
    assert set(ids(positives)) <= set(ids(rows))
    assert len(ids(rows)) == len(set(ids(rows)))
    assert len(negatives) == round(len(positives) * 0.4 / 0.6)
    shown = {(image, name) for _, image, name, _, _ in ANNOTATIONS}  # crowds and boxes without area included
    assert not shown & set(pairs(negatives))
    assert len({sample.image_id for sample in negatives}) == min(len(negatives), len(SIZES))
    assert DetectionTask().solution(negatives[0].target, CoordinateFrame()) == "<answer>No Objects</answer>"


def test_negatives_nest_and_reach_every_picture(root):
    draws = [set(ids(data(root, shots=1, negative_fraction=f).split("train"))) for f in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert all(small < large for small, large in pairwise(draws))
    rows = data(root, negative_fraction=0.6).split("train")
    assert 61 in {sample.image_id for sample in rows if len(sample.target.boxes) == 0}


def test_max_rows_counts_negatives(root):
    rows = data(root, max_rows=5, negative_fraction=0.4).split("train")
    assert Counter(len(sample.target.boxes) > 0 for sample in rows) == {True: 3, False: 2}
    assert len(data(root, max_rows=1, negative_fraction=0.9).split("train")) == 1


def test_too_few_negatives_are_reported(root):
    with pytest.warns(UserWarning, match=r"negative_fraction=0.9 asks for 45 rows.*train2017 has 2; all of them"):
        rows = data(root, classes=["cat"], negative_fraction=0.9).split("train")
    assert len(rows) == 5 + 2  # 61 and 139 show no cat


def test_trained_and_tested_pictures_that_overlap_are_reported(root, tmp_path):
    with pytest.warns(UserWarning, match="train_split val2017 and test_split val2017 share pictures"):
        data(root, train_split="val2017", val_split="train2017").split("train")
    write_coco(tmp_path / "old", "val2014")
    with pytest.warns(UserWarning, match="train_split val2014 and val_split val2017 share pictures"):
        data(tmp_path / "old", train_split="val2014").split("train")


@pytest.mark.filterwarnings("error")
def test_disjoint_splits_give_no_warning(root):
    data(root).split("train")


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_every_category_is_asked_of_every_picture(root):
    rows = data(root).split("val")
    assert pairs(rows) == [(image, name) for image in sorted(SIZES) for name in TRAINED]
    empty = [sample for sample in rows if sample.image_id == 61]
    assert len(empty) == len(TRAINED)
    assert all(len(sample.target.boxes) == len(sample.target.ignore_boxes) == 0 for sample in empty)
    assert all(sample.image_size == SIZES[61] for sample in empty)
    # as many boxes and crowds as the file has
    selected = [(box, crowd) for _, _, name, box, crowd in ANNOTATIONS if name in TRAINED and box[2] > 0]
    assert sum(len(sample.target.boxes) for sample in rows) == sum(not crowd for _, crowd in selected)
    assert sum(len(sample.target.ignore_boxes) for sample in rows) == sum(crowd for _, crowd in selected)


def test_oracle_questions_ask_for_what_is_annotated(root):
    rows = data(root, query_mode="gt").split("test")
    expected = {(i, IDS[name], name) for _, i, name, box, _ in ANNOTATIONS if name in TRAINED and box[2] > 0}
    assert pairs(rows) == [(image, name) for image, _, name in sorted(expected)]
    assert (25, "bus") in pairs(rows)  # a crowd is there
    assert (30, "dog") not in pairs(rows)  # nothing is left of it
    assert 61 not in {sample.image_id for sample in rows}


def test_val_limit_takes_the_first_pictures_by_id(root):
    loader = data(root, val_limit=3)
    assert sorted({sample.image_id for sample in loader.split("val")}) == [9, 25, 30]
    assert ids(loader.split("val")) == ids(data(root).split("val"))[: 3 * len(TRAINED)]
    assert {sample.image_id for sample in loader.split("test")} == set(SIZES)


def test_shots_do_not_touch_evaluation(root):
    assert ids(data(root, shots=1, seed=4, max_rows=2).split("val")) == ids(data(root).split("val"))


def test_test_and_prediction_are_the_same(root):
    loader = data(root, val_split="train2017")
    assert ids(loader.split("predict")) == ids(loader.split("test"))
    assert {sample.id.split("/")[1] for sample in loader.split("val")} == {"train2017"}


def test_a_file_is_read_once(root, monkeypatch):
    read = []
    monkeypatch.setattr(coco_annotations, "COCO", lambda path: read.append(path) or COCO(path))
    loader = data(root, train_split="val2017")
    for split in ("train", "val", "test", "predict", "val"):
        loader.split(split)
    assert len(read) == 1


# --- classes ---------------------------------------------------------------------------------------------------------


def test_class_sets_are_the_papers():
    assert (len(FEW_SHOT_8), len(BASE_65), len(NOVEL_15)) == (8, 65, 15)
    assert len(set(BASE_65) | set(NOVEL_15)) == 80
    assert set(FEW_SHOT_8) < set(BASE_65) | set(NOVEL_15)
    assert set(CLASS_SETS) == {"few_shot_8", "base_65", "novel_15"}


@pytest.mark.parametrize("name", ["few_shot_8", "base_65", "novel_15"])
def test_a_class_set_is_asked_for_by_name(root, name):
    def rename(content):
        content["categories"] = [{"id": n, "name": c} for n, c in enumerate(sorted({*BASE_65, *NOVEL_15}), start=1)]

    edit(root / "annotations/instances_val2017.json", rename)
    edit(root / "annotations/instances_val2017.json", lambda d: d.update(annotations=[]))
    rows = data(root, classes=name, val_limit=1).split("val")
    assert {sample.target.category for sample in rows} == set(CLASS_SETS[name])


def test_a_single_class_may_be_written_bare(root):
    assert {name for _, name in pairs(data(root, classes="cat").split("train"))} == {"cat"}


def test_questions_are_in_the_order_of_category_ids(root):
    assert pairs(data(root, classes=["dog", "person", "cat"]).split("val"))[:3] == [
        (9, "person"),
        (9, "cat"),
        (9, "dog"),
    ]


def test_all_classes_train_on_those_with_examples(root):
    with pytest.warns(UserWarning, match="Left out of training, no example in train2017: car, toothbrush"):
        rows = data(root, classes=None, negative_fraction=0.5).split("train")
    assert {name for _, name in pairs(rows)} == set(TRAINED)
    asked = {sample.target.category for sample in data(root, classes=None).split("val")}
    assert asked == set(CATEGORIES.values())


@pytest.mark.parametrize("name", ["car", "toothbrush"])
def test_a_named_class_without_example_is_an_error(root, name):
    with pytest.raises(EmptyClassError) as caught:
        data(root, classes=["cat", name], shots=1).split("train")
    text = message(caught)
    assert f"No example of '{name}' in train2017" in text
    assert f"{len(ANNOTATIONS)} annotations were looked at" in text
    assert "Crowd regions" in text
    assert "Take what has no example out of data.classes" in text
    assert data(root, classes=["cat", name]).split("val")  # evaluation asks all the same


def test_a_split_without_annotations_is_an_error_in_training_only(root):
    edit(root / "annotations/instances_train2017.json", lambda d: d.update(annotations=[]))
    with pytest.raises(EmptyClassError, match="No example of any class in train2017: 0 annotations"):
        data(root, classes=None).split("train")
    assert len(data(root, val_split="train2017").split("val")) == len(SIZES) * len(TRAINED)


def test_unknown_classes_are_named_with_close_matches(root):
    with pytest.raises(ConfigConflictError) as caught:
        data(root, classes=["cat", "bakpack", "Dog", "zzz"]).split("train")
    text = message(caught)
    assert "'bakpack' (did you mean 'backpack'?)" in text
    assert "'Dog' (did you mean 'dog'" in text
    assert "'zzz'" in text
    assert "instances_train2017.json has 7 classes: person, car, bus, cat, dog, backpack, toothbrush" in text
    assert "Unknown class in data.classes: 'cat'" not in text


def test_an_unknown_set_is_named_with_close_matches(root):
    with pytest.raises(ConfigConflictError, match=r"'base_60' \(did you mean 'base_65'"):
        data(root, classes="base_60").split("val")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"shots": 0}, "shots >= 1 or null, found 0"),
        ({"max_rows": -2}, "max_rows >= 1 or null, found -2"),
        ({"val_limit": 0}, "val_limit >= 1 or null, found 0"),
        ({"negative_fraction": 1.0}, "0 <= negative_fraction < 1, found 1.0"),
        ({"negative_fraction": -0.1}, "0 <= negative_fraction < 1, found -0.1"),
        ({"query_mode": "some"}, "query_mode to be one of all, gt, map, found 'some'"),
        ({"classes": []}, "null for all classes, found classes="),
    ],
)
def test_settings_out_of_range(tmp_path, setting, expected):
    with pytest.raises(ConfigConflictError, match=expected):
        data(tmp_path, **setting)


def test_a_missing_root_says_what_was_looked_for(tmp_path):
    with pytest.raises(DatasetNotFoundError) as caught:
        data(tmp_path / "nowhere").setup("fit")
    text = message(caught)
    assert f"the folder {tmp_path / 'nowhere'} does not exist" in text
    assert str(tmp_path / "nowhere/annotations/instances_train2017.json") in text
    assert str(tmp_path / "nowhere/train2017") in text
    assert "Set data.root" in text
    assert "train2017.zip and annotations_trainval2017.zip from https://cocodataset.org/#download" in text


def test_a_missing_annotation_file_names_the_splits_that_are_there(root):
    with pytest.raises(DatasetNotFoundError) as caught:
        data(root, train_split="val2014").split("train")
    text = message(caught)
    assert f"{root / 'annotations/instances_val2014.json'} does not exist" in text
    assert "splits found there: train2017, val2017" in text
    assert "annotations_trainval2014.zip" in text
    with pytest.raises(DatasetNotFoundError, match="official splits are train2017, val2017, train2014 and val2014"):
        data(root, val_split="test2017").split("val")


@pytest.mark.parametrize("split", ["train", "val", "test", "predict"])
def test_an_annotation_without_its_picture_is_an_error(root, split):
    folder = root / ("train2017" if split == "train" else "val2017")
    picture = folder / file_name(folder.name, 9)
    picture.unlink()
    (folder / file_name(folder.name, 61)).unlink()
    with pytest.raises(DatasetNotFoundError) as caught:
        data(root).split(split)
    text = message(caught)
    assert text.startswith("Annotation 1001 (image 9) in ")
    assert f"instances_{folder.name}.json needs the picture {picture}, which does not exist" in text
    counts = "1 of the 6" if split == "train" else "2 of the 7"
    assert f"{counts} pictures used of {folder.name} are missing" in text
    assert f"restore them ({folder.name}.zip" in text
    assert "or remove them and their annotations" in text


def test_a_missing_picture_without_annotations_is_an_error_in_evaluation(root):
    (root / "val2017" / file_name("val2017", 61)).unlink()
    with pytest.raises(DatasetNotFoundError, match=r"^Image 61 in .*needs the picture"):
        data(root).split("val")
    assert data(root, query_mode="gt").split("val")


def test_missing_picture_folder(root):
    shutil.rmtree(root / "val2017")
    with pytest.raises(DatasetNotFoundError, match="7 of the 7 pictures used of val2017 are missing"):
        data(root).split("val")


def test_pictures_that_are_not_used_may_be_missing(root):
    used = {sample.image_id for sample in data(root, classes=["dog"], shots=1).split("train")}
    for image in set(SIZES) - used:
        (root / "train2017" / file_name("train2017", image)).unlink()
    assert len(data(root, classes=["dog"], shots=1).split("train")) == 1


def test_a_file_that_is_no_picture_is_an_error(root):
    picture = root / "val2017" / file_name("val2017", 30)
    picture.write_text("<html>404</html>")
    with pytest.raises(DatasetNotFoundError) as caught:
        data(root).split("val")
    text = message(caught)
    assert f"The picture {picture} of image 30" in text
    assert "cannot be read" in text
    assert "Restore it (val2017.zip" in text


def test_a_picture_of_another_size_is_an_error(root):
    picture = root / "train2017" / file_name("train2017", 25)
    Image.new("RGB", (64, 48)).save(picture)
    with pytest.raises(AnnotationError) as caught:
        data(root).split("train")
    text = message(caught)
    assert f"The picture {picture} has 64x48 pixels" in text
    assert "instances_train2017.json states 48x64 for image 25" in text
    assert "Restore the original picture" in text


def test_sizes_of_very_many_pictures_are_checked_when_a_sample_is_made(root, monkeypatch):
    monkeypatch.setattr(bad_images, "AT_START", 3)
    picture = root / "train2017" / file_name("train2017", 25)
    Image.new("RGB", (64, 48)).save(picture)
    rows = data(root, classes=["cat"]).split("train")
    assert rows[0].image_id == 9
    with pytest.raises(AnnotationError, match="64x48"):
        rows[1]
    picture.unlink()
    with pytest.raises(DatasetNotFoundError, match="1 of the 5 pictures"):
        data(root, classes=["cat"]).split("train")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"images": [', "Expecting value"),
        ("", "Expecting value"),
        ("[]", "not supported|list indices"),
        ('{"images": [], "annotations": []}', "'categories' is missing"),
        ('{"annotations": [{"id": 1}], "images": [], "categories": []}', "'image_id' is missing"),
        ('{"annotations": [], "images": [{"id": 1, "width": 4}], "categories": []}', "'file_name' is missing"),
        (
            '{"annotations": [], "images": [{"id": 1, "file_name": "", "width": null}], "categories": []}',
            r"int\(\) argument",
        ),
        ('{"annotations": 3, "images": [], "categories": []}', "not iterable"),
    ],
)
def test_broken_annotation_files(root, text, problem):
    file = root / "annotations/instances_train2017.json"
    file.write_text(text)
    with pytest.raises(AnnotationError, match=problem) as caught:
        data(root).split("train")
    assert f"{file} is no usable COCO instances file" in message(caught)
    assert "Expected JSON with `images`" in message(caught)
    assert "download it again from https://cocodataset.org/#download" in message(caught)


def test_an_annotation_file_in_another_encoding_is_an_error(root):
    file = root / "annotations/instances_train2017.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AnnotationError, match="no usable COCO instances file"):
        data(root).split("train")


@pytest.mark.parametrize("box", [None, [1, 2, 3], "1 2 3 4", [1, 2, 3, "x"], [1, 2, float("nan"), 4], [1, 2, 3, 1e999]])
def test_unusable_boxes_are_named(root, box):
    edit(root / "annotations/instances_train2017.json", lambda d: _note(d, 1020).update(bbox=box))
    with pytest.raises(AnnotationError) as caught:
        data(root).split("train")
    text = message(caught)
    assert "Annotation 1020 in " in text
    assert "instances_train2017.json has bbox" in text
    assert "expected [x, y, width, height]" in text
    assert "Correct or remove the annotation" in text


@pytest.mark.parametrize(("key", "kind"), [("image_id", "image"), ("category_id", "category")])
def test_annotations_of_what_is_not_listed_are_named(root, key, kind):
    edit(root / "annotations/instances_train2017.json", lambda d: _note(d, 1020).update({key: 777}))
    with pytest.raises(AnnotationError) as caught:
        data(root).split("train")
    assert f"belongs to {kind} 777, which the file does not list" in message(caught)
    assert "Annotation 1020 in " in message(caught)
    assert f"Add the {kind} or remove the annotation" in message(caught)


def test_two_categories_of_one_name_are_an_error(root):
    edit(root / "annotations/instances_train2017.json", lambda d: d["categories"][1].update(name="cat"))
    with pytest.raises(AnnotationError, match=r"several categories named 'cat'.*Rename or merge"):
        data(root).split("train")


@pytest.mark.parametrize("kind", ["image", "category", "annotation"])
def test_an_id_that_occurs_twice_is_named(root, kind):
    file = root / "annotations/instances_train2017.json"
    entries = {"image": "images", "category": "categories", "annotation": "annotations"}[kind]
    edit(file, lambda d: d[entries].append({**d[entries][0], "name": "rat", "file_name": "another.jpg"}))
    number = json.loads(file.read_text())[entries][0]["id"]
    with pytest.raises(AnnotationError) as caught:
        data(root).split("train")
    assert message(caught) == f"{file} has the {kind} id {number} twice; expected it once. Rename or remove one."


def _note(content: dict, number: int) -> dict:
    return next(note for note in content["annotations"] if note["id"] == number)


# --- the shipped configuration ---------------------------------------------------------------------------------------


def instantiate(parser: ArgumentParser, parsed):
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    return build(parsed)


def test_shipped_config_builds_the_module_and_names_every_argument(root):
    file = Path(__file__).resolve().parents[1] / "configs/coco.yaml"
    content = yaml.safe_load(file.read_text())
    assert content["config"] == "base.yaml"
    parser = ArgumentParser()
    parser.add_subclass_arguments(RFTDataModule, "data")
    parsed = parser.parse_object({"data": content["data"]})
    given, known = content["data"]["init_args"], parsed.data.init_args.as_dict()
    # the processor follows the model's policy
    assert set(known) - set(given) == {"processor"}
    assert set(known["task"]["init_args"]) == set(given["task"]["init_args"])
    module = instantiate(parser, parsed).data
    assert isinstance(module, COCODetectionDataModule)
    assert (module.classes, module.shots, module.batch_size) == ("few_shot_8", 4, 2)
    assert list(module.task.rewards) == ["format", "iou", "confidence"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[person,bottle,bus]", ["person", "bottle", "bus"]), ("base_65", "base_65"), ("null", None), ("[cat]", ["cat"])],
)
def test_classes_on_the_command_line(text, expected):
    parser = ArgumentParser()
    parser.add_subclass_arguments(RFTDataModule, "data")
    words = ["--data=rft_lightning.datamodules.COCODetectionDataModule", "--data.root=x", f"--data.classes={text}"]
    assert instantiate(parser, parser.parse_args(words)).data.classes == expected


# --- real sample data ------------------------------------------------------------------------------------------------


def oracle(file: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(file))


def check_against_pycocotools(root: Path, split: str) -> None:
    truth = oracle(root / f"coco/annotations/instances_{split}.json")
    loader = COCODetectionDataModule(root=root, train_split=split, val_split=split, test_split=split)
    names = {category["id"]: category["name"] for category in truth.loadCats(truth.getCatIds())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = loader.split("train")
    plain = truth.loadAnns(truth.getAnnIds(iscrowd=False))
    crowds = truth.loadAnns(truth.getAnnIds(iscrowd=True))
    assert Counter((s.image_id, s.target.category_id) for s in training for _ in s.target.boxes) == Counter(
        (note["image_id"], note["category_id"]) for note in plain
    )
    questions = loader.split("val")
    assert len(questions) == len(truth.imgs) * len(names)
    assert sum(len(sample.target.boxes) for sample in questions) == len(plain)
    assert sum(len(sample.target.ignore_boxes) for sample in questions) == len(crowds)
    for sample in questions:
        assert sample.target.category == names[sample.target.category_id]
        entry = truth.imgs[sample.image_id]
        assert sample.image_size == (entry["width"], entry["height"])
        notes = truth.loadAnns(truth.getAnnIds([sample.image_id], [sample.target.category_id], iscrowd=False))
        boxes = torch.tensor([note["bbox"] for note in notes], dtype=torch.float64).reshape(-1, 4)
        torch.testing.assert_close(sample.target.boxes[:, :2], boxes[:, :2])
        torch.testing.assert_close(sample.target.boxes[:, 2:], boxes[:, :2] + boxes[:, 2:], atol=0.01, rtol=0)
        assert sample.target.areas.tolist() == [note["area"] for note in notes]
    for sample in {s.image_id: s for s in questions}.values():
        assert sample.load_image().size == sample.image_size
    oracle_rows = COCODetectionDataModule(root=root, val_split=split, query_mode="gt").split("val")
    annotated = {(note["image_id"], note["category_id"]) for note in [*plain, *crowds]}
    assert {(s.image_id, s.target.category_id) for s in oracle_rows} == annotated


@pytest.mark.sample_data
@pytest.mark.parametrize(("folder", "split"), [("coco2017_mini", "val2017"), ("coco2014_mini", "val2014")])
def test_real_pictures_and_boxes_equal_pycocotools(sample_data, folder, split):
    check_against_pycocotools(sample_data / folder, split)


@pytest.mark.sample_data
def test_the_command_of_the_manual_finds_its_rows(sample_data):
    settings = {"train_split": "val2017", "classes": ["person", "bottle", "bus"], "shots": 4}
    loader = COCODetectionDataModule(root=sample_data / "coco2017_mini/coco", **settings)
    assert ids(loader.split("train")) == [
        "coco/val2017/128372/1",
        "coco/val2017/128372/6",
        "coco/val2017/404249/1",
        "coco/val2017/464689/44",
    ]
    crowd = find(loader.split("val"), 464689, "bottle").target
    assert (len(crowd.boxes), len(crowd.ignore_boxes)) == (13, 1)
    assert len(loader.split("val")) == 5 * 3


@pytest.mark.sample_data
def test_class_names_are_those_of_the_real_file(sample_data):
    content = json.loads((sample_data / "coco2017_mini/coco/annotations/instances_val2017.json").read_text())
    assert {entry["name"] for entry in content["categories"]} == set(BASE_65) | set(NOVEL_15)


@pytest.mark.sample_data
def test_a_real_picture_without_boxes_stays_in_evaluation(sample_data):
    loader = COCODetectionDataModule(root=sample_data / "coco2017_mini", val_split="train2017", classes="few_shot_8")
    assert pairs(loader.split("val")) == [
        (89, name) for name in sorted(FEW_SHOT_8, key=list(_order(sample_data)).index)
    ]
    assert all(len(sample.target.boxes) == 0 for sample in loader.split("val"))


def _order(sample_data: Path) -> list[str]:
    content = json.loads((sample_data / "coco2017_mini/coco/annotations/instances_val2017.json").read_text())
    return [entry["name"] for entry in sorted(content["categories"], key=lambda entry: entry["id"])]


def test_downloads_are_those_of_the_used_splits(tmp_path):
    data = COCODetectionDataModule(root=tmp_path, train_split="train2014", val_split="val2017", test_split="val2017")
    assert [item.file for item in data.downloads] == [
        "annotations_trainval2014.zip", "train2014.zip", "annotations_trainval2017.zip", "val2017.zip"
    ]  # fmt: skip
    assert data.downloads[1].url == "http://images.cocodataset.org/zips/train2014.zip"
    assert (
        COCODetectionDataModule(
            root=tmp_path, train_split="mine", val_split=None, val_shots=1, test_split="mine"
        ).downloads
        == []
    )


@pytest.mark.parametrize(
    ("kind", "name"), [("images", "im/g 1"), ("images", 5.0), ("categories", "7"), ("images", None)]
)
def test_ids_that_are_no_whole_numbers_are_refused(root, kind, name):
    def change(content):
        content[kind][0]["id"] = name

    edit(root / "annotations/instances_train2017.json", change)
    with pytest.raises(AnnotationError, match=r"instances_train2017.json has the .*; expected whole numbers") as caught:
        data(root).split("train")
    assert repr(name) in message(caught)
    assert "CustomDetectionDataModule" in message(caught)


def test_category_ids_that_no_metric_takes_are_refused(root):
    def change(content):
        content["categories"][0]["id"] = 2**53

    edit(root / "annotations/instances_train2017.json", change)
    with pytest.raises(AnnotationError, match=r"has the id 9007199254740992; expected a whole number below 2\*\*53"):
        data(root).split("train")
