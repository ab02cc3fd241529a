"""Metrics of a loop that Lightning ended early: what a presence map ruled out counts as missed where it was reached."""

from __future__ import annotations

import contextlib
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rft_lightning.baselines import PredictionsFile
from rft_lightning.callbacks import DetectionMAP
from rft_lightning.callbacks.base import questions_asked
from rft_lightning.datamodules import COCODetectionDataModule, MixtureDataModule
from rft_lightning.datamodules.mixture import Member
from rft_lightning.datamodules.samplers import EvaluationSampler
from rft_lightning.sample import NOT_COUNTED
from tests.fakes.coco import CATEGORIES, SIZES, edit, write_coco

pytestmark = pytest.mark.filterwarnings("ignore:.*share pictures:UserWarning", "ignore:.*num_workers")
KEYS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
QUESTIONS = [(image, category) for image in sorted(SIZES) for category in CATEGORIES]
# Half of what is there and some of what is not.
ASKED = [pair for number, pair in enumerate(QUESTIONS) if number % 3 != 1]


def pycocotools(truth: dict, results: list[dict], counted: list[tuple[int, int]]) -> dict[str, float]:
    """The evaluation of these (image, category) pairs."""
    with contextlib.redirect_stdout(io.StringIO()):
        own = COCO()
        notes = [note for note in truth["annotations"] if (note["image_id"], note["category_id"]) in counted]
        own.dataset = {**truth, "annotations": notes}
        own.createIndex()
        found = own.loadRes([entry for entry in results if (entry["image_id"], entry["category_id"]) in counted])
        evaluation = COCOeval(own, found, "bbox")
        evaluation.params.imgIds = sorted({image for image, _ in counted})
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(KEYS, evaluation.stats, strict=False))


@pytest.fixture
def run(tmp_path, make_trainer):
    """Numbers that a loop of so many batches of 4 logs, with truth and results for the oracle."""
    file = write_coco(tmp_path / "coco")

    def inside(content):  # without what the datamodule cuts at the border, and pycocotools does not
        content["annotations"] = [note for note in content["annotations"] if note["id"] not in (1015, 1016)]

    edit(file, inside)
    truth = json.loads(file.read_text())
    presence = {str(image): [CATEGORIES[c] for i, c in ASKED if i == image] for image in SIZES}
    (tmp_path / "map.json").write_text(json.dumps(presence))
    rng, rows, results = np.random.default_rng(0), [], []
    for image, category in QUESTIONS:
        true = [n["bbox"] for n in truth["annotations"] if (n["image_id"], n["category_id"]) == (image, category)]
        moved = [(np.array(box) + rng.normal(0, 1.5, 4)).tolist() for box in true for _ in range(2)]
        boxes = [*moved, *rng.uniform(2, 20, (2, 4)).tolist()]
        scores = (rng.integers(1, 5, len(boxes)) / 4).tolist()
        corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
        rows.append({"image_id": image, "asked": CATEGORIES[category], "boxes": corners, "confidences": scores})
        entries = zip(boxes, scores, strict=True)
        results += [{"image_id": image, "category_id": category, "bbox": box, "score": s} for box, s in entries]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def logged(batches: int | float, stage: str = "test") -> dict[str, float]:
        data = COCODetectionDataModule(
            root=tmp_path / "coco", train_split="val2017", query_mode="map", presence_map=tmp_path / "map.json",
            eval_batch_size=4,
        )  # fmt: skip
        limits = {"limit_val_batches" if stage == "validate" else "limit_test_batches": batches}
        trainer, model = (
            make_trainer(callbacks=[DetectionMAP()], **limits),
            PredictionsFile(tmp_path / "answers.jsonl", "x"),
        )
        data.collate = model.collate
        (found,) = getattr(trainer, stage)(model, datamodule=data, verbose=False)
        return {name.split("/")[1]: value for name, value in found.items()}

    return SimpleNamespace(logged=logged, truth=truth, results=results)


def expected(run, count: int) -> dict[str, float]:
    """Of the first `count` questions, and of what the map ruled out before the last of them."""
    reached = QUESTIONS if count == len(ASKED) else QUESTIONS[: QUESTIONS.index(ASKED[count - 1]) + 1]
    shown = {(note["image_id"], note["category_id"]) for note in run.truth["annotations"]}
    counted = [pair for pair in reached if pair in ASKED or pair in shown]
    spared = set(counted) - set(ASKED)
    results = [entry for entry in run.results if (entry["image_id"], entry["category_id"]) not in spared]
    assert spared
    return pycocotools(run.truth, results, counted)


@pytest.mark.parametrize(("batches", "count"), [(1, 4), (3, 12), (0.5, 16), (1.0, len(ASKED)), (99, len(ASKED))])
def test_a_limited_test(run, batches, count):
    found, wanted = run.logged(batches), expected(run, count)
    assert {key: found[key] for key in KEYS} == pytest.approx(wanted, abs=1e-6)
    assert found["map"] != pytest.approx(expected(run, len(ASKED) if count < len(ASKED) else 12)["map"], abs=1e-3)


def test_a_limited_validation(run):
    found, wanted = run.logged(3, "validate"), expected(run, 12)
    assert {key: found[key] for key in KEYS} == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 40), at_once=st.integers(1, 6), processes=st.integers(1, 5),
    limit=st.one_of(st.integers(1, 12), st.floats(0, 1, exclude_min=True)),
)  # fmt: skip
@example(size=9, at_once=2, processes=2, limit=0.5)
def test_the_questions_that_all_processes_asked(size, at_once, processes, limit):
    """Against the batches that the processes' samplers give, as far as Lightning lets them."""
    asked: set[int] = set()
    for rank in range(processes):
        rows = list(EvaluationSampler(size, rank=rank, world_size=processes, batch_size=at_once))
        length = math.ceil(len(rows) / at_once)
        done = int(length * limit) if isinstance(limit, float) else min(length, limit)
        assume(done > 0)  # else Lightning refuses the limit
        asked |= {row for row, occurrence in rows[: done * at_once] if occurrence != NOT_COUNTED}
    data = SimpleNamespace(split=lambda name: range(size), eval_batch_size=at_once)
    count = questions_asked(SimpleNamespace(limit_val_batches=limit, world_size=processes), data, "val")
    assert asked == set(range(size if count is None else count))


def test_what_a_map_rules_out_before_the_end_of_the_first_questions(tmp_path):
    """Alone and as a member of a mixture, in which the questions of another one come first."""
    write_coco(tmp_path / "coco")
    write_coco(tmp_path / "coco", "train2017")
    presence = {str(image): [CATEGORIES[c] for i, c in ASKED if i == image] for image in SIZES}
    (tmp_path / "map.json").write_text(json.dumps(presence))
    settings = {"root": tmp_path / "coco", "classes": list(CATEGORIES.values())}
    mapped = COCODetectionDataModule(**settings, query_mode="map", presence_map=tmp_path / "map.json")
    plain = COCODetectionDataModule(**settings)

    order = [(sample.image_id, sample.target.category_id) for sample in plain.split("test")]
    there = {(s.image_id, s.target.category_id) for s in plain.split("test") if len(s.target.boxes)}
    mixture = MixtureDataModule(members=[Member(plain), Member(mapped)])
    asked = [pair for pair in order if pair in ASKED]
    for limit in range(1, len(asked)):
        before = order[: order.index(asked[limit - 1])]
        expected = [pair for pair in before if pair not in ASKED and pair in there]
        found = [(sample.image_id, sample.target.category_id) for sample in mapped.unasked("test", limit)]
        assert found == expected
        assert list(mixture.unasked("test", min(limit, len(order)))) == []
        assert len(mixture.unasked("test", len(order) + limit)) == len(expected)
    assert len(mapped.unasked("test")) == len(there - set(ASKED))
