"""What the answers of an evaluation depend on, from Python as from the command line, and what trained the policy."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from rft_lightning import SFTModule
from rft_lightning.baselines import PredictionsFile
from rft_lightning.callbacks import DetectionMAP, GroundingIoU
from rft_lightning.cli import main
from rft_lightning.datamodules import COCODetectionDataModule, ShapesDataModule
from rft_lightning.errors import AnnotationError, CheckpointError, ConfigConflictError
from rft_lightning.evaluation.experiment import describe, history, map_origin
from rft_lightning.evaluation.run import evaluate
from rft_lightning.evaluation.settings import configured
from rft_lightning.evaluation.voting import Voting
from rft_lightning.model_card import write_card
from rft_lightning.tasks import DetectionTask
from tests.fakes.coco import ANNOTATIONS, CATEGORIES, SIZES, write_coco

POLICY = "asset:tiny-qwen2-vl"


def trainer_of(tmp_path: Path, *callbacks, **settings) -> Trainer:
    plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    return Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=[*callbacks], use_distributed_sampler=False,
        **plain, **settings,
    )  # fmt: skip


def shapes(**settings) -> ShapesDataModule:
    sizes = {"test_size": 8, "train_size": 8, "val_size": 4, "eval_batch_size": 4, "batch_size": 4}
    return ShapesDataModule(processor=POLICY, **{**sizes, **settings})


def policy(**settings) -> SFTModule:
    return SFTModule(POLICY, **{"max_completion_length": 4, **settings})


# From Python


def test_objects_of_python_say_what_a_configuration_would(tmp_path):
    task = DetectionTask(template="Where is {category}?")
    found = configured(trainer_of(tmp_path), policy(), shapes(task=task, classes=["red circle"]))
    assert found["model"]["class_path"] == "rft_lightning.sft.SFTModule"
    assert found["model"]["init_args"]["max_completion_length"] == 4
    assert found["data"]["init_args"]["test_size"] == 8
    assert "Where is {category}?" in json.dumps(found["data"]["init_args"]["tasks"])
    assert found["model"]["init_args"]["dtype_name"] == "float32"
    assert found["trainer"] == {"precision": "32-true"}
    json.dumps(found)


@pytest.mark.parametrize(
    ("model", "data", "named"),
    [
        ({"max_completion_length": 3}, {}, "max_completion_length was 4 and is 3"),
        ({"eval_temperature": 0.5}, {}, "eval_temperature was 0.0 and is 0.5"),
        ({}, {"task": DetectionTask(template="Where is the {category}?")}, "template"),
        ({}, {"test_size": 6}, "questions was 8 and is 6"),
        ({}, {"eval_batch_size": 2}, None),
    ],
)
def test_from_python_answers_of_another_model_are_not_taken(tmp_path, model, data, named):
    output = {"output_dir": tmp_path / "out"}
    first = evaluate(trainer_of(tmp_path), policy(), shapes(), **output)
    again = partial(evaluate, trainer_of(tmp_path), policy(**model), shapes(**data), **output)
    if named is None:
        assert again() == first
    else:
        with pytest.raises(ConfigConflictError, match=named):
            again()


def test_a_policy_trained_in_this_process_needs_a_checkpoint(tmp_path):
    model, data = policy(optimizer=partial(torch.optim.SGD, lr=1e-3)), shapes()
    trainer = trainer_of(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(model, data)
    with pytest.raises(ConfigConflictError, match="trained in this process"):
        evaluate(trainer, model, data)
    file = tmp_path / "checkpoints" / "one.ckpt"
    trainer.save_checkpoint(file)
    record = evaluate(trainer, model, data, ckpt_path=str(file))
    assert (record["experiment"]["method"], record["experiment"]["steps"]) == ("SFT", 1)


def test_an_evaluation_leaves_no_setting_behind(tmp_path):
    model, data, trainer = policy(), shapes(), trainer_of(tmp_path, DetectionMAP())
    evaluate(trainer, model, data, voting=Voting(answers=2), limit=4)
    assert model.voting == Voting()
    predicted = trainer.predict(model, data)
    assert sum(map(len, predicted)) == 8
    assert not any(prediction.texts for batch in predicted for prediction in batch)
    assert [type(callback) for callback in trainer.callbacks if hasattr(callback, "score")] == [DetectionMAP]


def test_part_of_the_batches_is_no_evaluation(tmp_path):
    with pytest.raises(ConfigConflictError, match="--limit"):
        evaluate(trainer_of(tmp_path, limit_predict_batches=1), policy(), shapes())


def test_two_callbacks_of_one_class_are_refused(tmp_path):
    with pytest.raises(ConfigConflictError, match="Expected one DetectionMAP"):
        evaluate(trainer_of(tmp_path, DetectionMAP(), DetectionMAP("one")), policy(), shapes())


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No checkpoint"):
        evaluate(trainer_of(tmp_path), policy(), shapes(), ckpt_path=str(tmp_path / "none.ckpt"))


def test_an_evaluation_in_the_folder_of_its_policy_can_go_on(tiny_policy, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    for _ in range(2):
        for output in ("first", "second"):
            model = SFTModule(str(folder), max_completion_length=4)
            evaluate(trainer_of(tmp_path), model, shapes(), limit=4, output_dir=folder / "evaluations" / output)
    weights = next(folder.glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    with pytest.raises(ConfigConflictError, match="policy was"):
        evaluate(
            trainer_of(tmp_path), SFTModule(str(folder), max_completion_length=4), shapes(), limit=4,
            output_dir=folder / "evaluations" / "first",
        )  # fmt: skip


# The data


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "coco", split)
    return tmp_path / "coco"


def answers_of(path: Path) -> Path:
    """The right boxes of each picture and class."""
    lines = [
        {"image_id": image, "asked": name, "boxes": [
            [x, y, x + width, y + height]
            for _, shown, found, (x, y, width, height), crowd in ANNOTATIONS
            if (shown, found, crowd) == (image, name, 0)
        ]}
        for image in SIZES for name in CATEGORIES.values()
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scored(tmp_path: Path, root: Path, output: str = "out", **settings):
    file = tmp_path / "a.jsonl"
    model = PredictionsFile(file if file.exists() else answers_of(file), "mine")
    data = COCODetectionDataModule(root=root, classes=list(CATEGORIES.values()), eval_batch_size=2)
    return evaluate(trainer_of(tmp_path, DetectionMAP()), model, data, output_dir=tmp_path / output, **settings)


def test_corrected_annotations_are_what_answers_are_compared_with(coco, tmp_path):
    first = scored(tmp_path, coco)
    file, out = coco / "annotations" / "instances_val2017.json", tmp_path / "out"
    content = json.loads(file.read_text())
    corrected = {**content, "annotations": [
        {**entry, "bbox": [0.9 * value for value in entry["bbox"]]} for entry in content["annotations"]
    ]}  # fmt: skip
    lines = (out / "predictions.jsonl").read_bytes()
    file.write_text(json.dumps(corrected))
    again = scored(tmp_path, coco)
    assert again["metrics"] == scored(tmp_path, coco, "fresh")["metrics"]
    assert again["metrics"]["map"] < first["metrics"]["map"] - 0.1
    # Half of the answers from before the correction.
    (out / "parts").mkdir()
    (out / "parts" / "part-00000.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[:5]))
    (out / "predictions.jsonl").unlink()
    assert scored(tmp_path, coco)["metrics"] == again["metrics"]
    file.write_text(json.dumps(content))
    assert scored(tmp_path, coco)["metrics"] == first["metrics"]
    assert (out / "predictions.jsonl").read_bytes() == lines


def test_answers_about_pictures_of_another_size_are_not_taken(coco, tmp_path):
    scored(tmp_path, coco)
    file = coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    entry = content["images"][0]
    entry["width"] += 8
    path = next(coco.rglob(f"val2017/{entry['file_name']}"))
    Image.new("RGB", (entry["width"], entry["height"])).save(path)
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigConflictError, match="about another picture"):
        scored(tmp_path, coco)


def test_a_complete_file_that_lost_a_line_is_named(coco, tmp_path):
    scored(tmp_path, coco)
    file = tmp_path / "out" / "predictions.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(AnnotationError, match=r"no answer to 1 questions.*changed since"):
        scored(tmp_path, coco)
    assert not (tmp_path / "out" / "parts").exists()


def test_a_limit_above_the_data_is_none(coco, tmp_path):
    whole = scored(tmp_path, coco)
    assert scored(tmp_path, coco, limit=100_000) == whole
    assert whole["experiment"]["limit"] is None


def test_how_it_was_scored_is_told(coco, tmp_path):
    facts = scored(tmp_path, coco)["experiment"]
    assert (facts["ap_protocol"], facts["score_from"]) == ("coco", "confidence")
    assert facts["mask_protocol"] is facts["acc_50"] is None
    model, data = PredictionsFile(tmp_path / "a.jsonl", "mine"), COCODetectionDataModule(root=coco, classes=["cat"])
    callbacks = [DetectionMAP("rank", "lvis"), GroundingIoU(strict=True)]
    facts = describe(model, data, None, None, split="test", voting=Voting(), callbacks=callbacks)
    assert (facts["ap_protocol"], facts["score_from"], facts["acc_50"]) == ("lvis", "rank", "strict")


# What trained the policy


def config_of(method: str, start: str, **model) -> str:
    return json.dumps({
        "seed_everything": 3, "trainer": {"devices": 1, "max_steps": 400},
        "model": {"class_path": f"rft_lightning.{method}", "init_args": {"policy": start, **model}},
        "data": {"init_args": {"shots": 2, "batch_size": 8, "root": "somewhere"}},
    })  # fmt: skip


def exported(folder: Path, method: str, start: str, steps: int, before=(), **model) -> Path:
    folder.mkdir(parents=True)
    facts = {"method": method, "steps": steps, "versions": {}, "config": config_of(method, start, **model), "rows": {},
             "metrics": {}, "before": list(before)}  # fmt: skip
    write_card(folder, start, {"dtype": "float32"}, facts)
    return folder


def facts_of(folder: Path) -> dict:
    model = SFTModule(str(folder))
    return describe(model, shapes(), None, None, split="test", voting=Voting())


def test_an_export_knows_the_steps_that_were_done_and_all_that_came_before(tmp_path, monkeypatch):
    first = exported(tmp_path / "a" / "policy", "SFTModule", POLICY, 2, lora={"r": 4}, with_thought=False)
    second = exported(tmp_path / "b" / "policy", "GRPOModule", "a/policy", 7, history(str(first), None), group_size=4)
    shutil.rmtree(tmp_path / "a")  # gone, or never copied to this machine
    monkeypatch.chdir(tmp_path)
    facts = facts_of(second)
    assert (facts["method"], facts["policy"], facts["steps"]) == ("SFT then RFT", POLICY, 7)
    assert facts["before"] == [
        {"method": "SFT", "steps": 2, "tuning": "lora", "thought": False, "prompts_per_step": 8}
    ]  # fmt: skip


def test_what_came_before_is_read_before_training(tiny_policy, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    facts = exported(tmp_path / "facts", "SFTModule", POLICY, 2)
    for name in ("rft_run.json", "rft_config.yaml"):
        shutil.copy(facts / name, folder)
    settings = {"max_completion_length": 4, "optimizer": partial(torch.optim.SGD, lr=1e-3)}
    trainer = trainer_of(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(SFTModule(str(folder), **settings), shapes())
    (folder / "rft_run.json").unlink()
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert [run["steps"] for run in history(str(folder), str(tmp_path / "one.ckpt"))] == [2, 1]
    with pytest.raises(CheckpointError, match="does not say what trained it"):
        trainer_of(tmp_path, max_steps=1, limit_val_batches=0).fit(SFTModule(str(folder), **settings), shapes())


def test_trainings_that_differ_are_told_apart_and_seeds_are_not(tmp_path):
    def training(name: str, **model) -> str:
        return facts_of(exported(tmp_path / name, "SFTModule", POLICY, 2, **model))["training"]

    plain = training("a")
    assert plain == training("b", seed=5, cuda_graphs=False)
    assert len({plain, training("c", warmup_steps=3), training("d", lora={"r": 4}), training("e", lora={"r": 8})}) == 4


def test_a_folder_that_lost_what_it_says_of_its_run(tmp_path):
    folder = exported(tmp_path / "policy", "SFTModule", POLICY, 2)
    assert history(str(folder), None)[0]["steps"] == 2
    (folder / "rft_run.json").unlink()
    with pytest.raises(CheckpointError, match="does not say what trained it"):
        history(str(folder), None)
    (folder / "rft_config.yaml").unlink()
    assert history(str(folder), None) == []


def test_a_policy_exported_over_its_own_start_has_an_end(tmp_path):
    folder = exported(tmp_path / "policy", "SFTModule", str(tmp_path / "policy"), 2)
    assert len(history(str(folder), None)) == 1


@pytest.mark.parametrize(
    ("method", "origin"),
    [("zero-shot", "base"), ("SFT then RFT", "tuned"), ("X-Decoder", "X-Decoder"), (None, "map.json")],
)
def test_who_wrote_a_map(tmp_path, method, origin):
    record = {"metrics": {}} if method is None else {"experiment": {"method": method}}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    assert map_origin(tmp_path / "map.json") == origin


def test_the_configuration_beside_the_numbers_is_that_of_the_scoring(tmp_path):
    words = ["evaluate", "-c", "quickstart", "--output_dir", str(tmp_path), "--data.test_size", "4"]
    words[2] = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
    overlay = tmp_path / "rank.yaml"
    overlay.write_text(
        "trainer:\n  callbacks:\n  - class_path: rft_lightning.callbacks.DetectionMAP\n"
        "    init_args: {score_from: rank}\n"
    )
    words += ["--trainer.enable_progress_bar", "false"]
    main(words)
    main([*words[:3], "-c", str(overlay), *words[3:]])
    assert json.loads((tmp_path / "metrics.json").read_text())["experiment"]["score_from"] == "rank"
    assert "score_from: rank" in (tmp_path / "config.yaml").read_text()
