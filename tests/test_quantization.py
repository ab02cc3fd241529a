"""QLoRA: adapters on a policy in 4 bits, which is the same numbers in training, rollouts, reference and export."""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rft_lightning import GRPOModule
from rft_lightning.callbacks import HFExport, RolloutCheckpoint
from rft_lightning.cli import main
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.adapters import save_adapters
from rft_lightning.policy.decoding import SharedDecoder
from rft_lightning.policy.families import FAMILIES, base_model
from rft_lightning.policy.loading import load_config, load_policy
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.quantization import BLOCK, dequantized, is_quantized, kept_layers, quantized_layers
from rft_lightning.policy.shared_prefix import group_logprobs
from rft_lightning.policy.tiny import build_tiny, shapes_corpus
from rft_lightning.tasks import DetectionTask

LORA = {"r": 4, "lora_alpha": 8}
# The quantiles that the paper's Appendix E prints.
NF4_VALUES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def length_reward(answer, target, *, rules, step):
    """A reward that a random policy varies in."""
    return (len(answer.text) % 17) / 17


def data(policy):
    task = DetectionTask(rewards={"length": length_reward})
    return ShapesDataModule(processor=policy, batch_size=2, train_size=6, val_size=2, task=task)


def grpo(policy, **kwargs):
    settings = {"group_size": 3, "max_completion_length": 6, "lora": LORA, "quantize": "nf4", "seed": 0}
    settings["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    return GRPOModule(policy, **{**settings, **kwargs})


def quantized(policy, **kwargs):
    """A policy in 4 bits with adapters that matter."""
    model = load_policy(policy, **{"lora": LORA, "quantize": "nf4", **kwargs})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def batch(tiny_policy):
    samples = data(tiny_policy)
    return samples.encoder([samples.sample("train", i) for i in range(2)])


def completions(batch):
    ids = torch.randint(10, 200, (len(batch), 2, 6), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids).bool()


def logprobs(model, batch):
    return plain_group_logprobs(model, batch, *completions(batch))[0]


# What is quantised


@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_linear_layers_with_whole_blocks_but_the_head_are_quantised(family, family_folder):
    plain = load_policy(family_folder(family))
    linear = {name: m for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    expected = {name for name, m in linear.items() if m.in_features % 64 == 0 and name != "lm_head"}
    model = load_policy(family_folder(family), lora=LORA, quantize="nf4")
    assert {name.removesuffix(".base_layer") for name in quantized_layers(base_model(model))} == expected
    assert any("language_model" in name for name in expected)
    assert is_quantized(model)
    assert not is_quantized(plain)
    adapted = {name.split(".lora_")[0] for name, p in base_model(model).named_parameters() if p.requires_grad}
    assert adapted == linear.keys() - {"lm_head"}
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    state = plain.state_dict()
    for name, parameter in base_model(model).named_parameters():
        if parameter.dtype != torch.uint8 and not parameter.requires_grad:
            assert torch.equal(parameter, state[name.replace(".base_layer", "")]), name


def test_the_vision_tower_is_quantised_where_its_rows_are_whole_blocks(family_folder):
    config = load_config(family_folder("qwen2_vl"))
    config.vision_config.embed_dim = 64
    kept = kept_layers(config)
    assert not any("visual.blocks" in name for name in kept)
    assert "lm_head" in kept


def test_published_widths_are_whole_blocks():
    """Widths of Qwen2-VL-2B and -7B, Qwen2.5-VL and Qwen3-VL; see the note on 3420 in kept_layers."""
    widths = [1280, 5120, 1536, 8960, 3584, 18944, 2048, 11008, 1024, 4096, 4304 - 4304 % 64]
    assert all(width % BLOCK == 0 for width in widths)
    assert 3420 % BLOCK


def test_weights_are_those_of_the_paper(tiny_policy):
    """Nearest of the 16 values times the largest of the block, whose own 8-bit rounding is below 1 %."""
    original, model = load_policy(tiny_policy), base_model(load_policy(tiny_policy, lora=LORA, quantize="nf4"))
    whole = base_model(dequantized(load_policy(tiny_policy, lora=LORA, quantize="nf4")))
    names = [name.removesuffix(".base_layer") for name in quantized_layers(model)]
    for name in names:
        blocks = original.get_submodule(name).weight.detach().reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        expected = NF4_VALUES[(blocks / scale).unsqueeze(-1).sub(NF4_VALUES).abs().argmin(-1)] * scale
        found = whole.get_submodule(name).base_layer.weight.detach().reshape(-1, 64)
        assert ((found - expected).abs() / scale).max() < 0.03, name
        layer = model.get_submodule(name).base_layer
        x = torch.randn(3, layer.in_features)
        bias = None if layer.bias is None else layer.bias
        by_hand = torch.nn.functional.linear(x, found.view(layer.out_features, -1), bias)
        torch.testing.assert_close(layer(x), by_hand, atol=1e-5, rtol=1e-5)


def test_memory_of_a_layer_is_a_little_over_four_bits_per_weight(tiny_policy):
    layers = quantized_layers(load_policy("asset:tiny-qwen2-vl", lora=LORA, quantize="nf4")).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    held = 0
    for layer in layers:
        state = layer.weight.quant_state
        assert layer.weight.dtype == state.absmax.dtype == torch.uint8
        held += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert 4.12 < 8 * held / weights < 4.2


# One model, however it is used


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_computes_what_training_does_and_harms_it_not(tiny_policy, batch, dtype):
    """bitsandbytes repacks weights in eval mode on some CPUs; training would then stand still."""

    def gradients():
        model.zero_grad()
        logprobs(model, batch).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = quantized(tiny_policy, dtype=dtype)
    training, before = logprobs(model, batch).detach(), gradients()
    assert before.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        assert torch.equal(logprobs(model.eval(), batch), training)
    after = gradients()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logprobs(model.train(), batch), training)
    assert all(not layer.support_avx512bf16_for_cpu for layer in quantized_layers(model).values())


@pytest.mark.parametrize(("layout", "checkpointing"), [("prefix_cache", False), ("packed", False), ("packed", True)])
def test_shared_layouts_equal_the_plain_route(tiny_policy, batch, layout, checkpointing):
    model = quantized(tiny_policy, gradient_checkpointing=checkpointing)
    weights = torch.linspace(-1, 1, 24).view(2, 2, 6)
    found = []
    for run in (
        lambda: group_logprobs(model, batch, *completions(batch), forward=layout),
        lambda: logprobs(model, batch),
    ):
        model.zero_grad()
        values = run()
        (values * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_" in name])
        found.append((values.detach(), gradient))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=0)
    assert found[1][1].norm() > 1e-2
    assert (found[0][1] - found[1][1]).norm() < 1e-4 * found[1][1].norm()


def test_the_native_rollout_with_its_lean_step_follows_the_policy(tiny_policy, batch):
    from rft_lightning.policy.loading import load_processor
    from rft_lightning.policy.rollout import sample_groups

    model = quantized(tiny_policy)
    with torch.no_grad():
        assert SharedDecoder(model.eval(), batch, 2, at_once=2).lean is not None
    tokenizer = load_processor(tiny_policy).tokenizer
    rollouts = sample_groups(model.train(), batch, 2, tokenizer=tokenizer, max_completion_length=8, seed=0)
    ids, mask = rollouts.completion_ids, rollouts.completion_mask
    found = plain_group_logprobs(model, batch, ids.view(2, 2, -1), mask.view(2, 2, -1))[0]
    torch.testing.assert_close(
        rollouts.logprobs.view_as(found)[mask.view_as(found)], found[mask.view_as(found)], atol=1e-4, rtol=0
    )
    native, own = (
        sample_groups(model, batch, 1, tokenizer=tokenizer, max_completion_length=8, temperature=0.0, engine=engine)
        for engine in ("native", "hf")
    )
    assert native.texts == own.texts


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_reference_model_is_exactly_the_start_after_training(tiny_policy, make_trainer, batch, quantize):
    module = grpo(tiny_policy, quantize=quantize)
    make_trainer(3).fit(module, datamodule=data(tiny_policy))
    fresh = base_model(load_policy(tiny_policy, lora=LORA, quantize=quantize).base_model.unload())
    with torch.no_grad():
        tuned, start = logprobs(module.policy.eval(), batch), logprobs(fresh.eval(), batch)
        with module.reference_model() as reference:
            assert torch.equal(logprobs(reference, batch), start)
    assert (tuned - start).abs().max() > 1e-2
    if quantize is None:
        assert torch.equal(start, logprobs(load_policy(tiny_policy).eval(), batch))
    else:
        assert (start - logprobs(load_policy(tiny_policy).eval(), batch)).abs().max() > 1e-3


# Whole runs


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_a_tuned_policy_is_exported_dequantised(tiny_policy, make_trainer, tmp_path, batch, dtype, close):
    module = grpo(tiny_policy, dtype=dtype)
    callbacks = [RolloutCheckpoint(dirpath=str(tmp_path / "checkpoints")), HFExport(tmp_path / "by_callback")]
    make_trainer(3, callbacks=callbacks).fit(module, datamodule=data(tiny_policy))
    main(["export", str(tmp_path / "checkpoints" / "last.ckpt"), "--output_dir", str(tmp_path / "policy")])
    assert {f.name: f.read_bytes() for f in (tmp_path / "policy").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "by_callback").iterdir()
    }
    assert "quantization_config" not in json.loads((tmp_path / "policy" / "config.json").read_text())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "policy", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}
    assert loaded.state_dict().keys() == load_policy(tiny_policy).state_dict().keys()
    with torch.no_grad():
        tuned, exported = logprobs(module.policy.eval(), batch), logprobs(loaded, batch)
        start = logprobs(load_policy(tiny_policy, lora=LORA, quantize="nf4", dtype=dtype), batch)
        unquantised = logprobs(load_policy(tiny_policy, dtype=dtype), batch)
    assert (exported - tuned).abs().mean() < close
    assert (tuned - start).abs().mean() > 10 * close  # it has learned, which the export holds
    assert (start - unquantised).abs().mean() > 5 * close


def test_a_quantised_tower_trains_and_is_exported(make_trainer, tmp_path):
    """Of a policy whose tower is 64 wide; in the other tests its rows are no whole blocks."""
    folder = str(build_tiny(tmp_path / "start", shapes_corpus(200), width=128, layers=2, vision_width=64))
    assert kept_layers(load_config(folder)) == ["lm_head"]
    module, start = grpo(folder), load_policy(folder, lora=LORA, quantize="nf4")
    linear = {name for name, m in load_policy(folder).named_modules() if isinstance(m, torch.nn.Linear)}
    tower = {name for name in linear if "visual.blocks" in name}
    assert tower
    prompt = data(folder)
    prompt = prompt.encoder([prompt.sample("train", i) for i in range(2)])
    make_trainer(3, callbacks=[HFExport(tmp_path / "policy")]).fit(module, datamodule=data(folder))
    policy = base_model(module.policy)
    assert {name.removesuffix(".base_layer") for name in quantized_layers(policy)} == linear - {"lm_head"}
    module.policy.zero_grad()
    logprobs(module.policy, prompt).sum().backward()
    for name in tower:
        for adapter in ("lora_A", "lora_B"):
            weight = policy.get_submodule(name).get_submodule(f"{adapter}.default").weight
            assert weight.grad.norm() > 0, name
        assert weight.norm() > 1e-3, name  # B, which starts as zeros
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        tuned, exported = logprobs(module.policy.eval(), prompt), logprobs(loaded, prompt)
        torch.testing.assert_close(exported, tuned, atol=1e-4, rtol=0)
        assert (tuned - logprobs(start, prompt)).abs().max() > 1e-2
        for name in tower:  # what was quantised in the tower is what the export and the policy compute with
            policy.set_submodule(name, load_policy(folder).get_submodule(name))
        assert (tuned - logprobs(module.policy, prompt)).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions_leave_the_codes_alone(tiny_policy, make_trainer, precision):
    module = grpo(tiny_policy)
    make_trainer(2, precision=precision).fit(module, datamodule=data(tiny_policy))
    codes = {name: layer.weight for name, layer in quantized_layers(module.policy).items()}
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    start = quantized_layers(load_policy(tiny_policy, lora=LORA, quantize="nf4", dtype=dtype))
    assert codes.keys() == start.keys()
    assert all(torch.equal(code, start[name].weight) for name, code in codes.items())
    moved = [name for name, p in module.policy.named_parameters() if "lora_B" in name and p.abs().max() > 1e-4]
    assert len(moved) > len(codes) / 2


def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_policy, make_trainer, tmp_path):
    whole, first, resumed = (grpo(tiny_policy, schedule="constant") for _ in range(3))
    make_trainer(4).fit(whole, datamodule=data(tiny_policy))
    make_trainer(2, callbacks=[RolloutCheckpoint(dirpath=str(tmp_path))]).fit(first, datamodule=data(tiny_policy))
    make_trainer(4).fit(resumed, datamodule=data(tiny_policy), ckpt_path=str(tmp_path / "last.ckpt"))
    ends, halfway = whole.policy.state_dict(), first.policy.state_dict()
    assert all(torch.equal(value, ends[name]) for name, value in resumed.policy.state_dict().items())
    assert sum(not torch.equal(ends[name], halfway[name]) for name in ends) == sum("lora_" in name for name in ends)
    sampler = grpo(tiny_policy)
    sampler.load_for_sampling(str(tmp_path / "last.ckpt"))
    assert all(torch.equal(value, halfway[name]) for name, value in sampler.policy.state_dict().items())


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "use_dora": True},
        {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"r": 4, "modules_to_save": ["merger"], "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "modules_to_save": ["lm_head"], "target_modules": r".*layers\.0\.mlp\..*_proj"},
    ],
    ids=["dora", "rslora", "projector", "head"],
)
def test_every_kind_of_adapter_is_merged_into_dequantised_weights(tiny_policy, batch, lora):
    model = quantized(tiny_policy, lora=lora)
    start = logprobs(load_policy(tiny_policy, lora=lora, quantize="nf4"), batch).detach()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.02)
        tuned = logprobs(model, batch)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        merged = dequantized(model).merge_and_unload()
        torch.testing.assert_close(logprobs(merged, batch), tuned, atol=1e-4, rtol=0)
        assert (tuned - start).abs().max() > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert bool(whole) == ("modules_to_save" in lora)


def test_adapters_written_alone_are_put_on_the_quantised_model_by_peft(tiny_policy, batch, tmp_path):
    from peft import PeftModel

    model = quantized(tiny_policy)
    save_adapters(model, tmp_path / "adapters")
    base = copy.deepcopy(model).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters")
    with torch.no_grad():
        assert torch.equal(logprobs(loaded.eval(), batch), logprobs(model.eval(), batch))


# What it costs


def test_the_benchmark_finds_what_each_part_costs(monkeypatch, tmp_path, capsys):
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("quantization_benchmark", folder / "quantization.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "LAYER", (64, 64))
    results = benchmark.main(["--pictures", "2", "--batch", "1", "--rounds", "1", "--output", f"{tmp_path}/o"])
    assert json.loads((tmp_path / "o").read_text())["parts"] == results["parts"]
    parts = dict(results["parts"])
    every = parts.pop("all")
    assert every["weights"] == sum(part["weights"] for part in parts.values()) > 900_000
    assert all(0 < part["kl"] < part["difference"] for part in (*parts.values(), every))
    # Of [1/2, 1/4, 1/4] from [1/4, 1/4, 1/2], in tokens as the former draws them.
    before, after = torch.tensor([0.5, 0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.25, 0.5]).log()
    assert benchmark.cost(before, after)["kl"] == pytest.approx(math.log(2) / 4)
    assert "weights per second and core" in capsys.readouterr().out
    # The rounding is that of quantised layers.
    weight = load_policy("asset:tiny-qwen2-vl").get_submodule("model.language_model.layers.0.mlp.down_proj").weight
    whole = base_model(dequantized(load_policy("asset:tiny-qwen2-vl", lora=LORA, quantize="nf4")))
    expected = whole.get_submodule("model.language_model.layers.0.mlp.down_proj").base_layer.weight
    assert torch.equal(benchmark.rounded(weight.detach()), expected)


# Refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora": None}, r"model.quantize is nf4, but 4-bit weights cannot be trained.*model.lora"),
        ({"quantize": "int3"}, r"quantize to be nf4 or null, found 'int3'"),
        ({"dtype": "float16"}, r"computes in float32 or bfloat16, found model.dtype float16.*Use bfloat16"),
        ({"lora": {"target_parameters": ["q_proj.weight"]}}, r"lora.target_parameters.*lora.target_modules"),
    ],
)
def test_settings_that_do_not_go_together(tiny_policy, settings, words):
    with pytest.raises(ConfigConflictError, match=words):
        load_policy(tiny_policy, **{"lora": LORA, "quantize": "nf4", **settings})


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_checkpoint_that_is_quantised_on_disk_is_refused(tiny_policy, tmp_path, lora):
    base = copy.deepcopy(quantized(tiny_policy)).unload()
    base.save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"quantised already \(bitsandbytes\).*unquantised.*model.quantize: nf4"):
        load_policy(str(tmp_path / "small"), lora=lora)


def test_nothing_is_said_about_kernels_to_download():
    code = (
        "from rft_lightning.policy.loading import load_policy\n"
        "load_policy('asset:tiny-qwen2-vl', lora={'r': 2}, quantize='nf4')\n"
        "import sys; assert 'bitsandbytes' in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "kernels" not in result.stderr


# Two processes


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_processes_train_alike_and_save_what_can_be_resumed(tmp_path):
    (tmp_path / "helpers.py").write_text(
        "import torch\n"
        "from lightning.pytorch import Callback\n"
        "class SameOnEveryRank(Callback):\n"
        "    def on_train_end(self, trainer, pl_module):\n"
        "        flat = [p.detach().flatten().float() for p in pl_module.policy.parameters()]\n"
        "        both = pl_module.all_gather(torch.cat(flat))\n"
        "        assert torch.equal(both[0], both[1])\n"
    )
    configs = Path(__file__).parent.parent / "configs"
    (tmp_path / "more.yaml").write_text("trainer: {callbacks+: [{class_path: helpers.SameOnEveryRank}]}\n")

    def fit(processes, batch, steps, *arguments, optimizer="SGD", lr="0.1", lora="{r: 4}"):
        command = [
            sys.executable, "-m", "rft_lightning", "fit", "--config", str(configs / "quickstart.yaml"),
            "--config", str(configs / "method" / "sft.yaml"), *arguments,
            "--model.lora", lora, "--model.quantize", "nf4", "--model.optimizer", optimizer,
            "--model.optimizer.lr", lr, "--model.schedule", "constant", "--model.micro_batch_prompts", "1",
            "--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto",
            "--data.batch_size", str(batch), "--data.shots", "2", "--data.val_size", "2",
            "--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
        folder = tmp_path / f"{optimizer}-{processes}-{steps}"
        folder.mkdir()
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=300
        )
        assert result.returncode == 0, result.stderr[-4000:]
        (checkpoint,) = folder.rglob("last.ckpt")
        return checkpoint

    def adapters(checkpoint):
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        return {name: value for name, value in state.items() if "lora_" in name}

    watched = ("--config", str(tmp_path / "more.yaml"))
    two = fit(2, 2, 3, *watched)
    one, both = adapters(fit(1, 4, 3)), adapters(two)
    moved = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name)
    assert moved > 1e-4
    assert max((one[name] - both[name]).abs().max().item() for name in one) < 1e-2 * moved
    fit(1, 4, 4, "--ckpt_path", str(two))
    last = fit(2, 2, 2, *watched, optimizer="bitsandbytes.optim.AdamW8bit", lr="1e-3", lora="{r: 64}")
    (state,) = torch.load(last, weights_only=True)["optimizer_states"]
    kinds = {one["__bnb_optimizer_quant_state__"]["state1"].dtype for one in state["state"].values()}
    assert torch.uint8 in kinds
