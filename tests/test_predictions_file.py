"""PredictionsFile: answers of other systems, matched with samples and scored by the metrics of all tasks."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from rft_lightning.baselines import PredictionsFile
from rft_lightning.baselines.predictions_file import read_answers
from rft_lightning.callbacks import DetectionMAP, GroundingIoU, GroundingMaskIoU, LabelAccuracy, PresenceAccuracy
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import AnnotationError, ConfigConflictError
from rft_lightning.masks import Region
from rft_lightning.run_lengths import encode_mask
from rft_lightning.sample import ClassTarget, DetectionTarget, GroundingTarget, PresenceTarget, Sample
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask, PresenceTask

DOCS = Path(__file__).parent.parent / "docs" / "baselines.md"


def written(tmp_path, *rows) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def right_answer(sample: Sample, *, by_id: bool) -> dict:
    target = sample.target
    named = {"image_id": sample.image_id, "asked": getattr(target, "category", getattr(target, "expression", None))}
    row = {"id": sample.id} if by_id else {key: value for key, value in named.items() if value is not None}
    if isinstance(target, ClassTarget):
        return {**row, "label": target.label}
    return {**row, "boxes": target.boxes.tolist()}


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize(
    ("task", "callback", "metric"),
    [
        (ClassificationTask, LabelAccuracy, "accuracy"),
        (DetectionTask, DetectionMAP, "map"),
        (GroundingTask, GroundingIoU, "box_iou_mean"),
    ],
)
def test_right_answers_score_one(tmp_path, make_trainer, task, callback, metric, by_id):
    data = ShapesDataModule(task=task(), test_size=12, eval_batch_size=5)
    rows = [right_answer(sample, by_id=by_id) for sample in data.split("test")]
    module, scored = PredictionsFile(written(tmp_path, *rows[::-1]), "Oracle"), callback()
    data.collate = module.encoder_for(data)
    make_trainer(callbacks=[scored]).test(module, datamodule=data, verbose=False)
    assert scored.results[metric] == pytest.approx(1)
    assert scored.results["parse_rate"] == 1
    assert module.name == "Oracle"
    assert module.checkpoint is None


def grounding(name="a", image_id=7, expression="the star", size=(8, 6)) -> Sample:
    region = Region(((1, 1), (3, 1), (3, 4), (1, 4)))
    target = GroundingTarget([[1, 1, 4, 5]], expression, image_size=size, regions=(region,))
    # No picture is opened: there is none.
    return Sample(name, Path("/no/such/picture.jpg"), target, GroundingTask(), size, image_id=image_id)


def answered(module, *samples):
    return [prediction.answer for prediction in module.predict_step(module.collate(samples), 0)]


def test_masks_are_scored_and_give_the_box(tmp_path):
    mask = grounding().target.mask() == 1
    module = PredictionsFile(written(tmp_path, {"id": "a", "mask": encode_mask(mask)}), "X-Decoder")
    predictions = module.predict_step(module.collate([grounding()]), 0)
    assert predictions[0].answer.boxes.tolist() == [[1, 1, 4, 5]]
    assert GroundingMaskIoU().score(predictions)[0]["mask_iou_mean"] == pytest.approx(1, abs=1e-5)
    assert GroundingIoU().score(predictions)[0]["box_iou_mean"] == 1


def test_lines_without_a_mask_count_as_empty_masks_where_others_have_one(tmp_path):
    rows = [{"id": "a", "mask": encode_mask(np.ones((6, 8), dtype=bool))}, {"id": "b", "boxes": [[1, 1, 4, 5]]}]
    whole, none = answered(PredictionsFile(written(tmp_path, *rows), "x"), grounding("a"), grounding("b"))
    assert whole.mask.all()
    assert none.mask.shape == (6, 8)
    assert not none.mask.any()
    assert none.boxes.tolist() == [[1, 1, 4, 5]]
    alone = answered(PredictionsFile(written(tmp_path, rows[1]), "x"), grounding("b"))[0]
    assert alone.mask is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
def test_masks_are_read_as_pycocotools_writes_them(tmp_path_factory, height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    rows = [
        {"id": "a", "mask": {"size": [height, width], "counts": compressed["counts"].decode()}},
        {"id": "b", "mask": {"size": [height, width], "counts": ([0] if flat[0] else []) + runs}},
    ]
    found = read_answers(written(tmp_path_factory.mktemp("masks"), *rows))
    assert all((answer.mask == mask).all() for _, answer in found.values())


def test_confidences_text_and_answers_of_nothing(tmp_path):
    target = DetectionTarget([[0, 0, 5, 5]], "star")
    samples = [Sample(name, Image.new("RGB", (8, 6)), target, DetectionTask(), (8, 6)) for name in "abcd"]
    rows = [
        {"id": "a", "boxes": [[0, 0, 5, 5], [1, 2, 3.5, 4]], "confidences": [0.25, 1], "text": "two of them"},
        {"id": "b", "boxes": [[5, 5, 0, 0]]},
        {"id": "c", "boxes": []},
        {"id": "d", "text": "no idea"},
    ]
    two, wrong, nothing, unread = answered(PredictionsFile(written(tmp_path, *rows), "x"), *samples)
    assert two.boxes.tolist() == [[0, 0, 5, 5], [1, 2, 3.5, 4]]
    assert two.confidences.tolist() == [0.25, 1]
    assert two.text == "two of them"
    assert wrong.confidences.tolist() == [1]
    assert nothing.no_objects
    assert [answer.parsed for answer in (two, wrong, nothing, unread)] == [True, True, True, False]


def test_pictures_are_matched_by_id_as_text_and_ids_first(tmp_path):
    rows = [
        {"image_id": "7", "asked": "the star", "boxes": [[0, 0, 1, 1]]},
        {"image_id": 7, "asked": "the circle", "boxes": [[0, 0, 2, 2]]},
        {"id": "c", "boxes": [[0, 0, 3, 3]]},
    ]
    samples = [grounding("a"), grounding("b", expression="the circle"), grounding("c"), grounding("d")]
    found = answered(PredictionsFile(written(tmp_path, *rows), "x"), *samples)
    assert [answer.boxes[0, 2].item() for answer in found] == [1, 2, 3, 1]
    found[0].mask = np.ones((6, 8), dtype=bool)
    assert found[3].mask is None  # samples that share a line do not share an answer


def test_a_missing_answer_is_an_error_or_an_unread_answer(tmp_path):
    path = written(tmp_path, {"id": "b", "mask": encode_mask(np.ones((6, 8), dtype=bool))})
    with pytest.raises(AnnotationError, match=r"no answer for sample 'a' \(image_id 7, asked 'the star'\) among its 1"):
        answered(PredictionsFile(path, "x"), grounding())
    module = PredictionsFile(path, "x", missing="empty")
    answer, there = answered(module, grounding(), grounding("b"))
    assert there.mask.all()
    assert not answer.parsed
    assert not answer.no_objects
    assert len(answer.boxes) == 0
    assert not answer.mask.any()
    with pytest.warns(UserWarning, match="1 samples have no answer in"):
        module.on_test_epoch_end()


def presence(name="a", present=True) -> Sample:
    target = PresenceTarget(present, "star", 1, image_size=(8, 6))
    return Sample(name, Path("/no/such/picture.jpg"), target, PresenceTask(), (8, 6), image_id=name)


def test_presence_is_answered_in_any_case_of_letters(tmp_path):
    rows = [{"id": name, "label": label} for name, label in zip("abcd", ["Yes", "YES", "No", "no"], strict=True)]
    rows += [{"id": "e", "text": "Perhaps."}, {"id": "f", "label": ""}]
    samples = [presence(name, name in "abde") for name in "abcdef"]
    module = PredictionsFile(written(tmp_path, *rows), "x")
    predictions = module.predict_step(module.collate(samples), 0)
    assert [item.answer.label for item in predictions[:4]] == ["yes", "yes", "no", "no"]
    results, _ = PresenceAccuracy().score(predictions)
    assert results["presence_accuracy"] == pytest.approx(4 / 6)
    assert results["parse_rate"] == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("answer", "label"), [({"label": "present"}, "'present'"), ({"label": "yes."}, "'yes.'"), ({"boxes": []}, "None")]
)
def test_presence_is_answered_with_yes_or_no(tmp_path, answer, label):
    path = written(tmp_path, {"id": "b", "label": "yes"}, {"id": "a", **answer})
    with pytest.raises(AnnotationError, match=f"line 2: label is {label}, but sample 'a' .* expected yes or no"):
        answered(PredictionsFile(path, "x"), presence())


def absent_worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module = PredictionsFile(Path(folder) / "answers.jsonl", "x", missing="empty")
    answered(module, presence("a"), *([presence("b"), presence("c")] if rank else []))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.on_test_epoch_end()
    Path(folder, f"{rank}.txt").write_text("\n".join(str(warning.message) for warning in caught))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_missing_answers_are_counted_over_processes(tmp_path, monkeypatch):
    """The first process, which alone warns, has answers for all of its samples."""
    written(tmp_path, {"id": "a", "label": "yes"})
    # pytest imports test files under names of its own; the new processes need one they can find.
    monkeypatch.syspath_prepend(Path(__file__).parent)
    worker = importlib.import_module(Path(__file__).stem).absent_worker
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    assert "2 samples have no answer in" in (tmp_path / "0.txt").read_text()


def test_a_mask_of_another_size_is_refused(tmp_path):
    path = written(tmp_path, "\n", {"id": "a", "mask": encode_mask(np.ones((8, 6), dtype=bool))})
    with pytest.raises(AnnotationError, match=r"line 2: the mask has \[8, 6\] .* sample 'a' has \[6, 8\]"):
        answered(PredictionsFile(path, "x"), grounding())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'id': 1}\n", "expected one JSON object per line"),
        ("[1]\n", "expected one JSON object per line"),
        ({"id": "a"}, "expected an answer: label, boxes, mask or text"),
        ({"boxes": []}, "expected id, or image_id and asked"),
        ({"asked": "star", "boxes": []}, "expected id, or image_id and asked"),
        ({"image_id": 1, "asked": 3, "boxes": []}, "asked is 3"),
        ({"id": "a", "bbox": [1, 2, 3, 4]}, r"unknown keys \['bbox'\], expected some of id, .*boxes"),
        ({"id": "a", "boxes": [1, 2, 3, 4]}, "the box 1 is not of four finite numbers"),
        ({"id": "a", "boxes": [[1, 2, 3]]}, r"the box \[1, 2, 3\] is not"),
        ({"id": "a", "boxes": [[1, 2, 3, float("nan")]]}, "four finite numbers"),
        ({"id": "a", "boxes": {"x": 1}}, "expected a list"),
        ({"id": "a", "boxes": [[1, 2, 3, 4]], "confidences": [0.5, 0.5]}, "found 2 confidences for 1 boxes"),
        ({"id": "a", "boxes": [[1, 2, 3, 4]], "confidences": [1.5]}, "numbers from 0 to 1"),
        ({"id": "a", "label": ["rose"]}, "label is .* expected a string"),
        ({"id": "a", "mask": [[1, 2]]}, "mask is .* expected"),
        ({"id": "a", "mask": {"size": [2, 2], "counts": [1, 2]}}, "cover 3 pixels, expected 2 x 2"),
        ({"id": "a", "mask": {"size": [2, 2], "counts": "12"}}, "expected 2 x 2"),
        ({"id": "a", "mask": {"size": [2, 2], "counts": "~"}}, "does not use"),
        ({"id": "b", "label": "rose"}, "the same question is answered in line 1"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path, row, message):
    path = written(tmp_path, {"id": "b", "label": "rose"}, row)
    with pytest.raises(AnnotationError, match=f"answers.jsonl, line 2: .*{message}"):
        read_answers(path)


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(AnnotationError, match=r"nowhere\.jsonl"):
        read_answers(tmp_path / "nowhere.jsonl")
    with pytest.raises(AnnotationError, match="has no answers"):
        read_answers(written(tmp_path, "\n"))


@pytest.mark.parametrize("arguments", [{"missing": "skip"}, {"name": " "}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ConfigConflictError, match=next(iter(arguments))):
        PredictionsFile("x.jsonl", **{"name": "x", **arguments})


def test_the_example_of_the_page_is_such_a_file(tmp_path):
    example = DOCS.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    answers = read_answers(written(tmp_path, example))
    assert len(answers) == 4
    assert sum(answer.mask is not None for _, answer in answers.values()) == 1
