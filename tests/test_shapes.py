import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from rft_lightning import SFTModule
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.datamodules.shapes import COLOURS
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask


def pixels(sample):
    return np.asarray(sample.load_image()).astype(int)


def test_rows_depend_on_seed_split_and_index_only():
    a, b = ShapesDataModule(seed=4), ShapesDataModule(seed=4, train_size=5, shots=None)
    assert np.array_equal(pixels(a.sample("train", 3)), pixels(b.sample("train", 3)))
    assert a.sample("train", 3).id == b.sample("train", 3).id == "shapes/4/train/3"
    assert not np.array_equal(pixels(a.sample("train", 3)), pixels(ShapesDataModule(seed=5).sample("train", 3)))
    assert not np.array_equal(pixels(a.sample("train", 3)), pixels(a.sample("val", 3)))


def test_validation_does_not_move_with_the_training_seed():
    a, b = ShapesDataModule(seed=1), ShapesDataModule(seed=2, loose_boxes=2.0)
    assert np.array_equal(pixels(a.sample("val", 0)), pixels(b.sample("val", 0)))
    assert a.sample("val", 0).target.boxes.equal(b.sample("val", 0).target.boxes)


def test_boxes_are_the_extent_of_the_drawn_pixels():
    """The oracle is the picture: pixels that are clearly of the shape's colour, and no background."""
    data = ShapesDataModule(task=GroundingTask(), max_shapes=1)
    for index in range(40):
        sample = data.sample("train", index)
        colour = np.array(COLOURS[sample.target.expression.split()[1]])
        ys, xs = np.nonzero(np.abs(pixels(sample) - colour).sum(2) < 60)
        seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(seen - sample.target.boxes[0].numpy()).max() <= 6, (sample.target, seen)  # thin tips fade


def test_detection_targets_are_all_shapes_of_the_kind_or_none():
    data = ShapesDataModule(negative_fraction=0.5)
    counts = Counter(len(data.sample("train", index).target.boxes) for index in range(200))
    assert counts[0] > 40
    assert counts[1] > 40
    assert counts[2] > 0


def test_few_shot_has_exactly_k_positive_rows_per_kind_and_nests():
    four = ShapesDataModule(shots=4).split("train")
    two = ShapesDataModule(shots=2).split("train")
    assert set(Counter(sample.target.category for sample in four).values()) == {4}
    assert all(len(sample.target.boxes) for sample in four)
    assert {sample.id for sample in two} < {sample.id for sample in four}


def test_few_shot_classification_has_k_rows_per_class():
    samples = ShapesDataModule(task=ClassificationTask(), shots=2).split("train")
    counts = Counter(sample.target.label for sample in samples)
    assert len(counts) == 16
    assert set(counts.values()) == {2}


def test_few_shot_counts_the_kinds_that_are_drawn():
    samples = ShapesDataModule(task=ClassificationTask(), shots=1, shapes=["circle"]).split("train")
    labels = sorted(sample.target.label for sample in samples)
    assert labels == ["blue circle", "green circle", "red circle", "yellow circle"]


def test_loose_boxes_enlarge_training_boxes_only():
    exact, loose = ShapesDataModule(negative_fraction=0), ShapesDataModule(negative_fraction=0, loose_boxes=1.7)
    ratios = []
    for index in range(50):
        a, b = exact.sample("train", index).target.boxes, loose.sample("train", index).target.boxes
        ratios += ((b[:, 2] - b[:, 0]) / (a[:, 2] - a[:, 0])).tolist()
    assert min(ratios) >= 1 - 1e-9
    assert 1.15 < np.mean(ratios) < 1.4
    assert max(ratios) <= 1.7 + 1e-9


def test_several_tasks_take_turns():
    data = ShapesDataModule(task=[DetectionTask(), GroundingTask(), ClassificationTask()])
    names = [data.sample("train", index).task.name for index in range(4)]
    assert names == ["detection", "grounding", "classification", "detection"]


def test_the_grounded_shape_is_unique_in_its_picture():
    data = ShapesDataModule(task=GroundingTask(), max_shapes=3)
    for index in range(60):
        rng = np.random.default_rng([0, 0, index])
        drawn, target = data._question(data.tasks[0], rng)
        assert [f"the {shape.name}" for shape in drawn].count(target.expression) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": ["hexagon"]}, "hexagon"),
        ({"shapes": []}, "shapes among"),
        ({"shapes": ["circle", "circle"]}, "each once"),
        ({"negative_fraction": 1.0}, "negative_fraction < 1"),
        ({"shots": 0}, "shots >= 1"),
        ({"min_side": 0.6, "max_side": 0.5}, "min_side <= max_side"),
        ({"loose_boxes": 0.5}, "loose_boxes >= 1"),
        ({"batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        ShapesDataModule(**arguments)


def test_processes_that_load_data_get_no_trainer(tiny_policy, make_trainer):
    """Which they would wherever Python does not fork, with the model and all that is sharded of it."""
    data = ShapesDataModule(processor=tiny_policy, train_size=4, batch_size=2)
    trainer = make_trainer(1)
    trainer.fit(SFTModule(tiny_policy, schedule="constant"), datamodule=data)
    assert data.trainer is trainer
    loader = data.train_dataloader()
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    batch = collate([dataset[0, 0], dataset[1, 0]])
    expected = loader.collate_fn([loader.dataset[0, 0], loader.dataset[1, 0]])
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert dataset.samples.data.trainer is None
