"""`rft evaluate`: answers kept as they come, continued where they stopped, and scored as validation scores them."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft_lightning.cli import main
from rft_lightning.errors import AnnotationError, ConfigConflictError
from rft_lightning.evaluation import run
from rft_lightning.evaluation.parts import Parts
from rft_lightning.evaluation.rows import read_predictions
from rft_lightning.policy_module import PolicyModule
from rft_lightning.tasks import DetectionTask

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = ("predictions.jsonl", "metrics.json", "results.json", "failures.jsonl")


def words(*more: str, output: str | Path = "out", config: str = "quickstart", policy: str = "asset:tiny-qwen2-vl"):
    return [
        "evaluate", "-c", str(CONFIGS / f"{config}.yaml"), "--output_dir", str(output), "--data.test_size", "20",
        "--data.eval_batch_size", "4", "--model.policy", policy, "--trainer.enable_progress_bar", "false", *more,
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """An evaluation that was never interrupted."""
    folder = tmp_path_factory.mktemp("complete") / "out"
    main(words(output=folder))
    return folder


class Killed(Exception):
    pass


def test_the_numbers_are_those_of_rft_test(complete: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["test", *words()[1:3], *words()[5:]])
    (file,) = tmp_path.glob("runs/**/metrics.csv")
    header, values = file.read_text().splitlines()
    logged = dict(zip(header.split(","), values.split(","), strict=True))
    metrics = json.loads((complete / "metrics.json").read_text())["metrics"]
    assert metrics["box_iou_mean"] > 0.2
    for name, value in metrics.items():
        assert float(logged[f"test/{name}"]) == pytest.approx(value, abs=1e-6), name


def test_rows_are_in_the_order_of_the_data(complete: Path) -> None:
    rows = [json.loads(line) for line in (complete / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"shapes/1000003/test/{i}" for i in range(20)]
    assert all(row["num_tokens"] > 5 and row["target"]["category"] == row["asked"] for row in rows)
    assert not (complete / "parts").exists()


@pytest.mark.parametrize("batch", [0, 2, 4])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    complete: Path, tmp_path: Path, monkeypatch, batch: int
) -> None:
    """Killed while a batch is answered, and then once more while its answers are written."""
    step = PolicyModule.predict_step

    def dying(self, prompts, number):
        if number == batch:
            raise Killed
        return step(self, prompts, number)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyModule, "predict_step", dying)
        with pytest.raises(Killed):
            main(words(output=tmp_path))
    part = tmp_path / "parts" / "part-00000.jsonl"
    whole = part.read_bytes() if batch else b""
    assert whole.count(b"\n") == 4 * batch
    if batch:
        part.write_bytes(whole[: len(whole) - 137])  # within the last line
    asked: list[str] = []

    def counting(self, prompts, number):
        asked.extend(sample.id for sample in prompts.samples)
        return step(self, prompts, number)

    monkeypatch.setattr(PolicyModule, "predict_step", counting)
    main(words(output=tmp_path))
    assert contents(tmp_path) == contents(complete)
    # The batch whose last row was cut off is answered again as a whole.
    assert len(asked) == 20 - 4 * max(0, batch - 1)


@pytest.mark.parametrize("file", ["predictions.jsonl", "results.json", "metrics.json"])
def test_interrupted_while_files_are_written(complete: Path, tmp_path: Path, monkeypatch, file: str) -> None:
    replace = os.replace

    def dying(source, target):
        if Path(target).name == file:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            main(words(output=tmp_path))
    assert not (tmp_path / file).exists()
    monkeypatch.setattr(PolicyModule, "predict_step", None)  # nothing is left to ask
    main(words(output=tmp_path))
    assert contents(tmp_path) == contents(complete)


def test_a_complete_evaluation_is_only_scored_again(complete: Path, capsys, monkeypatch) -> None:
    before = contents(complete)
    monkeypatch.setattr(PolicyModule, "predict_step", None)
    main(words(output=complete))
    assert contents(complete) == before
    assert "box_iou_mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--model.max_completion_length", "32"], "model.init_args.max_completion_length was 64 and is 32"),
        (["--split", "val"], "split was 'test' and is 'val'"),
        (["--limit", "8"], "questions was 20 and is 8"),
        (["--seed_everything", "3"], "seed was 0 and is 3"),
        (["--answers", "2"], "voting.answers was 1 and is 2"),
    ],
)
def test_answers_of_another_evaluation_are_not_continued(complete: Path, more: list[str], named: str) -> None:
    with pytest.raises(ConfigConflictError, match=named):
        main(words(*more, output=complete))


def test_a_policy_written_anew_is_another_one(tiny_policy: str, tmp_path: Path) -> None:
    main(words("--limit", "2", output=tmp_path / "out", policy=tiny_policy))
    main(words("--limit", "2", output=tmp_path / "out", policy=tiny_policy))
    weights = next(Path(tiny_policy).glob("*.safetensors"))
    state = weights.stat()
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(ConfigConflictError, match=r"files\.policy was"):
        main(words("--limit", "2", output=tmp_path / "out", policy=tiny_policy))


def test_a_folder_with_predictions_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(ConfigConflictError, match="no evaluation wrote"):
        main(words(output=tmp_path))
    assert (tmp_path / "predictions.jsonl").read_text() == "{}\n"


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    from rft_lightning.placing import claimed

    with claimed(tmp_path) as free:
        assert free
        with pytest.raises(ConfigConflictError, match="Another process"):
            main(words(output=tmp_path))


def test_other_options_are_checked(tmp_path: Path) -> None:
    for more, named in (
        (["--split", "predict"], "split"),
        (["--limit", "0"], "limit"),
        (["--answers", "0"], "answers"),
        (["--choose", "first"], "choose"),
        (["--answers", "2", "--temperature", "0"], "all the same"),
    ):
        with pytest.raises(ConfigConflictError, match=named):
            main(words(*more, output=tmp_path))


def test_failures_are_counted_and_listed(tiny_policy: str, tmp_path: Path) -> None:
    """A random policy answers with noise."""
    main(words("--model.max_completion_length", "8", output=tmp_path, policy=tiny_policy))
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    failed = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert failed == [row for row in rows if not row["parsed"]]
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["parse_failures"]["count"] == len(failed) > 0
    assert record["parse_failures"]["share"] == len(failed) / 20
    assert record["metrics"]["parse_rate"] == pytest.approx(1 - len(failed) / 20)
    kinds = [set(row["problem_kinds"]) for row in failed]
    assert record["parse_failures"]["kinds"] == {
        kind: sum(kind in found for found in kinds) for kind in sorted(set().union(*kinds))
    }


def test_results_are_scored_alike_by_pycocotools(complete: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    predictions = read_predictions(complete / "predictions.jsonl")
    images = {p.sample.image_id: {"id": p.sample.image_id, "width": 112, "height": 112} for p in predictions}
    annotations = []
    for p in predictions:
        for (x1, y1, x2, y2), area in zip(p.target.boxes.tolist(), p.target.areas.tolist(), strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": p.sample.image_id, "category_id": p.target.category_id,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": 0}
            )  # fmt: skip
    truth = COCO()
    truth.dataset = {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": number} for number in sorted({a["category_id"] for a in annotations})],
    }
    truth.createIndex()
    found = truth.loadRes(json.loads((complete / "results.json").read_text()))
    evaluator = COCOeval(truth, found, "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    metrics = json.loads((complete / "metrics.json").read_text())["metrics"]
    assert metrics["map"] == pytest.approx(evaluator.stats[0], abs=1e-9)
    assert metrics["map_50"] == pytest.approx(evaluator.stats[1], abs=1e-9)


def test_a_predictions_file_scores_by_itself(complete: Path, tmp_path: Path, capsys) -> None:
    main(["score", str(complete / "predictions.jsonl"), "--output", str(tmp_path / "numbers.json"), "--per_class"])
    record, numbers = (json.loads(p.read_text()) for p in (complete / "metrics.json", tmp_path / "numbers.json"))
    assert numbers["metrics"] == record["metrics"]
    assert numbers["per_class"] == record["per_class"]
    assert "circle" in capsys.readouterr().out
    main(["score", str(complete / "predictions.jsonl"), "--classes", "circle", "--output", str(tmp_path / "one.json")])
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["metrics"]["map"] == pytest.approx(record["per_class"]["circle"])


def test_rows_come_back_as_they_were(complete: Path) -> None:
    from rft_lightning.evaluation.rows import row_of

    written = [json.loads(line) for line in (complete / "predictions.jsonl").read_text().splitlines()]
    again = [row_of(prediction) for prediction in read_predictions(complete / "predictions.jsonl")]
    assert [{**row, "image": None} for row in again] == written


def test_rows_of_other_systems_need_little(tmp_path: Path, capsys) -> None:
    rows = [
        {"id": "a", "task": "classification", "target": {"label": "rose"}, "label": "Rose"},
        {"id": "b", "task": "classification", "target": {"label": "tulip"}, "label": "rose"},
        {"id": "c", "task": "grounding", "target": {"boxes": [[0, 0, 10, 10]]}, "boxes": [[0, 0, 10, 5]]},
        {"id": "d", "task": "detection", "image_id": 7, "target": {"category_id": 3, "boxes": [[0, 0, 9, 9]]},
         "boxes": [[0, 0, 9, 9]], "confidences": [0.4]},
        {"id": "e", "task": "detection", "image_id": 8, "target": {"category_id": 3, "boxes": [[0, 0, 9, 9]]},
         "parsed": False},
        {"id": "f", "task": "presence", "target": {"category_id": 4, "present": True, "category": "cat"},
         "label": "yes"},
    ]  # fmt: skip
    file = tmp_path / "theirs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    main(["score", str(file), "--output", str(tmp_path / "numbers.json")])
    found = json.loads((tmp_path / "numbers.json").read_text())["metrics"]
    assert found["accuracy"] == 0.5
    assert found["grounding/box_iou_mean"] == found["detection/box_iou_mean"] == 0.5
    assert found["map"] == pytest.approx(51 / 101)  # half of the objects, of 101 recall points
    assert found["presence_accuracy"] == 1
    assert found["parse_rate"] == pytest.approx(5 / 6)
    per_class = json.loads((tmp_path / "numbers.json").read_text())["per_class"]
    assert per_class["classification/rose"] == 1
    assert "presence/cat" in per_class


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2: expected one JSON object per line"),
        ("[1]", "line 2: expected one JSON object per line, but it is a list"),
        ('{"id": "x", "target": null}', "line 2: 'task' is missing"),
        ('{"id": "x", "task": "captions"}', "task is 'captions', expected one of"),
        ('{"id": "x", "task": "detection", "target": {"boxes": []}, "boxes": []}', "'category_id' is missing"),
        ('{"id": "x", "task": "detection", "target": {"boxes": [], "category_id": 1}, "bbox": []}', "no answer"),
        ('{"id": "x", "task": "classification", "target": {"label": "b"}, "boxes": []}', "expected label"),
        (
            '{"id": "x", "task": "classification", "target": {"label": "b"}, "label": 3}',
            "label is 3, expected a string",
        ),
        ('{"id": "x", "task": "presence", "target": {"present": "no", "category_id": 1}, "label": "no"}', "true or"),
        ('{"id": "x", "task": "presence", "target": "cat", "label": "no"}', "target is 'cat', expected an object"),
        ('{"id": "x", "task": ["detection"]}', "expected one of"),
        ('{"id": "x", "task": "classification", "label": "b", "parsed": "no"}', "parsed is 'no', expected true"),
        ('{"id": "x", "task": "classification", "label": "b", "image_size": 7}', "expected [width, height]"),
        ('{"id": "x", "task": "grounding", "boxes": [[1, 2, 3, 4]], "confidences": [NaN]}', "numbers from 0 to 1"),
        ('{"id": "x", "task": "grounding", "boxes": [[1, 2, 3, 4]], "confidences": 0.5}', "numbers from 0 to 1"),
        ('{"id": "x", "task": "grounding", "boxes": [[1, 2, 3, "4"]]}', "not of four finite numbers"),
        ('{"id": "x", "task": "grounding", "mask": {"size": [2, 2], "counts": [1, 2]}}', "cover 3 pixels"),
        ('{"id": "x", "task": "grounding", "target": {"boxes": [[1, 2]]}, "boxes": []}', "four finite numbers"),
        ('{"id": "a", "task": "classification", "target": {"label": "b"}, "label": "b"}', "in line 1 too"),
        (
            '{"id": "x", "task": "classification", "target": {"label": "b", "aliases": "bee"}, "label": "e"}',
            "aliases is 'bee', expected a list of strings",
        ),
        (
            '{"id": "x", "task": "classification", "target": {"label": "b", "aliases": [1]}, "label": "e"}',
            "aliases is [1], expected a list of strings",
        ),
        (
            '{"id": "x", "task": "detection", "boxes": [], "target": {"category_id": 1, "boxes": [[0, 0, 1, 1]], '
            '"areas": [Infinity]}}',
            "line 2: areas is [inf], expected a list of finite numbers",
        ),
        (
            '{"id": "x", "task": "detection", "boxes": [], "target": {"category_id": 1, "boxes": [], "ignore_areas": '
            '[1], "ignore_boxes": [[0, 0, NaN, 1]]}}',
            "the box [0, 0, nan, 1] is not of four finite numbers",
        ),
        (
            '{"id": "x", "task": "detection", "boxes": [], "target": {"category_id": 1, "boxes": [], "ignore_boxes": '
            '[[0, 0, 1, 1]], "ignore_areas": [NaN]}}',
            "ignore_areas is [nan], expected",
        ),
        (
            '{"id": "x", "task": "detection", "boxes": [], "target": {"category_id": 1.5, "boxes": []}}',
            "category_id is 1.5, expected a whole number",
        ),
        (
            '{"id": "x", "task": "presence", "label": "no", "target": {"category_id": true, "present": true}}',
            "category_id is True, expected a whole number",
        ),
        (
            '{"id": "x", "task": "presence", "label": "present", "target": {"category_id": 1, "present": true}}',
            "line 2: label is 'present', expected yes or no, or parsed false",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "theirs.jsonl"
    first = '{"id": "a", "task": "classification", "target": {"label": "b"}, "label": "b"}'
    file.write_text(first + "\n" + line + "\n")
    with pytest.raises(AnnotationError, match=re.escape(named)):
        main(["score", str(file)])


def test_presence_is_read_in_any_case_of_letters(tmp_path: Path) -> None:
    said = [("Yes", True), ("YES", True), ("No", False), ("yes", False), (None, True), ("present", True)]
    rows = [
        {"id": str(i), "task": "presence", "label": label, "target": {"category_id": 1, "present": present}}
        for i, (label, present) in enumerate(said)
    ]
    for row in rows[-2:]:
        row["parsed"] = False  # counts as no, whatever it says
    file = tmp_path / "theirs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    main(["score", str(file), "--output", str(tmp_path / "numbers.json")])
    found = json.loads((tmp_path / "numbers.json").read_text())["metrics"]
    assert found["presence_accuracy"] == 3 / 6
    assert found["presence_precision"] == pytest.approx(2 / 3)
    assert found["presence_recall"] == 2 / 4
    assert found["parse_rate"] == pytest.approx(4 / 6)


def test_a_task_that_decides_in_other_words_is_refused_at_once() -> None:
    from rft_lightning.evaluation.rows import row_of
    from rft_lightning.sample import Answer, Prediction, PresenceTarget, Sample
    from rft_lightning.tasks import PresenceTask

    sample = Sample("a", Path("a.jpg"), PresenceTarget(True, "cat", 1), PresenceTask(), (8, 6))
    assert row_of(Prediction(sample, "", Answer(label="YES")))["label"] == "yes"
    assert row_of(Prediction(sample, "", Answer(label="perhaps", parsed=False)))["label"] == "perhaps"
    with pytest.raises(ValueError, match="label is 'there', expected yes or no"):
        row_of(Prediction(sample, "", Answer(label="there")))


def test_scores_from_area_need_the_size_of_the_picture(tmp_path: Path) -> None:
    target = {"category_id": 3, "boxes": [[0, 0, 9, 9]]}
    rows = [
        {"id": name, "task": "detection", "image_id": name, "target": target, "boxes": boxes, **size}
        for name, boxes, size in (
            ("none", [], {}),
            ("right", [[0, 0, 9, 9]], {"image_size": [10, 10]}),
            ("large", [[0, 0, 20, 20]], {"image_size": [40, 40]}),
        )
    ]
    file = tmp_path / "theirs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    main(["score", str(file), "--score_from", "area", "--output", str(tmp_path / "numbers.json")])
    found = json.loads((tmp_path / "numbers.json").read_text())["metrics"]
    assert found["map"] == pytest.approx(34 / 101)  # 81 % of its picture comes before 25 %
    del rows[2]["image_size"]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(AnnotationError, match=r"Sample 'large' has the image_size \[0, 0\].*score_from"):
        main(["score", str(file), "--score_from", "area"])


def test_masks_are_decoded_one_after_another(tmp_path: Path) -> None:
    """Scoring never holds the masks of all rows, which are three hundred times as large as the file."""
    from rft_lightning.callbacks import GroundingMaskIoU
    from rft_lightning.evaluation.rows import row_of
    from rft_lightning.run_lengths import encode_mask

    height, width, count = 240, 320, 400
    masks = [np.zeros((height, width), dtype=bool) for _ in range(2)]
    masks[0][50:100, 100:200] = masks[1][50:100, 100:150] = True
    region = {"points": [[100, 50], [199, 50], [199, 99], [100, 99]], "value": 1}
    target = {"boxes": [[100, 50, 200, 100]], "regions": [region]}
    rows = [
        {"id": str(i), "task": "grounding", "mask": encode_mask(masks[i % 2]), "target": target,
         "image_size": [width, height]}
        for i in range(count)
    ]  # fmt: skip
    file = tmp_path / "theirs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    callback = GroundingMaskIoU()
    tracemalloc.start()
    try:
        predictions = read_predictions(file)
        found, _ = callback.score(predictions)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < height * width * count / 2
    assert found["mask_iou_mean"] == pytest.approx(0.75, abs=1e-6)
    answer = pickle.loads(pickle.dumps(replace(predictions[1]))).answer
    assert answer.mask.dtype == bool
    assert (answer.mask == masks[1]).all()
    assert (replace(answer).mask == masks[1]).all()
    assert row_of(predictions[1])["mask"] == rows[1]["mask"]
    answer.mask = None
    assert answer.mask is None


def test_a_file_that_is_not_written_to_its_end_is_not_there(tmp_path: Path) -> None:
    from rft_lightning.placing import write_whole

    def lines():
        yield "new\n"
        raise Killed

    write_whole(tmp_path / "rows.jsonl", iter(["old\n", "lines\n"]))
    with pytest.raises(Killed):
        write_whole(tmp_path / "rows.jsonl", lines())
    assert (tmp_path / "rows.jsonl").read_text() == "old\nlines\n"
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_category_has_one_name(tmp_path: Path) -> None:
    target = {"category_id": 3, "boxes": [[0, 0, 9, 9]]}
    rows = [
        {"id": name, "task": "detection", "image_id": name, "target": {**target, "category": name}, "boxes": []}
        for name in ("cat", "dog")
    ]
    file = tmp_path / "theirs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(AnnotationError, match="category 3 is 'dog', and 'cat' before"):
        main(["score", str(file)])


def test_score_says_what_a_single_file_must_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigConflictError, match=r"rft score predictions\.jsonl"):
        main(["score", "gt.json"])
    with pytest.raises(ConfigConflictError, match="--score_from"):
        main(["score", "gt.json", "results.json", "--score_from", "one"])
    with pytest.raises(AnnotationError, match="cannot be read"):
        main(["score", str(tmp_path / "none.jsonl")])


@given(sizes=st.lists(st.integers(1, 5), max_size=6), cut=st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_what_was_cut_off_is_removed(tmp_path_factory, sizes: list[int], cut: int) -> None:
    """However long a cut leaves the file, the whole lines are read and the next append starts a line."""
    parts = Parts(tmp_path_factory.mktemp("cut"))
    parts.begin({})
    rows = [[{"id": f"{b}-{i}", "text": "x" * (7 * i)} for i in range(size)] for b, size in enumerate(sizes)]
    for batch in rows:
        parts.append(batch, 0)
    parts.close()
    file = parts.folder / "part-00000.jsonl"
    kept = file.read_bytes()[:cut] if sizes else b""
    if sizes:
        file.write_bytes(kept)
    expected = [row for batch in rows for row in batch][: kept.count(b"\n")]
    assert list(parts.rows()) == expected
    parts.append([{"id": "new"}], 0)
    parts.close()
    assert list(parts.rows()) == [*expected, {"id": "new"}]


def test_parts_that_are_still_written_are_not_read(tmp_path: Path) -> None:
    """A process outlives its killed companion by seconds, and goes on writing."""
    orphan, rerun = Parts(tmp_path), Parts(tmp_path)
    orphan.begin({})
    orphan.append([{"id": "a"}], 1)
    with pytest.raises(ConfigConflictError, match="still writes"):
        list(rerun.rows())
    orphan.close()
    assert list(rerun.rows()) == [{"id": "a"}]


def test_a_full_disk_is_told_and_the_rest_is_kept(complete: Path, tmp_path: Path, monkeypatch) -> None:
    append, calls = Parts.append, []

    def full(self, rows, rank):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        append(self, rows, rank)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "append", full)
        with pytest.raises(OSError, match="No space left") as caught:
            main(words(output=tmp_path))
    assert "the same command goes on" in caught.value.__notes__[-1]
    main(words(output=tmp_path))
    assert contents(tmp_path) == contents(complete)


# The experiment that tables look for


def test_the_record_tells_what_trained_the_policy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = [
        "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0",
        "--data.batch_size", "2", "--data.shots", "1", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    config = ["-c", str(CONFIGS / "shapes_grounding.yaml")]
    sft = ["-c", str(CONFIGS / "method" / "sft.yaml")]
    main(["fit", *config, *sft, *short, "--seed_everything", "5", "--run_dir", "first"])
    checkpoint = Path("first/csv/version_0/checkpoints/last.ckpt")
    assert checkpoint.exists()
    ask = ["--limit", "2", "--trainer.enable_progress_bar", "false"]
    main(["evaluate", *config, *sft, *ask, "--ckpt_path", str(checkpoint)])
    record = json.loads(Path("first/csv/version_0/evaluation/last_test/metrics.json").read_text())["experiment"]
    asset = "asset:tiny-qwen2-vl"
    known = {"method": "SFT", "policy": asset, "shots": 1, "seed": 5, "steps": 1, "tuning": "full", "thought": True,
             "task": "grounding", "rules": None, "group_size": None, "prompts_per_step": 2}  # fmt: skip
    assert {name: record[name] for name in known} == known
    main(["export", str(checkpoint), "--output_dir", "policy"])
    start = ["--model.policy", "policy"]
    main(["fit", *config, *short, *start, "--seed_everything", "6", "--run_dir", "second"])
    checkpoint = Path("second/csv/version_0/checkpoints/last.ckpt")
    main(["evaluate", *config, *ask, *start, "--ckpt_path", str(checkpoint), "--output_dir", "out"])
    record = json.loads(Path("out/metrics.json").read_text())["experiment"]
    known |= {"method": "SFT then RFT", "seed": 6, "thought": None, "rules": "strict", "group_size": 8}
    assert {name: record[name] for name in known} == known
    main(["evaluate", *config, *ask, *start, "--run_dir", "third"])
    # All that the runs wrote lies in their folders.
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "third", "policy", "out"}
    record = json.loads(Path("third/evaluation/policy_Shapes_test/metrics.json").read_text())["experiment"]
    assert record["method"] == "SFT"
    assert record["policy"] == asset


# Several processes, and processes that are killed


def in_process(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rft_lightning", *words(*more, output=folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.distributed
def test_two_processes_write_the_same_file(complete: Path, tmp_path: Path) -> None:
    two = in_process(tmp_path / "out", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    printed, _ = two.communicate(timeout=200)
    assert two.returncode == 0, printed
    assert contents(tmp_path / "out") == contents(complete)
    assert printed.count("box_iou_mean ") == 1


@pytest.mark.distributed
def test_killed_under_two_processes_and_continued_by_one(complete: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    two = in_process(folder, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    end = time.monotonic() + 120
    while not list(folder.glob("parts/part-*.jsonl")) and two.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    two.send_signal(signal.SIGKILL)
    two.communicate()
    # The second process ends by itself, without its first one.
    main_parts = [path.stat().st_size for path in folder.glob("parts/part-*.jsonl")]
    assert main_parts or (folder / "metrics.json").exists()
    end = time.monotonic() + 60
    while True:
        try:
            main(words(output=folder))
            break
        except ConfigConflictError:
            assert time.monotonic() < end
            time.sleep(0.5)
    assert contents(folder) == contents(complete)


# Votes


def test_a_majority_is_drawn_alike_in_any_batch(tmp_path: Path) -> None:
    votes = ["--answers", "3", "--temperature", "1.5", "--limit", "8"]
    main(words(*votes, output=tmp_path / "one"))
    main(words(*votes, "--data.eval_batch_size", "8", output=tmp_path / "two"))
    one, two = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert [p.texts for p in one] == [p.texts for p in two]
    assert all(len(p.texts) == 3 and p.text in p.texts for p in one)
    assert any(len(set(p.texts)) > 1 for p in one)
    main(words(*votes, "--choose", "best", output=tmp_path / "best"))
    best = read_predictions(tmp_path / "best" / "predictions.jsonl")
    assert [p.texts for p in best] == [p.texts for p in one]
    scores = [
        [float(p.sample.task.score(p.answer, p.target).nansum()) for p in predictions] for predictions in (one, best)
    ]
    assert all(high >= low - 1e-6 for low, high in zip(*scores, strict=True))
    assert sum(scores[1]) > sum(scores[0])
    record = json.loads((tmp_path / "best" / "metrics.json").read_text())["experiment"]
    assert (record["answers"], record["choose"], record["temperature"]) == (3, "best", 1.5)


def test_votes_agree_by_label_box_and_boxes() -> None:
    from rft_lightning.evaluation.voting import Voting
    from rft_lightning.sample import Answer, Sample
    from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask

    def chosen(task, answers) -> int:
        return Voting(len(answers)).choice(Sample("s", Path("p"), None, task, (10, 10)), answers)

    def label(name: str | None) -> Answer:
        return Answer(text=str(name), label=name, parsed=name is not None)

    def boxes(*found) -> Answer:
        return Answer(text="t", boxes=list(found) or None, parsed=True, no_objects=not found)

    task = ClassificationTask()
    assert chosen(task, [label("rose"), label("Lily"), label("lily")]) == 1
    assert chosen(task, [label("rose"), label("lily")]) == 0  # a tie goes to the first
    assert chosen(task, [label(None), label(None), label("lily")]) == 2  # what cannot be read does not vote
    assert chosen(task, [label(None), label(None)]) == 0
    a, b, c = [0, 0, 4, 4], [0, 0, 4, 5], [6, 6, 9, 9]
    assert chosen(GroundingTask(), [boxes(c), boxes(a), boxes(b)]) == 1
    assert chosen(DetectionTask(), [boxes(a, c), boxes(a), boxes(), boxes(b)]) == 1
    assert chosen(DetectionTask(), [boxes(a), boxes(), boxes()]) == 1


def test_unasked_questions_count_as_misses(tmp_path: Path, monkeypatch) -> None:
    """Half of the questions are spared; their objects are missed, and no failures."""
    from rft_lightning.datamodules import ShapesDataModule

    whole = ShapesDataModule.samples

    def half(self, split):
        samples = whole(self, split)
        return [samples[i] for i in range(0, len(samples), 2)]

    def other_half(self, split, limit=None):
        samples = whole(self, split)
        return [samples[i] for i in range(1, len(samples), 2)]

    with monkeypatch.context() as patch:
        patch.setattr(ShapesDataModule, "samples", half)
        patch.setattr(ShapesDataModule, "unasked", other_half)
        main(words(output=tmp_path))
        main(words(output=tmp_path))  # once more, from the complete file
    record = json.loads((tmp_path / "metrics.json").read_text())
    predictions = read_predictions(tmp_path / "predictions.jsonl")
    assert [p.unasked for p in predictions] == [False] * 10 + [True] * 10
    assert record["samples"] == 10
    assert record["metrics"]["parse_rate"] == 1
    asked = [p for p in predictions if not p.unasked]
    share = sum(len(p.target.boxes) for p in asked) / sum(len(p.target.boxes) for p in predictions)
    main(["score", str(tmp_path / "predictions.jsonl"), "--output", str(tmp_path / "all.json")])
    assert json.loads((tmp_path / "all.json").read_text())["metrics"] == record["metrics"]
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()[:10]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines) + "\n")
    main(["score", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / "asked.json")])
    alone = json.loads((tmp_path / "asked.json").read_text())["metrics"]
    assert record["metrics"]["box_iou_mean"] == pytest.approx(alone["box_iou_mean"] * share)


def test_batches_are_cut_in_the_same_places() -> None:
    from rft_lightning.datamodules.samplers import EvaluationSampler
    from rft_lightning.sample import NOT_COUNTED

    def rows(done=(), rank=0, world=1):
        sampler = EvaluationSampler(20, rank=rank, world_size=world, batch_size=3, done=set(done))
        return [row for row, _ in sampler]

    assert rows() == list(range(20))
    assert rows({0, 1}) == list(range(20))  # of the first batch, 2 is left: all of it comes again
    assert rows({0, 1, 2, 4}) == list(range(3, 20))
    assert rows({6, 7, 8, 18, 19}) == [0, 1, 2, 3, 4, 5, *range(9, 18)]
    assert rows(rank=1, world=3) == [3, 4, 5, 12, 13, 14]
    assert rows({12, 13, 14}, rank=1, world=3) == [3, 4, 5]
    nothing_left = EvaluationSampler(20, rank=6, world_size=8, batch_size=3, done={18, 19})
    assert list(nothing_left) == [(0, NOT_COUNTED)]


class CountedDetection(DetectionTask):
    name = "counted detection"


def test_a_task_of_ones_own_is_scored_by_its_targets(make_trainer, tmp_path: Path) -> None:
    from rft_lightning.callbacks import DetectionMAP
    from rft_lightning.datamodules import ShapesDataModule
    from rft_lightning.sft import SFTModule

    policy, records = "asset:tiny-qwen2-vl", []
    for task in (DetectionTask(), CountedDetection()):
        data = ShapesDataModule(processor=policy, task=task, test_size=4, eval_batch_size=4)
        trainer = make_trainer(callbacks=[DetectionMAP()])
        folder = tmp_path / task.name
        records.append(run.evaluate(trainer, SFTModule(policy, max_completion_length=48), data, output_dir=folder))
    assert records[0]["metrics"] == records[1]["metrics"]
    own, usual = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in (CountedDetection.name, "detection"))
    assert own == usual


def test_the_evaluation_loop_leaves_the_trainer_as_it_was(make_trainer, tmp_path: Path) -> None:
    from rft_lightning.callbacks import DetectionMAP, PredictionWriter
    from rft_lightning.datamodules import ShapesDataModule
    from rft_lightning.sft import SFTModule

    policy = "asset:tiny-qwen2-vl"
    callbacks = [DetectionMAP(), PredictionWriter(tmp_path / "writer")]
    trainer = make_trainer(callbacks=callbacks)
    before = list(trainer.callbacks)
    data = ShapesDataModule(processor=policy, test_size=6, eval_batch_size=4)
    module = SFTModule(policy, max_completion_length=48)
    record = run.evaluate(trainer, module, data, output_dir=tmp_path / "out")
    assert record["samples"] == 6
    assert trainer.callbacks == before
    assert not (tmp_path / "writer").exists()
    assert torch.isfinite(torch.tensor(record["metrics"]["map"]))
