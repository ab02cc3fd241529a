"""What of a policy is trained: LoRA adapters, frozen parts, gradient checkpointing, and what follows from them."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from rft_lightning import GRPOModule, GRPOObjective
from rft_lightning.checkpointing import export_policy
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.families import FAMILIES, PARTS, base_model, part_parameters
from rft_lightning.policy.loading import checkpointing_active, evaluating, frozen_copy, load_policy
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.tasks import DetectionTask

LORA = {"r": 4, "lora_alpha": 8}


def length_reward(answer, target, *, rules, step):
    """A reward that a random policy varies in."""
    return (len(answer.text) % 17) / 17


def data(tiny_policy):
    task = DetectionTask(rewards={"length": length_reward})
    return ShapesDataModule(processor=tiny_policy, batch_size=2, train_size=6, val_size=2, task=task)


def grpo(tiny_policy, **kwargs):
    settings = {"group_size": 3, "max_completion_length": 6, "schedule": "linear", "lora": LORA}
    settings["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    return GRPOModule(tiny_policy, **{**settings, **kwargs})


def grow_adapters(model):
    """Adapters start as zero; make them matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)


@pytest.fixture(scope="module")
def batch(tiny_policy):
    samples = data(tiny_policy)
    return samples.encoder([samples.sample("train", i) for i in range(2)])


def logprobs(model, batch):
    ids = torch.randint(10, 200, (len(batch), 2, 6), generator=torch.Generator().manual_seed(0))
    return plain_group_logprobs(model, batch, ids, torch.ones_like(ids).bool())[0]


def gradients(model, batch):
    """By name, of the parameters that have one."""
    model.zero_grad()
    logprobs(model, batch).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Parts


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_parameter_of_every_family_belongs_to_one_part(family, family_folder):
    model = load_policy(family_folder(family))
    parts = {part: part_parameters(model, part) for part in PARTS}
    names = [name for part in parts.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert model.get_output_embeddings().weight is parts["language_model"]["lm_head.weight"]
    assert all("language_model" in name or name == "lm_head.weight" for name in parts["language_model"])
    # No family calls any of its tower's blocks a merger or projector, and none its projector otherwise.
    projector = [name for name in names if any(word in name for word in ("merger", "multi_modal_projector", "newline"))]
    assert sorted(projector) == sorted(parts["projector"])
    assert all(parts.values())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_adapters_go_to_all_linear_layers_that_are_not_frozen(family, family_folder):
    model = load_policy(family_folder(family))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    tower = {name for name in linear if f"{name}.weight" in part_parameters(model, "vision_tower")}
    assert tower
    for freeze, expected in ((), linear), (("vision_tower",), linear - tower):
        adapted = load_policy(family_folder(family), lora=LORA, freeze=freeze)
        trained = {name.split(".lora_")[0] for name, p in base_model(adapted).named_parameters() if p.requires_grad}
        assert trained == expected


def test_frozen_parts_get_no_gradient_and_all_others_do(tiny_policy, batch):
    model = load_policy(tiny_policy, freeze=["vision_tower", "language_model"])
    assert gradients(model, batch).keys() == part_parameters(model, "projector").keys()
    assert all(name.startswith("model.visual.merger.") for name in part_parameters(model, "projector"))
    model = load_policy(tiny_policy, freeze=["projector"])
    expected = {name for name, _ in model.named_parameters()} - part_parameters(model, "projector").keys()
    assert gradients(model, batch).keys() == expected


def test_tied_embeddings_are_frozen_with_the_language_model(tiny_policy):
    model = load_policy(tiny_policy, freeze=["language_model"])
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert not model.lm_head.weight.requires_grad


def test_the_optimiser_holds_what_is_trained_and_nothing_else(tiny_policy, make_trainer):
    module = grpo(tiny_policy, freeze=["vision_tower"])
    trainer = make_trainer(1)
    trainer.fit(module, datamodule=data(tiny_policy))
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    adapters = {id(p) for name, p in module.policy.named_parameters() if "lora_" in name}
    assert held == adapters
    assert not any("visual.blocks" in name for name, _ in module.policy.named_parameters() if "lora_" in name)


# LoRA


def test_adapters_are_trainable_float32_on_frozen_weights_in_any_dtype(tiny_policy):
    model = load_policy(tiny_policy, dtype="bfloat16", lora=LORA)
    assert model.training
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        assert parameter.requires_grad == adapter, name
        assert parameter.dtype == (torch.float32 if adapter else torch.bfloat16), name


def test_a_config_object_is_not_changed_and_lists_of_modules_are_obeyed(tiny_policy):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"], exclude_modules=r".*layers\.0\..*")
    before = copy.deepcopy(config)
    model = load_policy(tiny_policy, lora=config, freeze=["vision_tower"])
    assert config == before
    adapted = {name.split(".lora_")[0] for name, _ in base_model(model).named_parameters() if ".lora_" in name}
    assert adapted == {f"model.language_model.layers.1.self_attn.{name}_proj" for name in "qv"}


def test_excluded_modules_may_be_a_list(tiny_policy):
    model = load_policy(tiny_policy, lora={"exclude_modules": ["gate_proj"]}, freeze=["projector"])
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert any("up_proj" in name for name in names)
    assert any("visual.blocks" in name for name in names)
    assert not any("gate_proj" in name or "merger" in name for name in names)


def test_new_adapters_follow_the_seed_and_leave_the_global_noise_alone(tiny_policy):
    def start(seed):
        module = grpo(tiny_policy, seed=seed)
        state = torch.random.get_rng_state()
        module.configure_model()
        assert torch.equal(state, torch.random.get_rng_state())
        return torch.cat([p.detach().flatten() for name, p in module.policy.named_parameters() if "lora_A" in name])

    first = start(0)
    torch.rand(3)
    assert torch.equal(first, start(0))
    assert not torch.equal(first, start(1))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_reference_model_is_the_base_model_before_and_after_training(tiny_policy, make_trainer, batch, dropout):
    """Dropout, which training uses, would show as noise in the reference model's log-probs."""
    base = frozen_copy(load_policy(tiny_policy))
    module = grpo(tiny_policy, lora={**LORA, "lora_dropout": dropout})
    module.configure_model()
    expected = logprobs(base, batch)

    def check():
        with module.reference_model() as reference:
            found = logprobs(reference, batch)
            assert not found.requires_grad
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert all(submodule.training for submodule in module.policy.modules())

    start = {name: parameter.detach().clone() for name, parameter in module.policy.named_parameters()}
    check()
    make_trainer(3).fit(module, datamodule=data(tiny_policy))
    assert module._reference == ()
    moved = [name for name, parameter in module.policy.named_parameters() if not torch.equal(start[name], parameter)]
    assert moved == [name for name in start if "lora_" in name]
    module.policy.train()
    check()
    assert (logprobs(module.policy.eval(), batch) - expected).abs().max() > 1e-2
    original = dict(base.named_parameters())
    for name, parameter in base_model(module.policy).named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, original[name.replace(".base_layer", "")]), name


def test_adapters_train_after_the_reference_model_was_used(tiny_policy, batch):
    """peft turns gradients of adapters off with the adapters."""
    module = grpo(tiny_policy)
    module.configure_model()
    before = gradients(module.policy, batch)
    with module.reference_model() as reference:
        logprobs(reference, batch)
    after = gradients(module.policy, batch)
    assert before.keys() == after.keys()
    assert all("lora_" in name for name in after)
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_kl_grows_from_zero_with_adapters_and_beta_zero_uses_no_reference(tiny_policy, make_trainer, monkeypatch):
    class Recording(GRPOModule):
        kl: list

        def update(self, *args):
            statistics = super().update(*args)
            self.kl = [*getattr(self, "kl", []), statistics.get("kl")]
            return statistics

    def run(beta):
        settings = {"group_size": 3, "max_completion_length": 6, "schedule": "constant", "lora": LORA}
        settings["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
        module = Recording(tiny_policy, objective=GRPOObjective(beta=beta), **settings)
        make_trainer(3).fit(module, datamodule=data(tiny_policy))
        return module.kl

    kl = run(0.04)
    assert abs(kl[0]) < 1e-9
    assert kl[2] > 1e-6
    monkeypatch.setattr(GRPOModule, "reference_model", None)
    assert run(0.0) == [None] * 3


def test_an_exported_adapted_policy_is_a_plain_model_with_merged_weights(tiny_policy, batch, tmp_path):
    module = grpo(tiny_policy)
    module.configure_model()
    grow_adapters(module.policy)
    before = {name: parameter.detach().clone() for name, parameter in module.policy.named_parameters()}
    export_policy(module.policy, module.processor, tmp_path / "policy")
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not list((tmp_path / "policy").glob("adapter*"))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.vision}
    with torch.no_grad():
        expected, found = module.policy.eval()(**inputs).logits, loaded(**inputs).logits
        start = load_policy(tiny_policy).eval()(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (start - expected).abs().max() > 0.1
    after = dict(module.policy.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_of_adapters_ends_like_an_uninterrupted_one(tiny_policy, make_trainer, tmp_path):
    from rft_lightning.callbacks import RolloutCheckpoint

    class Stop(Exception):
        pass

    class StopAfterTwo(RolloutCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 2:
                raise Stop

    # Dropout too: what a step draws follows from seed and step.
    settings = {"lora": {**LORA, "lora_dropout": 0.2}, "freeze": ["vision_tower"]}
    whole, interrupted, resumed = (grpo(tiny_policy, **settings) for _ in range(3))
    make_trainer(5).fit(whole, datamodule=data(tiny_policy))
    with pytest.raises(Stop):
        make_trainer(5, callbacks=[StopAfterTwo(every_n_steps=1, dirpath=str(tmp_path))]).fit(
            interrupted, datamodule=data(tiny_policy)
        )
    last = str(tmp_path / "last.ckpt")
    make_trainer(5).fit(resumed, datamodule=data(tiny_policy), ckpt_path=last)
    halfway = interrupted.policy.state_dict()
    moved = 0
    ends = whole.policy.state_dict()
    for name, ours in resumed.policy.state_dict().items():
        assert torch.equal(ours, ends[name]), name
        moved += not torch.equal(ours, halfway[name])
    assert moved == sum("lora_" in name for name in halfway)
    sampler = grpo(tiny_policy, **settings)
    sampler.load_for_sampling(last)
    for name, value in sampler.policy.state_dict().items():
        assert torch.equal(value, halfway[name]), name


def test_adapters_train_validate_and_export_through_the_command_line(tiny_policy, tmp_path, monkeypatch):
    from rft_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    model = ["--model", "GRPOModule", "--model.policy", tiny_policy, "--model.lora", "{r: 2, target_modules: [q_proj]}"]
    model += ["--model.freeze", "[vision_tower]", "--model.group_size", "2", "--model.max_completion_length", "4"]
    model += ["--model.gradient_checkpointing", "true", "--model.schedule", "constant"]
    run = ["--data", "ShapesDataModule", "--data.train_size", "4", "--data.val_size", "2", "--data.batch_size", "2"]
    run += ["--trainer.accelerator", "cpu", "--trainer.use_distributed_sampler", "false", "--trainer.logger", "false"]
    run += ["--trainer.callbacks", "RolloutCheckpoint", "--trainer.callbacks.dirpath", "."]
    main(["fit", *model, *run, "--trainer.max_steps", "1"])
    main(["validate", *model, *run, "--ckpt_path", "last.ckpt"])
    main(["export", "last.ckpt", "--output_dir", "policy"])
    loaded, start = AutoModelForImageTextToText.from_pretrained("policy"), load_policy(tiny_policy)
    assert loaded.state_dict().keys() == start.state_dict().keys()


def test_the_sft_overlay_takes_the_tuning_modes(tiny_policy, capsys):
    from rft_lightning.cli import main

    configs = Path(__file__).parent.parent / "configs"
    with pytest.raises(SystemExit):
        main([
            "fit", "--config", str(configs / "coco.yaml"), "--config", str(configs / "method" / "sft.yaml"),
            "--model.lora", "{r: 8}", "--model.freeze", "[vision_tower]", "--print_config",
        ])  # fmt: skip
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["class_path"] == "rft_lightning.SFTModule"
    assert model["init_args"]["lora"] == {"r": 8}
    assert model["init_args"]["freeze"] == ["vision_tower"]


def test_peft_is_imported_only_for_adapters():
    code = "import sys, rft_lightning, rft_lightning.policy.loading; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Gradient checkpointing


@pytest.mark.parametrize("lora", [None, LORA])
def test_checkpointed_blocks_are_recomputed_with_the_same_gradients(tiny_policy, batch, lora):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_policy(tiny_policy, lora=lora, gradient_checkpointing=True)
    kept = load_policy(tiny_policy, lora=lora)
    kept.load_state_dict(model.state_dict())
    for one in (model, kept):
        torch.manual_seed(0)
        grow_adapters(one)
    calls = []
    # Recomputation stops at the last tensor that backward needs, before the end of a block.
    base_model(model).model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("text"))
    base_model(model).model.visual.blocks[0].attn.register_forward_hook(lambda *_: calls.append("vision"))
    found = gradients(model, batch)
    assert sorted(calls) == ["text", "text", "vision", "vision"]
    expected = gradients(kept, batch)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5, msg=name)
    calls.clear()
    model.eval()
    logprobs(model, batch).sum().backward()
    assert sorted(calls) == ["text", "vision"]


@pytest.mark.parametrize("lora", [None, LORA])
def test_checkpointing_active_tells_of_the_present_mode(tiny_policy, lora):
    model = load_policy(tiny_policy, lora=lora, gradient_checkpointing=True)
    assert checkpointing_active(model)
    assert checkpointing_active(base_model(model))
    assert not checkpointing_active(model.eval())
    assert checkpointing_active(model.train())
    assert not checkpointing_active(load_policy(tiny_policy, lora=lora))


def test_checkpointing_under_the_older_name_of_transformers(tiny_policy):
    from rft_lightning.policy.loading import enable_checkpointing

    class Older(torch.nn.Module):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            self.kwargs = gradient_checkpointing_kwargs

    model = Older()
    enable_checkpointing(model)
    assert model.kwargs == {"use_reentrant": False}


def test_a_run_with_checkpointing_makes_the_same_update(tiny_policy, make_trainer):
    def run(checkpointing):
        module = grpo(tiny_policy, gradient_checkpointing=checkpointing)
        make_trainer(2).fit(module, datamodule=data(tiny_policy))
        return torch.cat([p.detach().flatten() for name, p in module.policy.named_parameters() if "lora_B" in name])

    with_it, without = run(True), run(False)
    assert without.abs().max() > 1e-3
    torch.testing.assert_close(with_it, without, atol=1e-4, rtol=0)


# Errors


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": ["tower"]}, r"vision_tower, projector, language_model, found \['tower'\]"),
        ({"freeze": "vision_tower"}, "list of the parts"),
        ({"freeze": list(PARTS)}, "nothing to train"),
        ({"freeze": list(PARTS), "lora": LORA}, "nothing to train"),
        ({"lora": {"target_module": "qkv"}}, "no field 'target_module'; did you mean target_modules"),
        ({"lora": {"xyz": 8}}, "no field 'xyz'; peft.LoraConfig has .*target_modules"),
        ({"lora": {"r": -1}}, "peft"),
        ({"lora": {"bias": "all"}}, "lora.bias is 'all', expected 'none'"),
        ({"lora": {"init_lora_weights": "pissa"}}, "lora.init_lora_weights is 'pissa'.*adapters off"),
        ({"lora": {"target_modules": ["nowhere"]}}, "peft.*nowhere"),
        ({"lora": {"target_modules": ["qkv"]}, "freeze": ["vision_tower"]}, "lora and freeze"),
        ({"lora": {"modules_to_save": ["merger"]}, "freeze": ["projector"]}, "frozen part projector"),
    ],
)
def test_errors(tiny_policy, settings, words):
    with pytest.raises(ConfigConflictError, match=words):
        load_policy(tiny_policy, **settings)


def test_parts_of_an_unknown_family_are_an_error_only_where_they_are_asked_for(tiny_policy, monkeypatch):
    monkeypatch.delitem(FAMILIES, "qwen2_vl")
    load_policy(tiny_policy)
    with pytest.raises(ConfigConflictError, match=r"'qwen2_vl' has its projector \(known: qwen2_5_vl, .*families.py"):
        load_policy(tiny_policy, freeze=["projector"])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_weight_is_refused_since_it_could_not_be_exported(tiny_policy, family_folder, target):
    with pytest.raises(ConfigConflictError, match=r"share one weight.*modules_to_save: \[lm_head\]"):
        load_policy(tiny_policy, lora={"target_modules": ["q_proj", target]})
    load_policy(family_folder("qwen3_vl"), lora={"target_modules": ["q_proj", target]})  # not tied


def test_eval_mode_of_a_part_survives(tiny_policy):
    model = load_policy(tiny_policy)
    model.model.visual.eval()
    with evaluating(model):
        assert not model.training
    assert model.training
    assert not model.model.visual.training
