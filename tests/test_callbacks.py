"""Metric callbacks and BeforeAfter, driven by a Trainer and a module that returns predictions made before."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader

from rft_lightning.callbacks import BeforeAfter, DetectionMAP, GroundingIoU, LabelAccuracy
from rft_lightning.callbacks.base import MetricCallback
from rft_lightning.callbacks.figures import running_mean
from rft_lightning.errors import ConfigConflictError
from rft_lightning.metrics import COCOMeanAveragePrecision, LVISAveragePrecision
from rft_lightning.sample import Answer, ClassTarget, DetectionTarget, GroundingTarget, Prediction, Sample, Target

Predictions = list[list[Prediction]]  # one list per batch
METRICS = (DetectionMAP, GroundingIoU, LabelAccuracy)


def prediction(name: str, target: Target | None, answer: Answer, image_id: int | str = 0, index: int = 0) -> Prediction:
    image = Image.new("RGB", (64, 48), "gray")
    sample = Sample(name, image, target, task=None, image_size=(64, 48), image_id=image_id)
    return Prediction(sample, answer.text, answer, index)


def detections() -> Predictions:
    cat, dog = {"category": "cat", "category_id": 17}, {"category": "dog", "category_id": 18}
    crowd = DetectionTarget(boxes=[[0, 0, 20, 20]], ignore_boxes=[[30, 0, 64, 48]], areas=[300], **cat)
    two = DetectionTarget(boxes=[[5, 5, 25, 25], [30, 10, 60, 40]], **dog)
    none = DetectionTarget(boxes=[], **dog)
    exact = Answer(boxes=[[0, 0, 20, 20], [40, 10, 50, 20]], confidences=[0.8, 0.9])
    one_of_two = Answer(boxes=[[5, 5, 25, 24]], confidences=[0.7])
    wrong = Answer(boxes=[[1, 1, 9, 9]], confidences=[0.95])
    return [
        [prediction("1/cat", crowd, exact, "one"), prediction("1/dog", two, one_of_two, "one")],
        [prediction("2/dog", none, wrong, "two"), prediction("3/dog", two, Answer(text="?"), "three")],
    ]


def labels() -> Predictions:
    answers = [Answer(label="rose"), Answer(label="rose"), Answer(label="tulip"), Answer(text="<think>")]
    right = ["rose", "primrose", "tulip", "tulip"]
    pairs = enumerate(zip(answers, right, strict=True))
    return [[prediction(f"flower {i}", ClassTarget(name), answer) for i, (answer, name) in pairs]]


def groundings() -> Predictions:
    target = GroundingTarget(boxes=[[0, 0, 20, 20]], expression="the left one")
    return [[prediction("a", target, Answer(boxes=[[0, 0, 20, 10]])), prediction("b", target, Answer(text="?"))]]


class Replay(LightningModule):
    """Returns given predictions; training steps log a reward."""

    def __init__(self, batches: Predictions, later: Predictions | None = None) -> None:
        super().__init__()
        self.batches, self.later = batches, later
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log_dict({"train/reward": 0.1 * batch_idx, "train/kl": 0.01 * batch_idx})
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Prediction]]:
        batches = self.later if self.later is not None and self.global_step > 0 else self.batches
        return {"predictions": batches[batch_idx]}

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, list[Prediction]]:
        return {"predictions": self.batches[batch_idx]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(count: int) -> DataLoader:
    return DataLoader(range(count), batch_size=1)


def trainer(tmp_path: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**settings, **kwargs}, callbacks=list(callbacks))


def validated(tmp_path: Path, batches: Predictions, *callbacks: Callback) -> dict[str, float]:
    logged = trainer(tmp_path, *callbacks).validate(Replay(batches), loader(len(batches)), verbose=False)
    return logged[0]


def test_detection_map_equals_direct_computation(tmp_path: Path) -> None:
    callback = DetectionMAP()
    logged = validated(tmp_path, detections(), callback)
    direct = COCOMeanAveragePrecision()
    for batch in detections():
        for item in batch:
            target, answer = item.target, item.answer
            boxes = torch.cat([target.boxes, target.ignore_boxes])
            direct.update(
                [
                    {
                        "boxes": answer.boxes,
                        "scores": answer.confidences,
                        "labels": torch.full((len(answer.boxes),), target.category_id),
                    }
                ],
                [
                    {
                        "boxes": boxes,
                        "labels": torch.full((len(boxes),), target.category_id),
                        "area": torch.cat([target.areas, target.ignore_areas]),
                        "iscrowd": torch.tensor([0] * len(target.boxes) + [1] * len(target.ignore_boxes)),
                        "image_id": item.sample.image_id,
                        "query": target.category_id,
                    }
                ],
            )
    expected = direct.compute()
    for name in ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100"):
        assert callback.results[name] == float(expected[name])
        assert logged[f"val/{name}"] == pytest.approx(float(expected[name]), abs=1e-6)
    assert callback.results["box_iou_mean"] == pytest.approx((1 + 0.95) / 5)
    assert callback.results["box_iou_mean_parsed"] == pytest.approx((1 + 0.95) / 3)
    assert callback.results["parse_rate"] == 0.75
    # The crowd hides the second cat box; the dog of picture two is a confident false positive.
    assert callback.per_class["cat"] == pytest.approx(1)
    assert 0 < callback.per_class["dog"] < 0.2
    assert set(logged) == {f"val/{name}" for name in callback.results}


@pytest.mark.parametrize("protocol", ["lvis", "lvis_published_code"])
def test_lvis_counts_what_is_known(tmp_path: Path, protocol: str, caplog: pytest.LogCaptureFixture) -> None:
    """Questions by category and picture give what files of the same content give."""
    rare, often = {"category": "cat", "category_id": 17, "frequency": "r"}, {"category": "dog", "category_id": 18}
    often["frequency"] = "f"
    some = DetectionTarget(boxes=[[0, 0, 40, 40]], not_exhaustive=True, **rare)
    box, other = [0, 0, 40, 39], [50, 0, 64, 30]
    batch = [
        prediction("1/cat", some, Answer(boxes=[other, box], confidences=[0.9, 0.8]), 1),
        prediction(
            "1/dog", DetectionTarget(boxes=[box], **often), Answer(boxes=[other, box], confidences=[0.7, 0.6]), 1
        ),
        prediction("2/dog", DetectionTarget(boxes=[], **often), Answer(boxes=[other], confidences=[0.95]), 2),
        prediction("3/dog", DetectionTarget(boxes=[box], **often), Answer(boxes=[box[::-1]], confidences=[1.0]), 3),
    ]
    truth = {
        "images": [
            {"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": [17]},
            {"id": 2, "neg_category_ids": [18], "not_exhaustive_category_ids": []},
            {"id": 3, "neg_category_ids": [], "not_exhaustive_category_ids": []},
        ],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": [0, 0, 40, height], "area": 40 * height}
            for image, category, height in ((1, 17, 40), (1, 18, 39), (3, 18, 39))
        ],
        "categories": [{"id": 17, "frequency": "r"}, {"id": 18, "frequency": "f"}],
    }
    rows = [(1, 17, 0.9, other), (1, 17, 0.8, box), (1, 18, 0.7, other), (1, 18, 0.6, box), (2, 18, 0.95, other)]
    rows.append((3, 18, 1.0, [-2, -2, -1, -1]))  # swapped corners are a false positive
    found = [
        {"image_id": image, "category_id": category, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for image, category, score, (x1, y1, x2, y2) in rows
    ]
    callback = DetectionMAP(protocol=protocol)
    with caplog.at_level("INFO"):
        logged = validated(tmp_path, [batch[:1], batch[1:]], callback)
    rules = {"lvis": "lvis", "lvis_published_code": "published_code"}[protocol]
    expected = LVISAveragePrecision.from_lvis_json(truth, found, protocol=rules).compute()
    for name in ("map", "map_50", "map_small", "map_medium", "map_rare", "map_common", "map_frequent", "mar_300"):
        assert callback.results[name] == float(expected[name]), name
        assert logged[f"val/{name}"] == pytest.approx(float(expected[name]), abs=1e-6)
    assert callback.results["map_rare"] == pytest.approx(1)  # the confident box that matches nothing is ignored
    assert 0 < callback.results["map_frequent"] < 0.5
    assert f"({protocol}, scores from confidence), over 4 samples" in caplog.text


def test_a_callback_without_samples_of_its_kind_is_silent(tmp_path: Path) -> None:
    callbacks = [kind() for kind in METRICS]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compute.*before.*update.*")
        logged = validated(tmp_path, labels(), *callbacks)
    assert set(logged) == {"val/accuracy", "val/accuracy_lenient", "val/parse_failures", "val/parse_rate"}
    assert [bool(callback.results) for callback in callbacks] == [False, False, True]
    assert not callbacks[0].per_class


def test_label_accuracy(tmp_path: Path) -> None:
    callback = LabelAccuracy()
    logged = validated(tmp_path, labels(), callback)
    assert callback.results == {"accuracy": 0.5, "accuracy_lenient": 0.75, "parse_failures": 1, "parse_rate": 0.75}
    assert callback.per_class == {"primrose": 0.0, "rose": 1.0, "tulip": 0.5}
    assert logged["val/accuracy"] == 0.5


def test_grounding_iou(tmp_path: Path) -> None:
    callback, strict = GroundingIoU(), GroundingIoU(strict=True)
    validated(tmp_path, groundings(), callback)
    validated(tmp_path, groundings(), strict)
    expected = {"box_iou_mean": 0.25, "acc_50": 0.5, "box_giou_mean": -0.25, "parse_rate": 0.5}
    assert callback.results == expected
    assert strict.results == {**expected, "acc_50": 0.0}


def test_a_mixture_pools_the_parse_rate(tmp_path: Path) -> None:
    callbacks = [kind() for kind in METRICS]
    logged = validated(tmp_path, [*detections(), *labels(), *groundings()], *callbacks)
    assert [callback.results["parse_rate"] for callback in callbacks] == [0.75, 0.5, 0.75]
    assert logged["val/parse_rate"] == pytest.approx(7 / 10)


def test_only_labelled_first_completions_count_and_repeats_do_not(tmp_path: Path) -> None:
    (batch,) = labels()
    sample = batch[0].sample
    unlabelled = prediction("none", None, Answer(label="rose"))
    second = Prediction(sample, "", Answer(label="tulip"), index=1)
    callback = LabelAccuracy()
    validated(tmp_path, [batch, [unlabelled, second, *batch[:2]]], callback)
    assert callback.results == {"accuracy": 0.5, "accuracy_lenient": 0.75, "parse_failures": 1, "parse_rate": 0.75}


def test_two_callbacks_of_one_name_and_two_answers_to_one_question_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigConflictError, match="Expected one DetectionMAP, found several"):
        validated(tmp_path, detections(), DetectionMAP(), DetectionMAP(score_from="one"))
    target = DetectionTarget([[0, 0, 9, 9]], category="cat", category_id=17)
    batch = [prediction(name, target, Answer(text="?"), image_id=5) for name in ("first", "second")]
    with pytest.raises(
        ConfigConflictError, match="'first' and 'second' ask for the same category 17 of the same image 5"
    ):
        validated(tmp_path, [batch], DetectionMAP())


def test_dataloaders_number_their_samples_independently(tmp_path: Path) -> None:
    callback = LabelAccuracy()
    module = Replay(labels())
    trainer(tmp_path, callback).validate(module, [loader(1), loader(1)], verbose=False)
    assert callback.parse_rate.update_called is False  # reset after the run
    assert callback.results["accuracy"] == 0.5
    detection = DetectionMAP()
    trainer(tmp_path, detection).validate(Replay(detections()), [loader(2), loader(2)], verbose=False)
    assert detection.results["parse_rate"] == 0.75


def test_test_runs_log_under_their_own_prefix(tmp_path: Path) -> None:
    callback = LabelAccuracy()
    run = trainer(tmp_path, callback)
    (logged,) = run.test(Replay(labels()), loader(1), verbose=False)
    assert logged["test/accuracy"] == 0.5


@pytest.mark.parametrize("score_from", ["confidence", "one", "area", "rank"])
def test_scores(tmp_path: Path, score_from: str) -> None:
    target = DetectionTarget(boxes=[[0, 0, 20, 20]], category="cat", category_id=1)
    boxes = [[30, 0, 40, 10], [0, 0, 20, 20]]
    callback = DetectionMAP(score_from=score_from)
    validated(tmp_path, [[prediction("a", target, Answer(boxes=boxes, confidences=[0.4, 0.6]), 1)]], callback)
    first_is_right = score_from in ("confidence", "area")
    assert callback.results["map"] == pytest.approx(1.0 if first_is_right else 0.5)


def test_a_box_with_swapped_corners_is_a_false_positive(tmp_path: Path) -> None:
    target = DetectionTarget(boxes=[[0, 0, 20, 20]], category="cat", category_id=1)
    answer = Answer(boxes=[[0, 20, 20, 0], [0, 0, 20, 20]], confidences=[0.9, 0.6])
    callback = DetectionMAP()
    validated(tmp_path, [[prediction("a", target, answer, 1)]], callback)
    assert callback.results["map"] == pytest.approx(0.5)


def test_unknown_score_is_refused() -> None:
    with pytest.raises(ConfigConflictError, match="score_from"):
        DetectionMAP(score_from="logit")
    with pytest.raises(ConfigConflictError, match="protocol"):
        DetectionMAP(protocol="voc")


class SpyOnSanityCheck(Callback):
    def __init__(self, callback: MetricCallback) -> None:
        self.callback, self.results = callback, {}

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results = dict(self.callback.results)


def test_the_sanity_check_leaves_results_and_tables_reach_tensorboard(tmp_path: Path) -> None:
    callback = DetectionMAP()
    spy = SpyOnSanityCheck(callback)
    loggers = [TensorBoardLogger(tmp_path / "tb", name=""), CSVLogger(tmp_path / "csv", name="")]
    run = trainer(tmp_path, callback, spy, max_steps=1, num_sanity_val_steps=-1, logger=loggers)
    run.fit(Replay(detections(), [[], *detections()[1:]]), loader(1), loader(2))
    assert spy.results["box_iou_mean"] == pytest.approx(1.95 / 5)
    assert callback.results["box_iou_mean"] == 0.0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(loggers[0].log_dir)).Reload()
    (tensor,) = events.Tensors("val/per_class/text_summary")
    assert b"| dog | 0.0000 |" in tensor.tensor_proto.string_val[0]
    assert "val/map" in events.Tags()["scalars"]
    assert "val/map" in (Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()[0]


def fit(tmp_path: Path, before: Predictions, after: Predictions | None, *callbacks: Callback, **kwargs: Any) -> Trainer:
    settings = {"max_steps": 4, "num_sanity_val_steps": -1, "val_check_interval": 2, **kwargs}
    run = trainer(tmp_path, *callbacks, **settings)
    run.fit(Replay(before, after), loader(4), loader(len(before)))
    return run


def test_before_after_of_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    better = detections()
    better[1][1].answer = Answer(boxes=[[5, 5, 25, 25], [30, 10, 60, 40]], text="$\\frac{ \x07 \u4e2d")
    better[0][1].answer = Answer(boxes=[[5, 5, 1e300, 25]])
    callback = BeforeAfter(tmp_path / "out", max_images=3, next_steps=["rft fit --config [b]other.yaml"])
    fit(tmp_path, detections(), better, callback, DetectionMAP())  # whatever the order of the callbacks
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["before"]["step"], summary["after"]["step"]) == (0, 4)
    assert summary["before"]["metrics"]["box_iou_mean"] == pytest.approx(1.95 / 5)
    assert summary["after"]["metrics"]["box_iou_mean"] > 0.5
    assert [answer["id"] for answer in summary["after"]["answers"]] == ["1/cat", "1/dog", "2/dog"]
    steps, rewards = zip(*summary["curves"]["reward"], strict=True)
    assert steps == (1, 2, 3, 4)
    assert rewards == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert summary["curves"]["kl"][-1] == [4, pytest.approx(0.03)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "before_after.png",
        "reward_curve.png",
        "summary.json",
    ]
    with Image.open(tmp_path / "out" / "before_after.png") as image:
        assert image.height > image.width
    printed = capsys.readouterr().out
    for text in ("validation mAP", "mean IoU on parsed answers", "parse rate", "reward_curve.png", "[b]other.yaml"):
        assert text in printed


@pytest.mark.parametrize("batches", [labels(), groundings()])
def test_before_after_of_other_kinds(tmp_path: Path, batches: Predictions) -> None:
    batches[0][0].answer.label = "$\\frac{ \x07"  # text that matplotlib would take for a formula
    callback = BeforeAfter(tmp_path / "out")
    fit(tmp_path, batches, None, *(kind() for kind in METRICS), callback)
    assert (tmp_path / "out" / "before_after.png").is_file()
    assert callback.before["metrics"] == callback.after["metrics"]
    assert callback.before["metrics"]["parse_rate"] in (0.75, 0.5)


def test_before_after_without_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = BeforeAfter(tmp_path / "out")
    with pytest.warns(UserWarning, match="num_sanity_val_steps"):
        fit(tmp_path, detections(), None, callback, num_sanity_val_steps=0, limit_val_batches=0)
    assert not (tmp_path / "out" / "before_after.png").exists()
    assert (tmp_path / "out" / "reward_curve.png").exists()
    assert "no validation" in capsys.readouterr().out


def test_before_after_survives_a_resume(tmp_path: Path) -> None:
    first = BeforeAfter(tmp_path / "first")
    run = fit(tmp_path, detections(), None, DetectionMAP(), first, max_steps=2)
    run.save_checkpoint(tmp_path / "last.ckpt")
    second = BeforeAfter(tmp_path / "second")
    run = trainer(tmp_path, DetectionMAP(), second, max_steps=4, num_sanity_val_steps=-1, val_check_interval=2)
    module = Replay(detections())
    run.fit(module, loader(4), loader(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert (summary["before"]["step"], summary["after"]["step"]) == (0, 4)
    assert [step for step, _ in summary["curves"]["reward"]] == [1, 2, 3, 4]
    assert (tmp_path / "second" / "before_after.png").exists()


def test_before_after_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="set output_dir"):
        fit(tmp_path, detections(), None, BeforeAfter(tmp_path / "file" / "out"))
    with pytest.raises(ValueError, match="max_images"):
        BeforeAfter(tmp_path, max_images=-1)


def test_running_mean() -> None:
    assert running_mean([1, 2, 6, 2, 1], 3) == [1.5, 3, pytest.approx(10 / 3), 3, 1.5]
    assert running_mean([5], 3) == [5]
