"""LISAGroundingDataModule on a rendered tree in the true format, masks against OpenCV, real annotation files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft_lightning.datamodules import LISAGroundingDataModule
from rft_lightning.datamodules.lisa import BOX_RULES, read_scene
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.masks import Region, paint
from rft_lightning.sample import GroundingTarget
from rft_lightning.tasks import GroundingTask
from tests.datamodule_checks import DataModuleChecks
from tests.fakes.reasonseg import SCENES, SIZES, write_reasonseg
from tests.test_config_files import CONFIGS, parsed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_reasonseg(tmp_path)


def data(root: Path, **kwargs) -> LISAGroundingDataModule:
    return LISAGroundingDataModule(root=root, **kwargs)


def find(samples, name: str):
    return next(sample for sample in samples if sample.image_id.endswith(name))


class TestLISA(DataModuleChecks):
    @pytest.fixture
    def make(self, root):
        return lambda **kwargs: data(root, **kwargs)


def test_a_sample_is_complete(root):
    sample = find(data(root).split("val"), "monkey")
    assert sample.id == "lisa/val/val_monkey/0"
    assert sample.image == root / "val/val_monkey.jpg"
    assert sample.image_size == sample.target.image_size == SIZES["monkey"]
    assert sample.target.expression == "what the monkey pierces its food with"
    assert "what the monkey pierces its food with" in sample.task.question(sample.target, CoordinateFrame())
    assert isinstance(sample.task, GroundingTask)


def test_training_asks_with_every_wording_and_evaluation_with_the_first(root):
    assert len(data(root).split("train")) == sum(len(texts) for texts, _, _ in SCENES.values()) == 10
    assert [s.id for s in data(root).split("train") if "soup" in s.id] == [
        f"lisa/train/train_soup/{n}" for n in range(6)
    ]
    for samples in (data(root, texts="first").split("train"), data(root).split("val"), data(root).split("test")):
        assert sorted(s.target.expression for s in samples) == sorted(texts[0] for texts, _, _ in SCENES.values())


def test_shots_count_pictures(root):
    rows = data(root, shots=2).chosen("train")
    assert len({row.image for row in rows}) == 2
    assert len(rows) == sum(len(SCENES[str(image).split("_")[1]][0]) for image in {row.image for row in rows})


BOXES = {
    "monkey": {
        "union_target": [[10, 10, 60.75, 30]],
        "largest_target": [[10, 10, 30, 30]],
        "per_target": [[10, 10, 30, 30], [40.5, 20.25, 60.75, 24.5]],
        "first_shape": [[40.5, 20.25, 60.75, 24.5]],
    },
    "zoo": {
        "union_target": [[20, 40, 26, 46]],
        "largest_target": [[20, 40, 26, 46]],
        "per_target": [[20, 40, 26, 46]],
        "first_shape": [[1, 1, 50, 35]],  # of a flag, as the published code takes it
    },
}


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("rule", BOX_RULES)
def test_boxes_by_rule(root, name, rule):
    sample = find(data(root, box_from=rule).split("test"), name)
    assert sample.target.boxes.tolist() == BOXES[name][rule]


def test_the_default_skips_what_is_no_target(root):
    assert find(data(root).split("test"), "zoo").target.boxes.tolist() == BOXES["zoo"]["union_target"]


def test_masks_leave_flags_out_and_ignore_what_is_ambiguous(root):
    mask = find(data(root).split("test"), "zoo").target.mask()
    assert mask.shape == (50, 70)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1, 255}
    assert mask[0, 0] == mask[1, 1] == 0
    assert mask[22, 50] == 255
    assert mask[43, 23] == 1


def test_a_small_ignored_region_erases_a_part_of_a_large_target(root):
    mask = find(data(root).split("test"), "monkey").target.mask()
    assert mask[17, 17] == 255
    assert mask[12, 12] == 1


def test_a_target_without_polygons_has_no_mask():
    assert GroundingTarget([0, 0, 1, 1]).mask() is None
    with pytest.raises(ValueError, match="image_size"):
        GroundingTarget([0, 0, 1, 1], regions=(Region(((0, 0), (1, 1), (0, 1))),)).mask()


def test_masks_cost_nothing_until_they_are_asked_for(root):
    sample = find(data(root).split("test"), "monkey")
    assert len(pickle.dumps(sample.target)) < 2000
    # Our own bytes, as a spawned worker gets them.
    copy = pickle.loads(pickle.dumps(sample.target))
    assert np.array_equal(copy.mask(), sample.target.mask())


def test_files_in_cp1252_are_read(root):
    assert find(data(root).split("val"), "cafe").target.expression == SCENES["cafe"][0][0]


def test_pictures_without_a_target_are_left_out_with_a_warning(root):
    file = root / "val/val_monkey.json"
    content = json.loads(file.read_text())
    content["shapes"] = content["shapes"][2:]
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="Left out 1 pictures .*: val_monkey"):
        assert len(data(root).split("val")) == 3


def test_every_upper_folder_is_a_root(root):
    for place in (root, root.parent):
        assert len(data(place).split("val")) == 4


def test_what_is_missing_is_said(root):
    with pytest.raises(DatasetNotFoundError, match=r"does not exist.*github.com/dvlab-research/LISA"):
        data(root / "nowhere").split("train")
    with pytest.raises(DatasetNotFoundError, match=r"holds explanatory, test, train, val"):
        data(root).rows("trainval")
    (root / "val/val_zoo.jpg").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"1 of the 4 pictures of .*val_zoo\.jpg"):
        data(root).split("val")


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace('"text"', '"txet"')])
def test_damaged_files_are_named(root, damage):
    file = root / "val/val_zoo.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(AnnotationError, match=r"val_zoo\.json is no usable ReasonSeg file"):
        data(root).split("val")


@pytest.mark.parametrize("text", ["hello", "", None, [], [""], ["what?", "  "], [["what?"]]])
def test_instructions_are_a_list_of_texts(root, text):
    file = root / "val/val_zoo.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "text": text}))
    with pytest.raises(AnnotationError, match=r"val_zoo\.json is no usable ReasonSeg file \(text is .*correct it"):
        data(root).split("val")


def test_a_resized_picture_is_noticed_where_its_box_lies_outside(root):
    Image.new("RGB", (16, 16)).save(root / "val/val_zoo.jpg")
    with pytest.raises(AnnotationError, match="lies outside its picture of 16x16"):
        data(root).split("val")


def test_options_out_of_range(root):
    for settings in ({"texts": "some"}, {"box_from": "shape"}, {"classes": ["cat"]}):
        with pytest.raises(ConfigConflictError, match=next(iter(settings))):
            data(root, **settings)


def test_the_configuration_has_the_settings_of_the_paper():
    config = parsed("--config", str(CONFIGS / "lisa.yaml"))
    model = config["model"]["init_args"]
    assert config["trainer"]["max_steps"] == 500
    settings = model["gradient_checkpointing"], model["group_size"], model["objective"]["init_args"]["beta"]
    assert settings == (True, 8, 0.04)
    (checkpoint,) = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("RolloutCheckpoint")]
    assert checkpoint["init_args"]["monitor"] == "val/box_iou_mean"
    assert checkpoint["init_args"]["every_n_steps"] == 50


# --- masks against OpenCV, drawn as LISA's own code draws them --------------------------------------------------------


def lisa_mask(shapes: list[tuple[str, list]], size: tuple[int, int]) -> np.ndarray:
    """`get_mask_from_json` of LISA (utils/data_processing.py)."""
    cv2 = pytest.importorskip("cv2")
    shape = size[1], size[0]
    kept, areas = [(label, points) for label, points in shapes if label.lower() != "flag"], []
    for _, points in kept:
        canvas = np.zeros(shape, dtype=np.uint8)
        cv2.polylines(canvas, np.array([points], dtype=np.int32), True, 1, 1)
        cv2.fillPoly(canvas, np.array([points], dtype=np.int32), 1)
        areas.append(canvas.sum())
    mask = np.zeros(shape, dtype=np.uint8)
    for number in np.argsort(areas)[::-1].astype(np.int32):
        label, points = kept[number]
        value = 255 if "ignore" in label.lower() else 1
        cv2.polylines(mask, np.array([points], dtype=np.int32), True, value, 1)
        cv2.fillPoly(mask, np.array([points], dtype=np.int32), value)
    return mask


@pytest.mark.parametrize("name", SCENES)
def test_masks_are_those_of_lisa(root, name):
    mask = find(data(root).split("test"), name).target.mask()
    assert np.array_equal(mask, lisa_mask(SCENES[name][2], SIZES[name]))


def test_random_polygons_are_painted_as_by_opencv():
    random = np.random.default_rng(0)
    for _ in range(200):
        size = tuple(random.integers(5, 90, 2).tolist())
        polygons = [random.integers(0, size, (random.integers(1, 14), 2)).tolist() for _ in range(3)]
        values = random.choice([1, 255], 3).tolist()
        shapes = [
            ("target" if value == 1 else "ignore", points) for value, points in zip(values, polygons, strict=True)
        ]
        regions = [Region(tuple(map(tuple, p)), v) for v, p in zip(values, polygons, strict=True)]
        assert np.array_equal(paint(regions, size), lisa_mask(shapes, size)), (size, shapes)


def test_polygons_that_leave_the_picture_are_cut_from_a_larger_painting():
    """OpenCV cuts each edge before it draws it, which moves some of its pixels; on a larger canvas it does not."""
    random = np.random.default_rng(0)
    for _ in range(100):
        points = random.integers(-8, 48, (4, 2))
        ours = paint([Region(tuple(map(tuple, points.tolist())))], (40, 40))
        larger = lisa_mask([("target", (points + 20).tolist())], (80, 80))
        assert np.array_equal(ours, larger[20:60, 20:60])


# --- real annotation files -------------------------------------------------------------------------------------------


REAL = {
    "train/10619389843_339d3c9434_o": (6, ["target"]),
    "val/109955815_034917e9d0_o": (1, ["target", "ignore", "flag"]),
    "val/206674234_4cb520b13d_o": (1, ["target"] * 4 + ["ignore"] * 3),
    "val/500793112_d334bb6b14_o": (6, ["target"]),
}


@pytest.mark.sample_data
def test_real_files(sample_data):
    folder = sample_data / "reasonseg_mini/ReasonSeg"
    for name, (texts, kinds) in REAL.items():
        scene = read_scene(folder / f"{name}.json")
        assert (len(scene.texts), [shape.kind for shape in scene.shapes]) == (texts, kinds)
    assert [s.id for s in data(folder.parent).split("train")] == [
        f"lisa/train/10619389843_339d3c9434_o/{n}" for n in range(6)
    ]
    assert len(data(folder).split("val")) == 3


@pytest.mark.sample_data
@pytest.mark.parametrize("name", REAL)
def test_real_boxes_and_masks(sample_data, name):
    folder = sample_data / "reasonseg_mini/ReasonSeg"
    split, stem = name.split("/")
    content = json.loads((folder / f"{name}.json").read_text())
    targets = [np.array(s["points"]) for s in content["shapes"] if s["label"] == "target"]
    boxes = [[*points.min(0), *points.max(0)] for points in targets]
    union = [min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)]
    with Image.open(folder / f"{name}.jpg") as picture:
        size = picture.size
    samples = {
        rule: next(s for s in data(folder, box_from=rule).split(split) if s.image_id == stem) for rule in BOX_RULES
    }
    assert samples["union_target"].target.boxes.tolist() == [union]
    assert samples["first_shape"].target.boxes.tolist() == [boxes[0]]
    assert sorted(samples["per_target"].target.boxes.tolist()) == sorted(boxes)
    assert samples["largest_target"].target.boxes.tolist() == samples["per_target"].target.boxes.tolist()[:1]
    mask = samples["union_target"].target.mask()
    assert mask.shape == size[::-1]
    assert np.array_equal(mask, lisa_mask([(s["label"], s["points"]) for s in content["shapes"]], size))


@pytest.mark.sample_data
def test_the_first_of_four_real_targets_covers_a_third_of_the_mask(sample_data):
    scene = read_scene(sample_data / "reasonseg_mini/ReasonSeg/val/206674234_4cb520b13d_o.json")
    areas = [shape.area for shape in scene.shapes if shape.kind == "target"]
    assert 0.25 < areas[0] / sum(areas) < 0.45
    assert scene.boxes("first_shape") != scene.boxes("union_target")
