"""Optimisers and kinds of adapters that a run may name, what of them is float32, and the overlays of configs/tuning."""

import contextlib
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from rft_lightning import SFTModule
from rft_lightning.callbacks import RolloutCheckpoint
from rft_lightning.checkpointing import export_policy, merged
from rft_lightning.cli import main
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.adapters import save_adapters
from rft_lightning.policy.families import base_model
from rft_lightning.policy.loading import load_policy, load_processor
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.rollout import sample_groups
from rft_lightning.policy.shared_prefix import group_logprobs

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
SHARED = ("prefix_cache", "packed")
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


def test_the_base_of_adapters_written_alone_is_found_by_peft(tmp_path):
    """Of the policies shipped in this package, which peft knows nothing of, the files name the folder."""
    from peft import PeftConfig

    policy = load_policy("asset:tiny-qwen2-vl", lora={"r": 2})
    for base in ("asset:tiny-qwen2-vl", None):
        save_adapters(policy, tmp_path / "adapters", base=base)
        named = PeftConfig.from_pretrained(tmp_path / "adapters").base_model_name_or_path
        start = AutoModelForImageTextToText.from_pretrained(named).state_dict()
        assert all(torch.equal(start[name], value) for name, value in load_policy(named).state_dict().items())
    with pytest.raises(CheckpointError, match=r"No checkpoint folder at '/nowhere/policy'"):
        save_adapters(policy, tmp_path / "adapters", base="/nowhere/policy")


def test_a_policy_without_adapters_has_none_to_write(tiny_policy, tmp_path):
    with pytest.raises(ConfigConflictError, match=r"no adapters.*without model.lora"):
        save_adapters(load_policy(tiny_policy), tmp_path)


# What is trained is float32


WHOLE = {
    "projector": (["merger"], ["k_proj"]),
    "head": (["lm_head"], ["k_proj"]),
    "embeddings": (["embed_tokens"], ["k_proj"]),
    "tower": (["visual"], ["k_proj"]),
    "language model": (["language_model"], ["fc1"]),
    "parts of a layer": (["mlp", "input_layernorm"], ["k_proj"]),
}


def settings_of(kind):
    whole, adapted = WHOLE[kind]
    return {"dtype": "bfloat16", "lora": {"r": 4, "target_modules": adapted, "modules_to_save": whole}}


def trained_whole(policy):
    return {name: p for name, p in policy.named_parameters() if p.requires_grad and "modules_to_save" in name}


def routes(policy, folder, batch, checkpointing):
    """Log-probs by every layout, and texts by both engines."""
    ids = torch.randint(10, 200, (2, 2, 6), generator=torch.Generator().manual_seed(0))
    mask, layouts = torch.ones_like(ids).bool(), ("plain", "packed") if checkpointing else ("plain", *SHARED)
    found = [group_logprobs(policy, batch, ids, mask, forward=layout) for layout in layouts]
    options = {"tokenizer": load_processor(folder).tokenizer, "max_completion_length": 5, "seed": 0}
    texts = [sample_groups(policy, batch, 2, engine=engine, **options).texts for engine in ("native", "hf")]
    return torch.stack(found), texts


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", WHOLE)
def test_parts_trained_whole_are_float32_in_a_bfloat16_policy_and_compute_as_exported(
    tiny_policy, batch, kind, checkpointing
):
    settings = {**settings_of(kind), "gradient_checkpointing": checkpointing}
    policy, start = load_policy(tiny_policy, **settings), load_policy(tiny_policy, **{**settings, "lora": None})
    assert {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad} == {torch.float32}
    before, texts = routes(policy, tiny_policy, batch, checkpointing)
    expected = routes(start, tiny_policy, batch, checkpointing)
    assert torch.equal(before, expected[0])
    assert texts == expected[1]
    before.sum().backward()
    with torch.no_grad():
        for name, parameter in trained_whole(policy).items():
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.norm() > 0, name
            parameter.add_(torch.randn_like(parameter), alpha=1e-2)
        tuned = routes(policy, tiny_policy, batch, checkpointing)
        exported = merged(policy).train()
        assert type(exported) is type(start)
        assert {parameter.dtype for parameter in exported.parameters()} == {torch.bfloat16}
        assert [type(module) for module in exported.modules()] == [type(module) for module in start.modules()]
        found = routes(exported, tiny_policy, batch, checkpointing)
        assert torch.equal(found[0], tuned[0])
        assert found[1] == tuned[1]
        assert (tuned[0] - before).abs().max() > 1e-2
        with policy.disable_adapter():
            assert torch.equal(routes(policy, tiny_policy, batch, checkpointing)[0], before)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_updates_of_1e_5_are_not_rounded_away(tiny_policy, make_trainer, tmp_path, batch, quantize):
    """In bfloat16, less than one weight in ten would change."""
    settings = {**settings_of("projector"), "quantize": quantize}
    small = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)  # noqa: E731
    module = sft(tiny_policy, optimizer=small, **settings)
    start = {name: p.detach().clone() for name, p in trained_whole(module._load()).items()}
    callbacks = [RolloutCheckpoint(dirpath=str(tmp_path))]
    make_trainer(3, callbacks=callbacks).fit(module, datamodule=data(tiny_policy))
    tuned = trained_whole(module.policy)
    changed = torch.cat([(tuned[name] != value).flatten() for name, value in start.items()])
    assert changed.float().mean() > 0.95
    again = sft(tiny_policy, **settings)
    again.load_for_sampling(str(tmp_path / "last.ckpt"))
    assert all(torch.equal(value, tuned[name]) for name, value in trained_whole(again.policy).items())
    save_adapters(module.policy, tmp_path / "adapters")
    saved = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    exported = merged(module.policy)
    for name, value in tuned.items():
        name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        assert torch.equal(exported.get_parameter(name), value.bfloat16()), name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no")
@pytest.mark.parametrize(
    "more",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5]},
        {"use_dora": True},
    ],
    ids=["tied", "tokens", "dora"],
)
def test_so_is_all_else_that_is_trained(tiny_policy, batch, more):
    lora = {"r": 4, "target_modules": ["k_proj"], **more}
    policy = load_policy(tiny_policy, dtype="bfloat16", lora=lora)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    start = load_policy(tiny_policy, dtype="bfloat16")
    if "use_dora" not in more:  # whose norms are computed anew
        assert torch.equal(logprobs(policy, batch), logprobs(start, batch))
    assert {parameter.dtype for parameter in merged(policy).parameters()} == {torch.bfloat16}


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
