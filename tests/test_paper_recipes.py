"""The recipes of the paper's tables: what they say, and that each runs, on fakes of its data with a tiny policy."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rft_lightning import GRPOModule, SFTModule
from rft_lightning.cli import main
from rft_lightning.datamodules import coco, lvis, shapes
from rft_lightning.sample import PromptBatch
from tests.fakes import classification, detection
from tests.fakes.coco import write_coco
from tests.fakes.lvis import write_lvis
from tests.fakes.reasonseg import write_reasonseg
from tests.test_config_files import CONFIGS
from tests.test_config_files import parsed as parse
from tests.tiny_baselines import build_baseline

PAPER = CONFIGS / "paper"
OVERLAYS = ("sft", "sft_as_published", "shapes_sft")
RECIPES = sorted(path.stem for path in PAPER.glob("*.yaml") if path.stem not in OVERLAYS)
PUBLISHED = [name for name in RECIPES if name.startswith("table")]
SHAPES = [name for name in RECIPES if name.startswith("shapes")]
EVALUATION_ONLY = "table8_lvis"
# What the tables state of each run, and the paper of each table.
STEPS = {"table6_lisa": 500, "table6_lisa_all_targets": 500, "table7_coco": 750}
SMALL = {
    "model.group_size": 2, "model.max_completion_length": 8, "trainer.max_steps": 2, "trainer.accelerator": "cpu",
    "trainer.precision": "32-true", "trainer.devices": 1, "trainer.enable_progress_bar": "false",
    "data.batch_size": 2, "data.eval_batch_size": 16, "data.num_workers": 0,
}  # fmt: skip
# The published size would be 512 image tokens of the tiny policy's.
SMALL_PICTURES = {"data.min_pixels": 784, "data.max_pixels": 3136}


def file(name: str) -> str:
    return str(PAPER / f"{name}.yaml")


@cache
def parsed(*names: str) -> dict[str, Any]:
    """The configuration of a recipe with overlays, as the command line sees it."""
    return parse(*(word for name in names for word in ("-c", file(name))))


def words(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


# What they say --------------------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_table_and_data_set():
    names = {
        "table2_flowers102", "table2_pets37", "table2_fgvc_aircraft", "table2_cars196", "table3_coco", "table4_lvis",
        "table5_mg", "table6_lisa", "table7_coco", "table8_lvis", "shapes_classification", "shapes_detection",
        "shapes_grounding", "shapes_open_vocabulary",
    }  # fmt: skip
    assert names <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fixes_what_the_paper_fixes(name):
    config = parsed(name)
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert config["model"]["class_path"] == "rft_lightning.GRPOModule"
    assert data["task"]["init_args"]["rules"] == "strict"
    assert data["seed"] is None, "the draw follows the seed of the run"
    assert trainer["devices"] == 1
    assert not any("BeforeAfter" in callback["class_path"] for callback in trainer["callbacks"])
    if name in SHAPES:
        assert (model["policy"], trainer["accelerator"]) == ("asset:tiny-qwen2-vl", "cpu")
        return
    assert model["policy"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert (data["min_pixels"], data["max_pixels"]) == (3136, 401408)
    assert trainer["precision"] == "bf16-mixed"
    if name == EVALUATION_ONLY:
        return
    assert trainer["max_steps"] == STEPS.get(name, 200)
    assert data["batch_size"] * trainer["devices"] == 16
    assert (model["group_size"], model["temperature"], model["top_k"], model["top_p"]) == (8, 1.0, 50, 1.0)
    assert (model["max_completion_length"], model["num_iterations"], model["max_grad_norm"]) == (256, 1, 1.0)
    assert model["objective"]["init_args"]["beta"] == 0.04
    assert model["optimizer"]["init_args"]["lr"] == 1e-6
    assert model["optimizer"]["init_args"]["weight_decay"] == 0
    assert (model["schedule"], model["warmup_steps"], model["lora"]) == ("linear", 0, None)
    assert model["gradient_checkpointing"] == (data["task"]["class_path"].endswith("GroundingTask"))
    # The last checkpoint is the result: none is chosen by a look at validation, which is mostly the test set.
    assert trainer["limit_val_batches"] == 0
    checkpoints = callbacks_of(config, "RolloutCheckpoint")
    assert [callback["monitor"] for callback in checkpoints] == [None]


def callbacks_of(config: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [c.get("init_args") or {} for c in config["trainer"]["callbacks"] if c["class_path"].endswith(f".{name}")]


def test_the_protocols_of_lvis_and_of_masks_are_the_published_ones():
    for name in ("table4_lvis", "table8_lvis"):
        (settings,) = callbacks_of(parsed(name), "DetectionMAP")
        assert settings["protocol"] == "lvis_published_code"
    for name, protocol, box in (
        ("table6_lisa", "published_code", "first_shape"),
        ("table6_lisa_all_targets", "lisa", "union_target"),
    ):
        config = parsed(name)
        (settings,) = callbacks_of(config, "GroundingMaskIoU")
        assert (settings["segmenter"], settings["protocol"]) == ("facebook/sam-vit-huge", protocol)
        assert config["data"]["init_args"]["box_from"] == box


def test_classes_and_shots_are_the_papers():
    def data(name):
        return parsed(name)["data"]["init_args"]

    assert (data("table3_coco")["classes"], data("table3_coco")["shots"]) == ("few_shot_8", 4)
    assert (data("table4_lvis")["classes"], data("table4_lvis")["shots"]) == ("few_shot_6", 10)
    assert (data("table5_mg")["shots"], len(data("table5_mg")["classes"])) == (4, 5)
    seven = data("table7_coco")
    assert (seven["classes"], seven["shots"], seven["max_rows"]) == ("base_65", None, 6000)
    assert (len(coco.BASE_65), len(coco.NOVEL_15), len({*coco.BASE_65, *coco.NOVEL_15})) == (65, 15, 80)
    assert data("table8_lvis")["classes"] == "rare_13"
    assert len(lvis.RARE_13) == 13
    assert (data("shapes_open_vocabulary")["categories"], data("shapes_open_vocabulary")["classes"]) == (
        "colour_and_kind", "base_combinations",
    )  # fmt: skip
    assert len(shapes.BASE_12) == 12


@pytest.mark.parametrize(
    ("name", "overlay"),
    [(name, "sft") for name in PUBLISHED] + [("table3_coco", "sft_as_published")] + [(n, "shapes_sft") for n in SHAPES],
)
def test_the_supervised_baseline_changes_the_method_and_nothing_else(name, overlay):
    plain, config = parsed(name), parsed(name, overlay)
    model, stated = config["model"]["init_args"], parsed_model(overlay)
    assert config["model"]["class_path"] == "rft_lightning.SFTModule"
    assert model["policy"] == plain["model"]["init_args"]["policy"]
    unstated = set(model) - set(stated) - {"policy"}
    assert not unstated, f"{overlay} must state {sorted(unstated)}: they would be taken from the recipe below it"
    if overlay == "sft_as_published":
        assert (model["lora"], model["warmup_steps"], model["with_thought"]) == ({"r": 8, "lora_alpha": 16}, 100, False)
        assert (config["trainer"]["max_steps"], config["data"]["init_args"]["batch_size"]) == (200, 64)
        assert model["optimizer"]["init_args"]["weight_decay"] == 0.1
        return
    assert config["data"] == plain["data"]
    assert config["trainer"] == plain["trainer"]
    assert config["seed_everything"] == plain["seed_everything"]
    same = ("schedule", "warmup_steps", "lora", "freeze", "max_grad_norm", "dtype", "micro_batch_prompts")
    assert {key: model[key] for key in same} == {key: plain["model"]["init_args"][key] for key in same}


def parsed_model(overlay: str) -> dict[str, Any]:
    """The model arguments that an overlay states, those of the file it starts from included."""
    content = yaml.safe_load(Path(file(overlay)).read_text(encoding="utf-8"))
    below = parsed_model(Path(content["config"]).stem) if "config" in content else {}
    return {**below, **content["model"]["init_args"]}


# That they run --------------------------------------------------------------------------------------------------------


def write_flowers(root: Path) -> dict[str, Any]:
    classification.write_flowers(root)
    classification.write_coop_flowers(root)
    return {}


def write_cars(root: Path) -> dict[str, Any]:
    classification.write_car_ims(root)
    return {"data.val_shots": 1}


def write_pets(root: Path) -> dict[str, Any]:
    classification.write_pets(root)
    return {"data.val_shots": 1}


def write_mg(root: Path) -> dict[str, Any]:
    detection.write_voc(root)
    return {"data.classes": json.dumps(detection.NAMES), "data.shots": 1}


def write_eight(root: Path) -> dict[str, Any]:
    for split in ("train2017", "val2017"):
        write_coco(root, split)
    return {"data.classes": "[cat,dog,bus]"}


def write_rare(root: Path) -> dict[str, Any]:
    write_lvis(root)
    return {"data.classes": "[die,stepladder,papaya]"}


def write_lisa(root: Path) -> dict[str, Any]:
    write_reasonseg(root)
    return {}


def write_aircraft(root: Path) -> dict[str, Any]:
    classification.write_aircraft(root)
    return {}


# Recipe -> what writes a fake of its data, and says what has to be overridden for it.
FAKES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "table2_flowers102": write_flowers,
    "table2_pets37": write_pets,
    "table2_fgvc_aircraft": write_aircraft,
    "table2_cars196": write_cars,
    "table3_coco": write_eight,
    "table4_lvis": write_rare,
    "table5_mg": write_mg,
    "table6_lisa": write_lisa,
    "table6_lisa_all_targets": write_lisa,
    "table7_coco": write_eight,
    "table8_lvis": write_rare,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_policy):
    """recipe(name, **settings) -> the words that name a recipe and make it small, on a fake of its data."""
    sam = build_baseline("sam", tmp_path_factory.mktemp("sam") / "sam")

    @cache
    def settled(name: str) -> tuple[str, dict[str, Any]]:
        if name not in FAKES:
            return file(name), {"data.test_size": 24, "data.shots": 2}
        root = tmp_path_factory.mktemp(name)
        settings = {"data.root": root, **FAKES[name](root), **SMALL_PICTURES}
        return (with_segmenter(name, sam, root) if "table6" in name else file(name)), settings

    def arguments(name: str, *overlays: str, **settings: Any) -> list[str]:
        path, of_fake = settled(name)
        files = [word for each in (path, *map(file, overlays)) for word in ("-c", each)]
        given = {"model.policy": tiny_policy, **SMALL, **of_fake, **settings}
        if overlays:
            del given["model.group_size"]
        return [*files, *words(given)]

    return arguments


def with_segmenter(name: str, checkpoint: str, folder: Path) -> str:
    """A recipe with another SAM, whose name stands in a list, where no argument reaches it."""
    callback = {"class_path": "rft_lightning.callbacks.GroundingMaskIoU", "init_args": {"segmenter": checkpoint}}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({"config": file(name), "trainer": {"callbacks+": [callback]}}))
    return str(path)


def fit(arguments: list[str], run: Path) -> Path:
    """Train; the run's own folder below its logger's."""
    main(["fit", *arguments, "--run_dir", str(run)])
    return run / "csv/version_0"


def evaluate(arguments: list[str], output: Path) -> dict[str, Any]:
    main(["evaluate", *arguments, "--output_dir", str(output)])
    return json.loads((output / "metrics.json").read_text())


def losses(run: Path) -> list[float]:
    rows = csv.DictReader((run / "metrics.csv").open())
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


@pytest.mark.parametrize("name", [name for name in RECIPES if name != EVALUATION_ONLY])
def test_a_recipe_trains_by_both_methods(name, recipe, tmp_path):
    run = fit(recipe(name), tmp_path / "rft")
    assert (run / "checkpoints/last.ckpt").exists()
    assert (run / "policy/model.safetensors").exists()
    supervised = losses(fit(recipe(name, "sft" if name in FAKES else "shapes_sft"), tmp_path / "sft"))
    assert len(supervised) == 2
    assert supervised[0] > 1, "cross-entropy of an untrained policy"


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("table2_flowers102", "accuracy"),
        ("table5_mg", "map"),
        ("table6_lisa", "mask_iou_mean"),
        ("table6_lisa_all_targets", "mask_iou_cumulative"),
        ("shapes_grounding", "box_iou_mean"),
    ],
)
def test_a_recipe_is_evaluated_without_training(name, metric, recipe, tmp_path):
    scored = evaluate(recipe(name), tmp_path / "scores")
    assert scored["metrics"][metric] >= 0
    assert (scored["experiment"]["method"], scored["experiment"]["seed"]) == ("zero-shot", None)


# What the paper compares ----------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch):
    """The training batches, by the class of the module that trained on them, one list per run."""
    seen: dict[str, list[PromptBatch]] = {}
    for kind in (GRPOModule, SFTModule):
        step = kind.training_step

        def recorded(self, batch, batch_idx, step=step):
            seen.setdefault(type(self).__name__, []).append(batch)
            return step(self, batch, batch_idx)

        monkeypatch.setattr(kind, "training_step", recorded)
    return seen


def shown(batch: PromptBatch) -> list[tuple[str, int, str]]:
    return [(str(sample.id), sample.occurrence, sample.question) for sample in batch.samples]


@pytest.mark.parametrize("name", ["table3_coco", "table2_pets37", "shapes_open_vocabulary"])
def test_both_methods_see_the_same_rows_in_the_same_order_with_equal_prompts(name, recipe, batches, tmp_path):
    settings = {"seed_everything": 3, "trainer.max_steps": 5, "model.max_completion_length": 1}
    fit(recipe(name, **settings), tmp_path / "rft")
    fit(recipe(name, "shapes_sft" if name in SHAPES else "sft", **settings), tmp_path / "sft")
    pairs = list(zip(batches["GRPOModule"], batches["SFTModule"], strict=True))
    assert len(pairs) == 5
    for one, other in pairs:
        assert shown(one) == shown(other)
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.attention_mask, other.attention_mask)
        assert torch.equal(one.vision["pixel_values"], other.vision["pixel_values"])
        assert [s.target.solution_text for s in one.samples] == [s.target.solution_text for s in other.samples]
    fit(recipe(name, **settings | {"seed_everything": 4}), tmp_path / "other")
    first, second = batches["GRPOModule"][:5], batches["GRPOModule"][5:]
    assert [shown(batch) for batch in first] != [shown(batch) for batch in second], "the seed decides"


def test_reinforcement_starts_from_what_supervision_left(recipe, tiny_policy, tmp_path):
    supervised = fit(recipe("table3_coco", "sft", **{"model.optimizer.lr": 1e-3}), tmp_path / "sft") / "policy"
    # At a learning rate of 0 the policy that is written is the one that training started from.
    tuned = fit(recipe("table3_coco", **{"model.policy": supervised, "model.optimizer.lr": 0}), tmp_path / "rft")
    start, left, end = (
        load_file(f"{folder}/model.safetensors") for folder in (tiny_policy, supervised, tuned / "policy")
    )
    assert left.keys() == end.keys()
    assert all(torch.equal(left[key], end[key]) for key in left)
    assert any(not torch.equal(left[key], start[key]) for key in left.keys() & start.keys())
    chain = recipe("table3_coco", **{"model.policy": supervised, "ckpt_path": tuned / "checkpoints/last.ckpt"})
    experiment = evaluate(chain, tmp_path / "scores")["experiment"]
    assert (experiment["method"], experiment["policy"]) == ("SFT then RFT", tiny_policy)


def test_the_published_baseline_trains_adapters(recipe, tmp_path):
    run = fit(recipe("table3_coco", "sft_as_published"), tmp_path / "sft")
    assert len(losses(run)) == 2
    scored = evaluate(
        recipe("table3_coco", "sft_as_published", ckpt_path=run / "checkpoints/last.ckpt"), tmp_path / "scores"
    )
    assert (scored["experiment"]["tuning"], scored["experiment"]["thought"]) == ("lora", False)


def test_one_policy_is_trained_on_base_classes_and_asked_for_all_of_coco_and_for_lvis(recipe, tmp_path):
    run = fit(recipe("table7_coco", **{"data.classes": "[cat,dog]"}), tmp_path / "run")
    last = run / "checkpoints/last.ckpt"
    scored = evaluate(recipe("table7_coco", ckpt_path=last, **{"data.classes": "null"}), tmp_path / "coco")
    assert {"cat", "dog", "bus", "person"} <= set(scored["per_class"])
    scored = evaluate(recipe(EVALUATION_ONLY, **{"model.policy": run / "policy"}), tmp_path / "lvis")
    assert set(scored["per_class"]) == {"die", "stepladder", "papaya"}
    assert scored["experiment"]["method"] == "RFT"


def test_one_evaluation_of_shapes_tells_base_and_novel_combinations_apart(recipe, tmp_path):
    settings = {"data.classes": "null", "data.test_size": 120}
    scored = evaluate(recipe("shapes_open_vocabulary", **settings), tmp_path / "scores")
    assert set(scored["per_class"]) == {*shapes.BASE_12, *shapes.NOVEL_4}
