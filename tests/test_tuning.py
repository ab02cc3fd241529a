"""Optimisers and kinds of adapters that a run may name, the overlays of configs/tuning, and what is refused and why."""

import contextlib
import io
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from rft_lightning import SFTModule
from rft_lightning.callbacks import RolloutCheckpoint
from rft_lightning.checkpointing import export_policy
from rft_lightning.cli import main
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import ConfigConflictError
from rft_lightning.memory import PolicySizes, Setup
from rft_lightning.policy.adapters import save_adapters
from rft_lightning.policy.families import base_model
from rft_lightning.policy.loading import load_policy, load_processor
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.report.memory_table import published_config
from rft_lightning.sharding import FSDP2Strategy
from rft_lightning.trainer import check_trainer

ROOT = Path(__file__).parent.parent
CONFIGS, DOC = ROOT / "configs", ROOT / "docs" / "tuning.md"
LORA = {"r": 4, "lora_alpha": 8}


def data(policy):
    return ShapesDataModule(processor=policy, batch_size=2, train_size=6, val_size=2)


def sft(policy, **kwargs):
    return SFTModule(policy, **{"schedule": "constant", "seed": 0, **kwargs})


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


def adamw_8bit(parameters):
    return bnb.optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def batch(tiny_policy):
    samples = data(tiny_policy)
    return samples.encoder([samples.sample("train", i) for i in range(2)])


@torch.no_grad()
def logprobs(model, batch):
    ids = torch.randint(10, 200, (len(batch), 2, 6), generator=torch.Generator().manual_seed(0))
    return plain_group_logprobs(model, batch, ids, torch.ones_like(ids).bool())[0]


# 8-bit optimisers


def test_states_of_large_tensors_are_8_bit_and_the_update_is_that_of_adamw(tiny_policy, make_trainer):
    """Tensors below 4096 numbers keep float32 states."""
    moved = {}
    for name, optimizer in {"whole": adamw, "8bit": adamw_8bit}.items():
        module, trainer = sft(tiny_policy, optimizer=optimizer), make_trainer(3)
        trainer.fit(module, datamodule=data(tiny_policy))
        start = load_policy(tiny_policy).state_dict()
        moved[name] = {n: p.detach() - start[n] for n, p in module.policy.named_parameters()}
    states = trainer.optimizers[0].state
    assert len(states) == len(moved["8bit"])
    kinds = {parameter.numel() >= 4096: state["state1"].dtype for parameter, state in states.items()}
    assert kinds == {True: torch.uint8, False: torch.float32}
    for name, expected in moved["whole"].items():
        assert expected.norm() > 1e-3
        assert torch.cosine_similarity(moved["8bit"][name].flatten(), expected.flatten(), 0) > 0.95, name


@pytest.mark.parametrize("spelling", ["words", "file"])
def test_an_8_bit_optimiser_is_named_on_the_command_line(tiny_policy, tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    Path("optimizer.yaml").write_text(
        "model: {init_args: {optimizer: {class_path: bitsandbytes.optim.AdamW8bit, init_args: {lr: 1.0e-3}}}}\n"
    )
    words = ["--model.optimizer", "bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr", "1e-3"]
    run = [
        "--config", str(CONFIGS / "quickstart.yaml"), "--model.policy", tiny_policy, "--model.group_size", "2",
        *(words if spelling == "words" else ["--config", "optimizer.yaml"]),
        "--model.max_completion_length", "4", "--data.batch_size", "2", "--data.shots", "2", "--data.val_size", "2",
        "--trainer.max_steps", "1", "--trainer.val_check_interval", "1",
    ]  # fmt: skip
    main(["fit", *run])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    assert state["param_groups"][0]["initial_lr"] == 1e-3
    held = [one["__bnb_optimizer_quant_state__"]["state1"].dtype for one in state["state"].values()]
    assert {torch.uint8, torch.float32} == set(held)


@pytest.mark.parametrize("lora", [None, {**LORA, "r": 64}])
def test_a_run_with_an_8_bit_optimiser_resumes_exactly(tiny_policy, make_trainer, tmp_path, lora):
    whole, first, rest = (sft(tiny_policy, optimizer=adamw_8bit, lora=lora) for _ in range(3))
    runs = make_trainer(4), make_trainer(2, callbacks=[RolloutCheckpoint(dirpath=str(tmp_path))]), make_trainer(4)
    runs[0].fit(whole, datamodule=data(tiny_policy))
    runs[1].fit(first, datamodule=data(tiny_policy))
    runs[2].fit(rest, datamodule=data(tiny_policy), ckpt_path=str(tmp_path / "last.ckpt"))
    for name, parameter in rest.policy.state_dict().items():
        assert torch.equal(parameter, whole.policy.state_dict()[name]), name
    expected, found = (run.optimizers[0].state_dict()["state"] for run in (runs[0], runs[2]))
    assert expected.keys() == found.keys()
    eight = 0
    for number, state in expected.items():
        assert state["step"] == found[number]["step"] == 4
        tensors, again = (one["__bnb_optimizer_quant_state__"] for one in (state, found[number]))
        eight += tensors["state1"].dtype == torch.uint8
        assert all(torch.equal(again[key], value) for key, value in tensors.items())
    assert eight


def test_one_that_is_sharded_is_refused_before_its_first_step(tiny_policy, make_trainer):
    module = sft(tiny_policy, optimizer=adamw_8bit)
    with pytest.raises(ConfigConflictError, match=r"bitsandbytes' AdamW8bit cannot.*fsdp2 shards.*torch.optim.AdamW"):
        make_trainer(1, strategy="fsdp2").fit(module, datamodule=data(tiny_policy))


# Kinds of adapters, from YAML


KINDS = {
    "dora": "{r: 4, use_dora: true}",
    "rslora": "{r: 4, lora_alpha: 8, use_rslora: true}",
    "patterns": "{r: 4, rank_pattern: {q_proj: 2}, alpha_pattern: {v_proj: 16}, target_modules: [q_proj, v_proj]}",
    "regex": "{r: 4, target_modules: '.*language_model.*\\.mlp\\..*_proj'}",
    "projector": "{r: 4, target_modules: [q_proj], modules_to_save: [merger]}",
    "head": "{r: 4, target_modules: [q_proj], modules_to_save: [lm_head]}",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_adapter_loads_trains_and_exports(tiny_policy, make_trainer, tmp_path, batch, kind):
    module = sft(tiny_policy, lora=yaml.safe_load(KINDS[kind]), optimizer=adamw)
    make_trainer(3).fit(module, datamodule=data(tiny_policy))
    policy = module.policy.eval()
    fresh = dict(sft(tiny_policy, lora=module.lora)._load().named_parameters())
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(not torch.equal(parameter, fresh[name]) for name, parameter in trained.items())
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    if kind == "patterns":
        ranks = {name: p.shape[0] for name, p in trained.items() if "lora_A" in name}
        assert {2, 4} == set(ranks.values())
        assert all((rank == 2) == ("q_proj" in name) for name, rank in ranks.items())
    if kind == "regex":
        assert names == {"gate_proj", "up_proj", "down_proj"}
    if kind in ("projector", "head"):
        assert any("modules_to_save" in name for name in trained)
    export_policy(policy, load_processor(tiny_policy), tmp_path / "policy")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "policy")
    found, expected = logprobs(exported, batch), logprobs(policy, batch)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (expected - logprobs(load_policy(tiny_policy).eval(), batch)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "lora", [LORA, {"r": 4, "use_dora": True, "modules_to_save": ["merger"]}], ids=["lora", "more"]
)
def test_adapters_written_alone_are_loaded_by_peft(tiny_policy, make_trainer, tmp_path, batch, lora):
    from peft import PeftModel

    module = sft(tiny_policy, lora=lora, optimizer=adamw)
    make_trainer(2).fit(module, datamodule=data(tiny_policy))
    expected = logprobs(module.policy.eval(), batch)
    for base, named in ((None, tiny_policy), ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct")):
        assert save_adapters(module.policy, tmp_path / "adapters", base=base) == tmp_path / "adapters"
        config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == named
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()
    start = AutoModelForImageTextToText.from_pretrained(tiny_policy)
    loaded = PeftModel.from_pretrained(start, tmp_path / "adapters").eval()
    assert torch.equal(logprobs(loaded, batch), expected)
    assert (expected - logprobs(base_model(load_policy(tiny_policy)), batch)).abs().max() > 1e-2


def test_a_policy_without_adapters_has_none_to_write(tiny_policy, tmp_path):
    with pytest.raises(ConfigConflictError, match=r"no adapters.*without model.lora"):
        save_adapters(load_policy(tiny_policy), tmp_path)


# Overlays


@cache
def parsed(*files: str) -> dict:
    """The configuration as the command line sees it."""
    out = io.StringIO()
    words = [word for file in files for word in ("--config", str(CONFIGS / file))]
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["fit", *words, "--print_config"])
    return yaml.safe_load(out.getvalue())


def changed(base: Any, over: Any) -> Any:
    """`over` on top of `base`, key by key; peft's settings are one value."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return {**base, **{key: over[key] if key == "lora" else changed(base.get(key), over[key]) for key in over}}


TASKS = sorted(file.name for file in CONFIGS.glob("*.yaml") if file.name != "base.yaml")
OVERLAYS = sorted(f"tuning/{file.name}" for file in (CONFIGS / "tuning").glob("*.yaml"))


@pytest.mark.parametrize("files", [["coco.yaml", overlay] for overlay in OVERLAYS] + [[t, *OVERLAYS] for t in TASKS])
def test_overlays_set_what_they_say_and_nothing_else(files):
    """Each alone on one task, and all together on every task."""
    expected = parsed(files[0])
    for overlay in files[1:]:
        expected = changed(expected, yaml.safe_load((CONFIGS / overlay).read_text(encoding="utf-8")))
    assert parsed(*files) == expected


def test_overlays_go_on_top_of_supervised_fine_tuning():
    files = ("coco.yaml", "method/sft.yaml", "tuning/lora.yaml", "tuning/qlora.yaml", "tuning/freeze_vision.yaml")
    model = parsed(*files)["model"]
    assert model["class_path"] == "rft_lightning.SFTModule"
    assert model["init_args"]["lora"] == {"r": 16, "lora_alpha": 32}
    assert model["init_args"]["quantize"] == "nf4"


def test_overlays_go_together():
    model = parsed("coco.yaml", "tuning/one_24gb_card.yaml", "tuning/qlora.yaml", "tuning/freeze_vision.yaml")["model"]
    settings = model["init_args"]
    assert (settings["quantize"], settings["freeze"]) == ("nf4", ["vision_tower"])
    assert settings["gradient_checkpointing"]
    assert settings["lora"] == {"r": 16, "lora_alpha": 32}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_trains_the_shipped_policy(overlay, tmp_path, monkeypatch):
    """On a CPU, with fewer and shorter answers."""
    monkeypatch.chdir(tmp_path)
    main([
        "fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(CONFIGS / overlay),
        "--model.group_size", "2", "--model.max_completion_length", "4", "--data.batch_size", "2", "--data.shots", "2",
        "--data.val_size", "2", "--trainer.max_steps", "1", "--trainer.val_check_interval", "1",
        "--trainer.num_sanity_val_steps", "0",
    ])  # fmt: skip
    assert (tmp_path / "runs" / "quickstart" / "policy" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("more", "stated"), [((), "in all"), (("tuning/qlora.yaml",), "on top of this file needs")])
def test_the_arithmetic_of_one_card_is_that_of_the_estimate(more, stated):
    text = (CONFIGS / "tuning/one_24gb_card.yaml").read_text(encoding="utf-8")
    config = parsed("coco.yaml", "tuning/one_24gb_card.yaml", *more)["model"]["init_args"]
    names = ("dtype", "lora", "quantize", "gradient_checkpointing", "rollout_prompts", "micro_batch_prompts")
    setup = Setup(**{name: config[name] for name in names}, mixed=True, group_size=8)
    needed = PolicySizes(published_config("Qwen2-VL-2B"), setup).memory().total / 2**30
    (number,) = re.findall(rf"{stated}\s+(\d+\.\d)", text)
    assert abs(needed - float(number)) < 0.06
    assert needed < 0.9 * 24


# The support matrix


def under(strategy, **kwargs):
    """A check of a Trainer with this strategy."""
    settings = {"precision": "32-true", "accumulate_grad_batches": 1, "gradient_clip_val": None}
    check_trainer(SimpleNamespace(strategy=strategy, **settings), **kwargs)


REFUSALS = {
    ("QLoRA", "FSDP2"): lambda: under(FSDP2Strategy(), quantize="nf4"),
    ("QLoRA", "HSDP"): lambda: under(FSDP2Strategy(shard_size=2), quantize="nf4"),
}


def matrix() -> dict[tuple[str, str], str]:
    """The cells of the table in docs/tuning.md by row and column."""
    rows = [line.strip("| ").split(" | ") for line in DOC.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    first = next(number for number, row in enumerate(rows) if "FSDP2" in row)
    columns, body = rows[first], rows[first + 2 :]
    return {(row[0], column): cell for row in body for column, cell in zip(columns[1:], row[1:], strict=True)}


def test_the_matrix_has_every_cell_and_says_one_of_three_things():
    cells = matrix()
    assert {column for _, column in cells} == {"one device", "DDP", "FSDP2", "HSDP"}
    for place, cell in cells.items():
        assert re.match(r"tested|refused: |not verified: |does not apply", cell), (place, cell)


def test_what_the_matrix_calls_refused_is_refused_for_that_reason(tiny_policy, make_trainer):
    def sharded(**options):
        module = sft(tiny_policy, optimizer=adamw_8bit)
        make_trainer(1, strategy=FSDP2Strategy(**options)).fit(module, datamodule=data(tiny_policy))

    refusals = {
        **REFUSALS,
        ("8-bit optimiser", "FSDP2"): sharded,
        ("8-bit optimiser", "HSDP"): lambda: sharded(shard_size=1),
    }
    refused = {place: cell.removeprefix("refused: ") for place, cell in matrix().items() if cell.startswith("refused")}
    assert refused.keys() == refusals.keys()
    for place, reason in refused.items():
        with pytest.raises(ConfigConflictError, match=re.escape(reason)):
            refusals[place]()


def test_the_tests_that_the_matrix_names_exist():
    named = set(re.findall(r"`(test_\w+)`", DOC.read_text(encoding="utf-8")))
    assert named
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in named)
