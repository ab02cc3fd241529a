"""CustomDetectionDataModule: one set of pictures in four formats, what is refused and how, and real sample data."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from rft_lightning.datamodules import CustomDetectionDataModule
from rft_lightning.datamodules.detection_formats import BOX_FORMATS, to_xyxy
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError, EmptyClassError
from tests.datamodule_checks import DataModuleChecks
from tests.fakes.coco import edit
from tests.fakes.detection import NAMES, SPLITS, WRITERS, size, things, write_coco, write_jsonl, write_voc, write_yolo

pytestmark = pytest.mark.filterwarnings("ignore:Fewer than:UserWarning")


def data(root: Path, **kwargs) -> CustomDetectionDataModule:
    return CustomDetectionDataModule(root=root, **kwargs)


def truth(split: str) -> set[tuple]:
    return {(f"{number:03}", *thing) for number in SPLITS[split] for thing in things(number)}


def found(samples) -> set[tuple]:
    return {(s.image.stem, s.target.category, *box) for s in samples for box in s.target.boxes.tolist()}


class TestCOCOFormat(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        write_coco(tmp_path / "data")
        return lambda **kwargs: data(tmp_path / "data", **kwargs)


class TestJSONLinesWithNegatives(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        write_jsonl(tmp_path / "data")
        return lambda **kwargs: data(tmp_path / "data", **{"negative_fraction": 0.5, **kwargs})

    def test_shots_are_nested(self):
        """Negatives follow the number of rows, so they are not a part of the nesting."""

    def test_excluded_pictures_are_in_no_training_row(self, make):
        assert "000.jpg" not in {row.image for row in make(exclude_image_ids=["000.jpg"]).chosen("train")}


class TestOneSetInYOLOFormat(DataModuleChecks):
    """Without splits: validation pictures are held out of training, and tested on."""

    @pytest.fixture
    def make(self, tmp_path):
        write_yolo(tmp_path / "data", [None])
        return lambda **kwargs: data(tmp_path / "data", **{"val_shots": 1, **kwargs})


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_recognised_and_gives_the_same_boxes(tmp_path, name):
    root = WRITERS[name](tmp_path)
    for split in SPLITS:
        assert found(data(root).split(split)) == truth(split)
    assert found(data(root, format=name).split("train")) == truth("train")
    assert sorted(data(root).class_names) == sorted(NAMES)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_may_have_one_set_only(tmp_path, name):
    loader = data(WRITERS[name](tmp_path, [None]), val_shots=1)
    train, val = loader.split("train"), loader.split("val")
    assert not {s.image for s in train} & {s.image for s in val}
    assert found(train) | found(val) == truth("train") - {row for row in truth("train") if row[0] == "008"}
    assert [s.id for s in loader.split("test")] == [s.id for s in val]
    # All classes are asked of what is held out, those it does not show too.
    assert Counter(s.image for s in val).most_common()[-1][1] == len(NAMES)


def test_without_validation_shots_one_set_is_tested_on_its_training_pictures(tmp_path):
    loader = data(write_coco(tmp_path, [None]))
    assert {s.image for s in loader.split("train")} <= {s.image for s in loader.split("test")}


def test_without_test_pictures_those_of_validation_are_tested(tmp_path):
    loader = data(write_voc(tmp_path, ["train", "val"]), val_limit=1)
    assert found(loader.split("test")) == truth("val")
    assert len(loader.split("val")) == 1


def test_other_names_and_places_of_splits(tmp_path):
    root = write_yolo(tmp_path / "roboflow", folders_first=True)
    (root / "val").rename(root / "valid")
    assert found(data(root).split("val")) == truth("val")
    root = write_coco(tmp_path / "flat")
    for split in SPLITS:
        (root / f"annotations/instances_{split}.json").rename(root / f"{split}.json")
    assert found(data(root).split("test")) == truth("test")
    root = write_voc(tmp_path / "beside")
    for split, numbers in SPLITS.items():
        (root / split).mkdir()
        for number in numbers:
            shutil.move(root / f"JPEGImages/{number:03}.jpg", root / split)
            shutil.move(root / f"Annotations/{number:03}.xml", root / split)
    shutil.rmtree(root / "ImageSets")
    shutil.rmtree(root / "Annotations")
    assert found(data(root).split("val")) == truth("val")


def test_names_of_yolo_classes_in_a_text_file(tmp_path):
    root = write_yolo(tmp_path)
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    assert data(root).class_names == NAMES
    assert data(root).split("train")[0].target.category_id == 0


WRITTEN = {
    "xyxy": lambda b, of: [*b],
    "xywh": lambda b, of: [b[0], b[1], b[2] - b[0], b[3] - b[1]],
    "cxcywh": lambda b, of: [(b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]],
    "yxyx": lambda b, of: [b[1], b[0], b[3], b[2]],
}


@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_box_formats(tmp_path, box_format):
    layout, _, unit = box_format.partition("_")
    extent = {"": None, "norm": 1, "norm1000": 1000}[unit]

    def write(box, of):
        scale = (of[0] / extent, of[1] / extent) * 2 if extent else (1,) * 4
        return WRITTEN[layout]([value / by for value, by in zip(box, scale, strict=True)], of)

    assert found(data(write_jsonl(tmp_path, write_box=write), box_format=box_format).split("train")) == truth("train")


def test_published_conventions():
    assert to_xyxy([0.5, 0.5, 1, 1], "cxcywh_norm", (64, 32)) == (0, 0, 64, 32)  # YOLO
    assert to_xyxy([0.25, 0.5, 1, 1], "yxyx_norm", (64, 32)) == (32, 8, 64, 32)  # TensorFlow Datasets
    assert to_xyxy([500, 250, 1000, 1000], "xyxy_norm1000", (64, 32)) == (32, 8, 64, 32)  # Qwen2-VL


def test_the_corners_of_voc_are_inclusive_and_start_at_one(tmp_path):
    root = write_voc(tmp_path, [None])
    for file in (root / "Annotations").glob("*.xml"):
        file.unlink()
    width, height = size(0)
    box = f"<xmin>1</xmin><ymin>1</ymin><xmax>{width}</xmax><ymax>{height}</ymax>"
    (root / "Annotations/000.xml").write_text(
        f"<annotation><filename>000.jpg</filename><object><name>slime</name><bndbox>{box}</bndbox></object></annotation>"
    )
    assert data(root).split("train")[0].target.boxes.tolist() == [[0, 0, width, height]]


def test_difficult_objects_are_neither_right_nor_wrong(tmp_path):
    root = write_voc(tmp_path)
    file = root / "Annotations/009.xml"
    file.write_text(file.read_text().replace("<difficult>0", "<difficult>1"))
    target = next(s.target for s in data(root).split("val") if s.image.stem == "009" and s.target.category == "slime")
    assert len(target.boxes) == 0
    assert len(target.ignore_boxes) == 2


@pytest.mark.parametrize("ids", [["a", "b", "c"], ["12", 5, "x"]])
def test_category_ids_may_be_strings(tmp_path, ids):
    loader = data(write_coco(tmp_path, ids=ids))
    assert found(loader.split("train")) == truth("train")
    assert {s.target.category_id for s in loader.split("train")} == {1, 2, 3}


def test_image_ids_may_be_strings_and_sizes_unstated(tmp_path):
    root = write_coco(tmp_path, [None])

    def change(content):
        for entry in content["images"]:
            entry["id"] = f"img/{entry['id']}"
            del entry["width"], entry["height"]
        for note in content["annotations"]:
            note["image_id"] = f"img/{note['image_id']}"

    edit(root / "annotations.json", change)
    samples = data(root).split("train")
    assert found(samples) == truth("train")
    assert {sample.image_id for sample in samples} == {f"img/{n * 11 + 5}" for n in range(8)}


def with_image_ids(folder, name):
    """One set, the id of each picture changed by `name`."""
    root = write_coco(folder, [None])

    def change(content):
        for entry in content["images"]:
            entry["id"] = name(entry["id"])
        for note in content["annotations"]:
            note["image_id"] = name(note["image_id"])

    edit(root / "annotations.json", change)
    return root


def test_image_ids_may_be_whole_numbers_written_as_floats(tmp_path):
    samples = data(with_image_ids(tmp_path, float)).split("train")
    assert found(samples) == truth("train")
    assert {sample.image_id for sample in samples} == {n * 11 + 5 for n in range(8)}
    assert all(type(sample.image_id) is int for sample in samples)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (lambda n: n + 0.5, r"has the image id 5\.5; expected a whole number or a string"),
        (lambda n: None if n == 5 else n, r"has the image id None; expected"),
        (lambda n: {5: 1, 16: "1"}.get(n, n), r"has the image id '1' twice"),
        (lambda n: float("inf") if n == 5 else n, r"has the image id inf; expected"),
    ],
)
def test_other_image_ids_are_refused(tmp_path, name, message):
    with pytest.raises(AnnotationError, match=message):
        data(with_image_ids(tmp_path, name)).split("train")


def test_category_ids_that_no_metric_takes_are_refused(tmp_path):
    with pytest.raises(AnnotationError, match=r"has the id 9007199254740992; expected a whole number below 2\*\*53"):
        data(write_coco(tmp_path, ids=[1, 2**53, 2**53 + 1])).split("train")


def test_classes_choose_and_order_by_id(tmp_path):
    loader = data(write_coco(tmp_path), classes=["slime", "big bird"])
    assert loader.class_names == ["big bird", "slime"]  # ids 3 and 7
    assert {s.target.category for s in loader.split("val")} == {"big bird", "slime"}


# --- what is wrong with files ----------------------------------------------------------------------------------------


def test_nothing_there_lists_the_trees_and_what_was_found(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DatasetNotFoundError, match=r"holds notes\.txt.*\n  coco: .*\n  voc: .*\n  yolo: .*\n  jsonl: "):
        data(tmp_path).split("train")
    with pytest.raises(DatasetNotFoundError, match="does not exist"):
        data(tmp_path / "nowhere").split("train")


def test_several_formats_in_one_folder_need_a_choice(tmp_path):
    write_coco(tmp_path)
    write_jsonl(tmp_path)
    with pytest.raises(ConfigConflictError, match=r"several formats: coco, jsonl\. Set data\.format"):
        data(tmp_path).split("train")
    assert data(tmp_path, format="jsonl").split("train")[0].image_id == "000.jpg"


def test_options_out_of_range(tmp_path):
    for settings in ({"format": "kitti"}, {"box_format": "polar"}, {"on_bad_box": "keep"}):
        with pytest.raises(ConfigConflictError, match=next(iter(settings))):
            data(tmp_path, **settings)


JSON_DAMAGES = {
    "is no JSON": None,
    r"image id 5.* twice": lambda d: d["images"].append(d["images"][0]),
    r"annotation id 1.* twice": lambda d: d["annotations"].append(d["annotations"][0]),
    r"category id 7.* twice": lambda d: d["categories"].append(d["categories"][0]),
    r"category name 'slime'.* twice": lambda d: d["categories"].append({"id": 9, "name": "slime"}),
    r"annotations\[2\] \(id 3\) belongs to category 77": lambda d: d["annotations"][2].update(category_id=77),
    r"annotations\[2\] \(id 3\) belongs to image 4": lambda d: d["annotations"][2].update(image_id=4),
    r"annotations\[2\] \(id 3\) has bbox \[1, 2\]": lambda d: d["annotations"][2].update(bbox=[1, 2]),
    r"annotations\[0\].* leaves the picture": lambda d: d["annotations"][0].update(bbox=[0, 0, 400, 20]),
    r"annotations\[0\] .* leaves the picture": lambda d: d["annotations"][0].update(bbox=[90, 90, 4, 4]),
    r"annotations\[0\].* swapped corners": lambda d: d["annotations"][0].update(bbox=[9, 9, -4, 4]),
    r"annotations\[0\].* is not finite": lambda d: d["annotations"][0].update(bbox=[9, 9, float("inf"), 4]),
    "'categories' is missing": lambda d: d.pop("categories"),
    "states 30x64 pixels": lambda d: d["images"][0].update(width=30),
}


@pytest.mark.parametrize("expected", JSON_DAMAGES)
def test_what_is_wrong_in_coco_json_is_said_with_its_place(tmp_path, expected):
    file = write_coco(tmp_path, [None]) / "annotations.json"
    if JSON_DAMAGES[expected] is None:
        file.write_text(file.read_text()[:-20])
    else:
        edit(file, JSON_DAMAGES[expected])
    with pytest.raises(AnnotationError, match=rf"annotations\.json.*{expected}"):
        data(tmp_path).split("train")


LINE_DAMAGES = {
    "is no JSON": lambda line: line[:-5],
    "is about the picture '000.jpg' once more": lambda line: line.replace("001.jpg", "000.jpg"),
    "2 boxes and 1 labels": lambda line: line.replace('"labels": ["feline-or-canid", ', '"labels": ['),
    "3 numbers in a box": lambda line: line.replace("[3, 4, 20, 28]", "[3, 4, 20]"),
    "'boxes' is missing": lambda line: line.replace("boxes", "boxen"),
    "box 1: .* leaves the picture": lambda line: line.replace("[3, 4, 20, 28]", "[3, 4, 20, 2800]"),
}


@pytest.mark.parametrize("expected", LINE_DAMAGES)
def test_what_is_wrong_in_json_lines_is_said_with_its_line(tmp_path, expected):
    file = write_jsonl(tmp_path, [None]) / "mine.jsonl"
    lines = file.read_text().splitlines()
    changed = LINE_DAMAGES[expected](lines[1])
    assert changed != lines[1]
    file.write_text("\n".join([lines[0], changed, *lines[2:]]))
    with pytest.raises(AnnotationError, match=rf"mine\.jsonl:2.*{expected}"):
        data(tmp_path).split("train")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("7 0.5 0.5 0.1 0.1", "of class 7, but there are names for 3"),
        ("0 0.5 0.5 0.1", "expected five numbers"),
        ("slime 0.5 0.5 0.1 0.1", "expected five numbers"),
        ("0 5 5 1 1", "leaves the picture"),
    ],
)
def test_what_is_wrong_in_yolo_files_is_said_with_its_line(tmp_path, line, expected):
    file = write_yolo(tmp_path, [None]) / "labels/001.txt"
    file.write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(AnnotationError, match=rf"001\.txt:2.*{expected}"):
        data(tmp_path).split("train")


def test_two_yolo_pictures_of_one_name_are_an_error(tmp_path):
    folder = write_yolo(tmp_path, [None]) / "images"
    Image.new("RGB", (8, 8)).save(folder / "001.png")
    with pytest.raises(AnnotationError) as caught:
        data(tmp_path).split("train")
    expected = (
        f"{folder} has the picture (name without its suffix) '001' twice; expected it once. Rename or remove one."
    )
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("</annotation>", "", "no usable VOC file"),
        ("<xmin>4</xmin>", "", "<bndbox/xmin> is missing"),
        ("<xmax>20<", "<xmax>2000<", "object 1.* leaves the picture"),
        ("<width>64<", "<width>65<", "states 65x32"),
    ],
)
def test_what_is_wrong_in_voc_files_is_said_with_its_object(tmp_path, old, new, expected):
    file = write_voc(tmp_path, [None]) / "Annotations/001.xml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(AnnotationError, match=rf"001\.xml.*{expected}"):
        data(tmp_path).split("train")


def test_boxes_that_pass_the_border_a_little_are_cut_and_flat_ones_counted(tmp_path):
    file = write_coco(tmp_path, [None]) / "annotations.json"

    def change(content):
        content["annotations"][0]["bbox"] = [-1.5, 4, 20, 24]
        content["annotations"][1]["bbox"] = [20, 6, 0, 14]

    edit(file, change)
    with pytest.warns(UserWarning, match=r"Left out 1 boxes without width or height of .*annotations\[1\]"):
        first = data(tmp_path).split("train")[0]
    assert first.target.boxes.tolist() == [[0, 4, 18.5, 28]]


def test_bad_boxes_may_be_dropped(tmp_path):
    file = write_coco(tmp_path, [None]) / "annotations.json"
    edit(file, lambda d: d["annotations"][1].update(bbox=[500, 6, 10, 14]))
    with pytest.warns(UserWarning, match="Left out 1 boxes that do not fit their picture"):
        first = data(tmp_path, on_bad_box="drop").split("train")[0]
    assert len(first.target.boxes) == 1


def test_a_box_that_was_left_out_is_no_absent_object(tmp_path):
    file = write_coco(tmp_path, [None]) / "annotations.json"
    edit(file, lambda d: d["annotations"][2].update(bbox=[5, 5, 0, 4]))  # the only one of picture 1 and its class
    with pytest.warns(UserWarning, match="without width or height"):
        asked = {(s.image.stem, s.target.category) for s in data(tmp_path).split("test")}
    assert ("001", "feline-or-canid") not in asked
    assert ("001", "slime") in asked


def test_crowds_are_no_answers(tmp_path):
    file = write_coco(tmp_path, [None]) / "annotations.json"
    edit(file, lambda d: d["annotations"][2].update(iscrowd=1, segmentation={"counts": "x", "size": [32, 64]}))
    loader = data(tmp_path)
    assert ("001", "feline-or-canid") not in {(s.image.stem, s.target.category) for s in loader.split("train")}
    sample = next(s for s in loader.split("test") if (s.image.stem, s.target.category) == ("001", "feline-or-canid"))
    assert (len(sample.target.boxes), len(sample.target.ignore_boxes)) == (0, 1)


def test_classes_that_are_not_there_or_have_no_picture(tmp_path):
    write_coco(tmp_path)
    with pytest.raises(ConfigConflictError, match=r"'slim' \(did you mean 'slime'\?\).*3 classes: 'big bird', 'slime'"):
        data(tmp_path, classes=["slim"]).split("train")
    for split in SPLITS:
        file = tmp_path / f"annotations/instances_{split}.json"
        edit(file, lambda d: d["categories"].append({"id": 50, "name": "wyvern"}))
    with pytest.raises(EmptyClassError, match=r"'wyvern' in .*instances_train\.json"):
        data(tmp_path, classes=["slime", "wyvern"]).split("train")
    with pytest.warns(UserWarning, match="Left out of training.*wyvern"):
        data(tmp_path).split("train")


def test_splits_with_other_categories_are_refused(tmp_path):
    write_coco(tmp_path)
    edit(tmp_path / "annotations/instances_val.json", lambda d: d["categories"].append({"id": 50, "name": "wyvern"}))
    with pytest.raises(AnnotationError, match=r"instances_val\.json and .*instances_train\.json list other categories"):
        data(tmp_path).split("train")


def test_pictures_that_are_missing_or_shared_are_named(tmp_path):
    root = write_yolo(tmp_path / "lost")
    (root / "images/train/003.jpg").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"1 label files have no picture.*003\.txt"):
        data(root).split("train")
    root = write_coco(tmp_path / "gone")
    (root / "images/003.jpg").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"image 38 needs the picture '003\.jpg'.*image_root"):
        data(root).split("train")
    with pytest.warns(UserWarning, match=r"1 pictures of .* left out .*003\.jpg"):
        assert found(data(root, on_bad_image="skip").split("train")) == {r for r in truth("train") if r[0] != "003"}
    root = write_coco(tmp_path / "shared", ["train"])
    shutil.copy(root / "annotations/instances_train.json", root / "annotations/instances_val.json")
    with pytest.warns(UserWarning, match="9 pictures of .* are training pictures too"):
        data(root).split("train")


# --- real sample data ------------------------------------------------------------------------------------------------


@pytest.mark.sample_data
def test_a_real_coco_file_with_133_categories_and_crowds(sample_data):
    loader = data(sample_data / "custom_coco_crowd")
    content = json.loads((sample_data / "custom_coco_crowd/annotations.json").read_text())
    with pytest.warns(UserWarning, match="Left out of training"):
        samples = loader.split("train")
    plain = [note for note in content["annotations"] if not note["iscrowd"]]
    assert sum(len(s.target.boxes) for s in samples) == len(plain) == 47
    assert {(s.image_id, s.target.category_id) for s in samples} == {(n["image_id"], n["category_id"]) for n in plain}
    assert len(loader.class_names) == 133
    crowds = {(s.image_id, s.target.category_id) for s in loader.split("test") if len(s.target.ignore_boxes)}
    assert crowds == {(142238, 1), (439180, 1), (439180, 19)}


@pytest.mark.sample_data
def test_real_json_lines_are_the_boxes_of_coco(sample_data, tmp_path):
    shutil.copy(sample_data / "custom_formats/boxes_pixel_xyxy.jsonl", tmp_path)
    loader = data(tmp_path, image_root=sample_data / "coco2017_mini/coco")
    samples = loader.split("train")
    assert sum(len(s.target.boxes) for s in samples) == 35
    coco = json.loads((sample_data / "coco2017_mini/coco/annotations/instances_val2017.json").read_text())
    boxes = {(note["image_id"], *[round(v, 1) for v in note["bbox"][:2]]) for note in coco["annotations"]}
    assert all(
        (int(s.image.stem), *[round(v, 1) for v in box[:2]]) in boxes
        for s in samples
        for box in s.target.boxes.tolist()
    )


@pytest.mark.sample_data
def test_real_voc_files(sample_data, tmp_path):
    source = sample_data / "oxford_pets_mini"
    xmls = sorted(source.rglob("xmls/*.xml"))
    (tmp_path / "Annotations").mkdir()
    pictures = {path.name: path for path in source.rglob("*.jpg")}
    for file in xmls:
        if f"{file.stem}.jpg" in pictures:
            shutil.copy(file, tmp_path / "Annotations")
    loader = data(tmp_path, image_root=pictures[f"{xmls[0].stem}.jpg"].parent)
    samples = loader.split("train")
    assert len(samples) == len(list((tmp_path / "Annotations").glob("*.xml"))) > 0
    assert set(loader.class_names) <= {"cat", "dog"}
