"""Checkpoint folders: round trips, what is refused, and that export holds the weights once."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from rft_lightning import GRPOModule, SFTModule, sharded_files
from rft_lightning.callbacks import HFExport, RolloutCheckpoint
from rft_lightning.checkpointing import RECORD
from rft_lightning.cli import main
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.loading import load_policy
from rft_lightning.policy.tiny import build_tiny
from rft_lightning.tasks import DetectionTask

pytestmark = pytest.mark.usefixtures("leave_no_group")


def length_reward(answer, target, *, rules, step):
    return (len(answer.text) % 17) / 17


def fit(policy, folder, *, strategy="fsdp2", cls=GRPOModule, callbacks=(), **settings):
    """Two steps, under the strategy, on one process; leaves a checkpoint."""
    if cls is GRPOModule:
        settings |= {"group_size": 2, "max_completion_length": 5}
    module = cls(policy, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), schedule="constant", seed=0, **settings)
    data = ShapesDataModule(
        processor=policy, batch_size=2, train_size=6, val_size=4, task=DetectionTask(rewards={"length": length_reward})
    )
    trainer = Trainer(
        max_steps=2, max_epochs=-1, accelerator="cpu", devices=1, strategy=strategy, logger=False,
        callbacks=[RolloutCheckpoint(every_n_steps=1, dirpath=str(folder)), *callbacks],
        limit_val_batches=0, num_sanity_val_steps=0, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_policy):
    """A folder that `fit` wrote, and the same run's file."""
    folders = {}
    for strategy in ("fsdp2", "auto"):
        folder = tmp_path_factory.mktemp(strategy)
        fit(tiny_policy, folder, strategy=strategy)
        folders[strategy] = folder / "last.ckpt"
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return folders


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the folder, to harm."""
    return Path(shutil.copytree(trained["fsdp2"].resolve(), tmp_path / "copy.ckpt"))


def test_a_folder_holds_what_the_file_of_the_same_run_holds(trained):
    ours = sharded_files.load_checkpoint(trained["fsdp2"])
    theirs = torch.load(trained["auto"], weights_only=True)
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in theirs["state_dict"].items():
        assert (ours["state_dict"][name] - weight).abs().max() < 1e-6, name
    (ours_state,), (state,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert len(ours_state["state"]) == len(state["state"]) > 0
    names = ours_state["param_groups"][0]["params"]
    for number, slots in state["state"].items():
        for slot, value in slots.items():
            assert torch.allclose(ours_state["state"][names[number]][slot], value, atol=1e-6), (names[number], slot)
    assert ours.keys() == theirs.keys()
    assert ours["global_step"] == theirs["global_step"] == 2
    assert not any("reference" in name for name in ours["state_dict"])


def test_everything_of_a_folder_is_read_without_running_pickles(trained):
    folder = trained["fsdp2"]
    assert torch.load(folder / "meta.pt", weights_only=True)[RECORD]["settings"]["dtype"] == "float32"
    for file in folder.glob("*.distcp"):
        assert file.stat().st_size > 0


class Attack:
    def __reduce__(self):
        return os.system, ("echo attacked",)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Attack())), r"names posix\.system, which no"),
        (lambda folder: (folder / ".metadata").write_bytes(b"nonsense"), "is no index of a checkpoint"),
        (lambda folder: (folder / ".metadata").unlink(), "is no checkpoint folder, or one that was cut short"),
        (lambda folder: (folder / "meta.pt").unlink(), "is no checkpoint folder, or one that was cut short"),
        (lambda folder: (folder / "meta.pt").write_bytes(b"PK nothing"), r"meta\.pt cannot be read"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), r"cannot be read .*No such file.* Expected all of its"),
        (lambda folder: os.truncate(folder / "__0_0.distcp", 1000), "cannot be read"),
    ],
)  # fmt: skip
def test_a_harmed_folder_is_refused_by_name(copied, tmp_path, harm, words, capfd):
    harm(copied)
    with pytest.raises(CheckpointError, match=words):
        main(["export", str(copied), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert "attacked" not in capfd.readouterr().out


def test_a_folder_of_another_policy_is_refused_by_name(trained, tiny_policy):
    adapted = GRPOModule(tiny_policy, lora={"r": 4})
    with pytest.raises(
        CheckpointError, match=r"not of this policy: it lacks policy\.base_model.*and it holds policy\."
    ):
        adapted.load_for_sampling(str(trained["fsdp2"]))


def test_adapters_of_another_rank_are_refused_by_name(tiny_policy, tmp_path):
    for strategy in ("fsdp2", "auto"):
        fit(tiny_policy, tmp_path / strategy, strategy=strategy, lora={"r": 4})
        with pytest.raises(CheckpointError, match=r"lora_.*another rank|another rank.*lora_"):
            GRPOModule(tiny_policy, lora={"r": 2}).load_for_sampling(str(tmp_path / strategy / "last.ckpt"))


@pytest.mark.parametrize("strategy", ["fsdp2", "auto"])
def test_checkpoints_of_adapted_policies_hold_what_is_trained(tiny_policy, tmp_path, strategy):
    module = fit(
        tiny_policy,
        tmp_path,
        strategy=strategy,
        lora={"r": 4, "modules_to_save": ["merger"]},
        callbacks=[HFExport(tmp_path / "hf")],
    )
    path = tmp_path / "last.ckpt"
    saved = sharded_files.load_checkpoint(path) if path.is_dir() else torch.load(path, weights_only=True)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert saved["state_dict"].keys() == trained
    assert any("lora_A" in name for name in trained)
    assert any("modules_to_save" in name for name in trained)
    main(["export", str(path), "--output_dir", str(tmp_path / "out")])
    ours, theirs = load_policy(str(tmp_path / "out")).state_dict(), load_policy(str(tmp_path / "hf")).state_dict()
    start = load_policy(tiny_policy).state_dict()
    assert max((ours[name] - start[name]).abs().max().item() for name in start) > 1e-4
    assert all(torch.equal(ours[name], theirs[name]) for name in start)


def test_adapters_are_exported_alone(tiny_policy, tmp_path):
    import peft
    from transformers import AutoModelForImageTextToText

    fit(tiny_policy, tmp_path, lora={"r": 4})
    main(["export", str(tmp_path / "last.ckpt"), "--output_dir", str(tmp_path / "whole")])
    main(["export", str(tmp_path / "last.ckpt"), "--output_dir", str(tmp_path / "alone"), "--merge", "false"])
    assert json.loads((tmp_path / "alone/adapter_config.json").read_text())["base_model_name_or_path"] == tiny_policy
    base = AutoModelForImageTextToText.from_pretrained(tiny_policy, dtype=torch.float32)
    ours = peft.PeftModel.from_pretrained(base, tmp_path / "alone").merge_and_unload().state_dict()
    whole = load_policy(str(tmp_path / "whole")).state_dict()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_there_are_no_adapters_to_export(trained, tmp_path):
    with pytest.raises(ConfigConflictError, match="has no adapters: all weights were trained"):
        main(["export", str(trained["fsdp2"]), "--output_dir", str(tmp_path / "out"), "--merge", "false"])


@pytest.mark.parametrize("strategy", ["fsdp2", "auto"])
def test_the_card_says_what_the_policy_was_made_of(tiny_policy, tmp_path, strategy):
    fit(tiny_policy, tmp_path, strategy=strategy, cls=SFTModule, freeze=["vision_tower"])
    main(["export", str(tmp_path / "last.ckpt"), "--output_dir", str(tmp_path / "out")])
    card = (tmp_path / "out/README.md").read_text()
    for words in (
        "SFTModule, 2 optimiser steps",
        tiny_policy,
        "Frozen: vision_tower",
        "train: 6; SHA-256",
        "transformers 5",
    ):
        assert words in card, words
    rows = json.loads((tmp_path / "out/rft_rows.json").read_text())
    assert rows["train"]["ids"] == [sample.id for sample in ShapesDataModule(train_size=6).split("train")]


def test_the_card_holds_configuration_and_metrics(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quickstart = Path(__file__).parent.parent / "configs/quickstart.yaml"
    main([
        "fit", "--config", str(quickstart), "--model.policy", tiny_policy, "--model.max_completion_length", "4",
        "--data.batch_size", "2", "--data.shots", "2", "--data.val_size", "2", "--trainer.max_steps", "1",
        "--trainer.val_check_interval", "1",
    ])  # fmt: skip
    import yaml

    folder = tmp_path / "runs/quickstart/policy"
    config = yaml.safe_load((folder / "rft_config.yaml").read_text())
    assert config["model"]["init_args"]["group_size"] == 8
    assert config["data"]["init_args"]["shots"] == 2
    card = (folder / "README.md").read_text()
    assert "| val/box_iou_mean |" in card
    assert "max_completion_length: 4" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text"


MEASURE = """
import sys
import torch
import rft_lightning.policy_module, rft_lightning.export, transformers
from rft_lightning.cli import main
from rft_lightning.policy.loading import load_policy
load_policy("asset:tiny-qwen2-vl")  # what is imported on the way
def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak from here on
before = kilobytes("VmRSS")
main(["export", sys.argv[1], "--output_dir", sys.argv[2]])
print("peak", kilobytes("VmHWM") - before)
"""


@pytest.mark.distributed
def test_export_holds_the_weights_once(tmp_path):
    """Not the optimiser's two further numbers per weight, nor a second copy of the weights."""
    policy = str(build_tiny(tmp_path / "policy", width=512, layers=8))
    fit(policy, tmp_path, cls=SFTModule)
    weights = sum(parameter.numel() for parameter in load_policy(policy).parameters()) * 4
    assert weights > 90e6
    assert sum(file.stat().st_size for file in (tmp_path / "last.ckpt").iterdir()) > 2.9 * weights
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "last.ckpt"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    peak = 1024 * int(result.stdout.split("peak")[1])
    assert 0.9 * weights < peak < 1.6 * weights
