import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from rft_lightning import SFTModule
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.datamodules.shapes import BASE_12, COLOURS, COMBINATIONS, NOVEL_4, SHAPES, CombinationTask
from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import GroundingTarget
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


def test_the_rows_are_those_of_every_version():
    """Measured numbers stand for these rows: a change of the default ones must not pass unseen."""
    digest = hashlib.sha256()
    for data in (
        ShapesDataModule(seed=3, train_size=40),
        ShapesDataModule(seed=3, shapes=["star", "circle"], shots=3),
        ShapesDataModule(seed=3, task=[GroundingTask(), ClassificationTask()], loose_boxes=1.7, train_size=40),
    ):
        for split in ("train", "val"):
            for sample in data.split(split)[:40]:
                target = sample.target
                said = [getattr(target, name, None) for name in ("label", "category", "category_id", "expression")]
                digest.update(repr((sample.id, said, getattr(target, "boxes", torch.empty(0)).tolist())).encode())
    assert digest.hexdigest() == "9330865343b488f1e34e6fb884512c55975f64c00649e31f952a5a880d5f9f24"


def test_base_and_novel_combinations_share_every_colour_and_every_kind():
    assert len(COMBINATIONS) == 16
    assert set(BASE_12) | set(NOVEL_4) == set(COMBINATIONS)
    assert not set(BASE_12) & set(NOVEL_4)
    for names in (BASE_12, NOVEL_4):
        assert {name.split()[0] for name in names} == set(COLOURS)
        assert {name.split()[1] for name in names} == set(SHAPES)


def drawn_names(data, split, count=150):
    """What the pictures of a split show, restated from its random numbers."""
    number = {"train": 0, "val": 1}[split]
    seed = data.seed if split == "train" else data.eval_seed
    rows = (data._question(data.tasks[0], np.random.default_rng([seed, number, index]))[0] for index in range(count))
    return [shape.name for shapes in rows for shape in shapes]


@pytest.mark.parametrize("task", [DetectionTask, GroundingTask, ClassificationTask])
@pytest.mark.parametrize("categories", ["kind", "colour_and_kind"])
def test_training_on_base_combinations_shows_and_asks_for_no_novel_one(task, categories):
    data = ShapesDataModule(
        task=task(), categories=categories, classes="base_combinations", train_size=150, negative_fraction=0.5
    )
    assert set(drawn_names(data, "train")) == set(BASE_12)
    for sample in data.split("train"):
        said = [getattr(sample.target, name, "") for name in ("category", "label", "expression")]
        assert not any(name in text for text in said for name in NOVEL_4)


def test_an_evaluation_of_all_classes_asks_for_every_combination_by_ids_that_never_change():
    every = ShapesDataModule(categories="colour_and_kind", val_size=200)
    ids = {sample.target.category: sample.target.category_id for sample in every.split("val")}
    assert ids == {name: number for number, name in enumerate(COMBINATIONS, 1)}
    some = ShapesDataModule(categories="colour_and_kind", classes=["yellow star", "red circle"], val_size=30)
    assert {s.target.category: s.target.category_id for s in some.split("val")} == {"red circle": 1, "yellow star": 16}
    fewer = ShapesDataModule(categories="colour_and_kind", shapes=["star", "square"], val_size=100)
    assert all(s.target.category_id == ids[s.target.category] for s in fewer.split("val"))


def test_colours_as_categories_change_questions_and_no_picture():
    plain, named = ShapesDataModule(), ShapesDataModule(categories="colour_and_kind")
    for index in range(10):
        assert drawn_names(plain, "val", 20) == drawn_names(named, "val", 20)
        target = named.sample("val", index).target
        sought = [shape for shape in named._question(named.tasks[0], np.random.default_rng([1_000_003, 1, index]))[0]]
        assert target.boxes.tolist() == [list(shape.box) for shape in sought if shape.name == target.category]


def test_absent_combinations_are_asked_for():
    data = ShapesDataModule(categories="colour_and_kind", negative_fraction=0.5, val_size=200)
    absent = [sample.target for sample in data.split("val") if len(sample.target.boxes) == 0]
    assert 60 < len(absent) < 140
    assert len({target.category for target in absent}) == 16


def test_few_shot_counts_combinations():
    data = ShapesDataModule(categories="colour_and_kind", classes="base_combinations", shots=2)
    counts = Counter(sample.target.category for sample in data.split("train"))
    assert counts == dict.fromkeys(BASE_12, 2)
    data = ShapesDataModule(task=ClassificationTask(), classes="novel_combinations", shots=2)
    assert Counter(sample.target.label for sample in data.split("train")) == dict.fromkeys(NOVEL_4, 2)
    data = ShapesDataModule(classes=["red circle", "blue circle"], shots=2)
    assert Counter(sample.target.category for sample in data.split("train")) == {"circle": 2}


def test_combinations_are_asked_for_in_the_words_of_grounding_and_answers_read_back():
    task, frame = CombinationTask(), CoordinateFrame("relative", 1000)
    data = ShapesDataModule(
        task=task, categories="colour_and_kind", max_shapes=3, shapes=["star"], classes=["red star", "blue star"]
    )
    counts = Counter()
    for index in range(60):
        target = data.sample("train", index).target
        grounded = GroundingTarget(target.boxes[:1], expression=f"the {target.category}", image_size=target.image_size)
        assert task.question(target, frame) == GroundingTask().question(grounded, frame)
        assert len(target.boxes) == 0 or task.thought(target) == GroundingTask().thought(grounded)
        if len(target.boxes) == 1:
            assert task.solution(target, frame) == GroundingTask().solution(grounded, frame)
        answer = task.read(task.solution(target, frame), frame, target.image_size)
        assert answer.parsed
        assert answer.boxes.shape == target.boxes.shape
        assert torch.allclose(answer.boxes, target.boxes, atol=0.12)
        counts[len(target.boxes)] += 1
    assert counts.keys() >= {0, 1, 2}


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
        ({"categories": "colour"}, "kind or colour_and_kind"),
        ({"classes": []}, "base_combinations, novel_combinations"),
        ({"classes": ["red cirle"]}, "did you mean 'red circle'"),
        ({"classes": ["red circle"], "shapes": ["star"]}, "Unknown class"),
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
