"""The estimate of memory against what policies of the same settings are measured to hold."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh

from rft_lightning.cli import main
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.memory import PolicySizes, estimate
from rft_lightning.memory_setup import Setup
from rft_lightning.policy.decoding import SharedDecoder
from rft_lightning.policy.families import FAMILIES
from rft_lightning.policy.loading import evaluating, frozen_copy, load_config, load_policy
from rft_lightning.policy.quantization import quantized_layers
from rft_lightning.policy.shared_prefix import group_logprobs
from rft_lightning.report.memory_table import HEADER, memory_table, published_config, row
from rft_lightning.sharding import local, shard
from rft_lightning.tasks import DetectionTask

ROOT = Path(__file__).parent.parent
LORA = {"r": 4, "lora_alpha": 8}
TUNINGS = {
    "full": {},
    "frozen tower": {"freeze": ["vision_tower", "projector"]},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"lora": LORA},
    "qlora": {"lora": LORA, "quantize": "nf4"},
}
SHARDED = ("full", "lora", "bfloat16")
GROUP_SIZE, COMPLETION = 3, 70


def groups(folder, count=2):
    """Prompts of one length, and completions of 70 tokens."""
    encoder = ShapesDataModule(processor=folder, shots=2, task=DetectionTask()).encoder
    samples = ShapesDataModule(processor=folder, shots=2, task=DetectionTask()).split("train")
    prompt = encoder([samples[0]] * count)
    ids = torch.randint(20, 300, (count, GROUP_SIZE, COMPLETION), generator=torch.Generator().manual_seed(0))
    return prompt, ids, torch.ones_like(ids, dtype=torch.bool)


def setup_for(prompt, settings, **more):
    return Setup(
        **{**settings, "freeze": tuple(settings.get("freeze", ()))},
        group_size=GROUP_SIZE,
        prompt_tokens=prompt.lengths[0],
        image_tokens=prompt.patch_counts[0] // 4,
        completion_tokens=COMPLETION,
        micro_batch_prompts=len(prompt),
        rollout_prompts=len(prompt),
        **more,
    )


def scales(layer) -> int:
    """Bytes of what a 4-bit layer holds beside its codes."""
    state = layer.weight.quant_state
    tensors = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


def held(tensors) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_states_are_counted_to_the_byte(tiny_policy, tuning):
    settings = TUNINGS[tuning]
    prompt, ids, mask = groups(tiny_policy)
    found = PolicySizes(load_config(tiny_policy), setup_for(prompt, settings)).memory()
    policy = load_policy(tiny_policy, **settings)
    assert found.weights == held(policy.parameters()) + sum(map(scales, quantized_layers(policy).values()))
    assert (tuning == "qlora") == bool(quantized_layers(policy))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    group_logprobs(policy, prompt, ids, mask).sum().backward()
    assert found.gradients == held(p.grad for p in policy.parameters() if p.requires_grad)
    optimizer.step()
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    assert found.optimizer == held(state)
    assert found.reference == (0 if "lora" in settings else held(frozen_copy(policy).parameters()))


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_other_optimisers_are_asked_what_they_keep(tiny_policy, name):
    make = getattr(torch.optim, name)
    found = PolicySizes(load_config(tiny_policy), Setup(optimizer=lambda parameters: make(parameters, lr=1e-3)))
    policy = load_policy(tiny_policy)
    optimizer = make(policy.parameters(), lr=1e-3)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    assert found.optimizer_bytes() == held(value for value in state if isinstance(value, torch.Tensor))


def test_an_optimiser_that_looks_at_numbers_is_named(tiny_policy):
    sizes = PolicySizes(load_config(tiny_policy), Setup(optimizer=torch.optim.Adafactor))
    with pytest.raises(ConfigConflictError, match="Adafactor looks at the numbers"):
        sizes.optimizer_bytes()


def test_an_8_bit_optimiser_keeps_two_bytes_per_weight():
    from bitsandbytes.optim import AdamW8bit

    setup = Setup(optimizer=lambda parameters: AdamW8bit(list(parameters), lr=1e-3))
    sizes = PolicySizes(published_config("Qwen2-VL-2B"), setup)
    trained = sum(weight.count for weight in sizes.weights)
    # A scale for each 256 of both states, tables, and small tensors in float32.
    assert 2.03 * trained < sizes.optimizer_bytes() < 2.06 * trained


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora", "bfloat16"])
def test_keys_and_values_are_counted_to_the_byte(tiny_policy, tuning):
    prompt, _, _ = groups(tiny_policy)
    found = PolicySizes(load_config(tiny_policy), setup_for(prompt, TUNINGS[tuning])).memory()
    policy = load_policy(tiny_policy, **TUNINGS[tuning])
    with evaluating(policy), torch.no_grad():
        decoder = SharedDecoder(policy, prompt, GROUP_SIZE, at_once=len(prompt))
        rows = decoder.admit()
        for _ in range(COMPLETION - 1):  # the first token is the prefill's
            decoder.extend(torch.full_like(rows, 30))
    assert found.cache == held(tensor for layer in decoder.layers for tensor in vars(layer).values())


def kept_for_backward(policy, run) -> int:
    """Bytes of the tensors that a forward saves, but for weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tuning", ["full", "frozen tower", "qlora"])
def test_activations_are_those_of_a_forward(tiny_policy, tuning, checkpointing):
    """All but the embeddings and the features of the images."""
    settings = {**TUNINGS[tuning], "gradient_checkpointing": checkpointing}
    prompt, ids, mask = groups(tiny_policy)
    estimated = PolicySizes(load_config(tiny_policy), setup_for(prompt, settings)).memory().activations
    policy = load_policy(tiny_policy, **settings)
    measured = kept_for_backward(policy, lambda: group_logprobs(policy, prompt, ids, mask))
    assert 0.95 < estimated / measured < 1.05, (estimated, measured)


@pytest.mark.parametrize("forward", ["plain", "prefix_cache"])
def test_activations_of_other_layouts(tiny_policy, forward):
    prompt, ids, mask = groups(tiny_policy)
    estimated = PolicySizes(load_config(tiny_policy), setup_for(prompt, {}, forward=forward)).memory().activations
    policy = load_policy(tiny_policy)
    measured = kept_for_backward(policy, lambda: group_logprobs(policy, prompt, ids, mask, forward=forward))
    assert 0.8 < estimated / measured < 1.25, (estimated, measured)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_activations_under_autocast(tiny_policy, tuning):
    settings = TUNINGS[tuning]
    prompt, ids, mask = groups(tiny_policy)
    found = PolicySizes(load_config(tiny_policy), setup_for(prompt, settings, mixed=True)).memory()
    policy = load_policy(tiny_policy, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        measured = kept_for_backward(policy, lambda: group_logprobs(policy, prompt, ids, mask))
    # Autocast's copies of weights are among what is saved.
    assert 0.9 < (found.activations + found.cast) / measured < 1.1, (found.activations, found.cast, measured)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_estimated(family_folder, family):
    setup = Setup(group_size=2, prompt_tokens=60, image_tokens=40, completion_tokens=8, lora=LORA)
    found = estimate(load_config(family_folder(family)), setup)
    policy = load_policy(family_folder(family), lora=LORA)
    assert found.weights == held(policy.parameters())
    assert found.activations > 0
    assert found.cache > 0


# Published sizes


@pytest.mark.parametrize(("name", "billions"), [("Qwen2-VL-2B", 2.21), ("Qwen2-VL-7B", 8.29)])
def test_published_models_have_their_published_sizes(name, billions):
    sizes = PolicySizes(published_config(name), Setup())
    assert sum(weight.count for weight in sizes.weights) / 1e9 == pytest.approx(billions, abs=0.005)


def documented() -> list[str]:
    return [line for line in (ROOT / "docs" / "scaling.md").read_text().splitlines() if line.startswith("| Qwen2-VL")]


def test_a_line_of_the_documented_table_is_what_the_command_prints():
    assert row("Qwen2-VL-2B", "LoRA", gradient_checkpointing=True) in documented()
    assert len(documented()) == 12
    assert HEADER[0] in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_documented_table_is_what_the_command_prints():
    assert list(memory_table())[len(HEADER) :] == documented()


# What strategies change


def test_ddp_holds_gradients_twice_and_fsdp2_shares_all_states(tiny_policy):
    sizes = PolicySizes(load_config(tiny_policy), Setup(prompt_tokens=40, image_tokens=20, completion_tokens=8))
    one, ddp = sizes.memory(), sizes.memory(strategy="ddp", processes=4)
    assert ddp.buckets == ddp.gradients == one.gradients
    assert (ddp.weights, ddp.optimizer) == (one.weights, one.optimizer)
    sharded = sizes.memory(strategy="fsdp2", processes=4)
    for name in ("weights", "gradients", "optimizer", "reference"):
        assert 0.25 <= getattr(sharded, name) / getattr(one, name) < 0.27, name
    assert sharded.gathered_rollout == one.weights
    assert sharded.gathered_update < one.weights + 2 * one.gradients
    apart = sizes.memory(strategy="fsdp2", processes=4, gather_for_rollouts=False)
    assert apart.gathered_rollout < one.weights
    copies = sizes.memory(strategy="fsdp2", processes=4, shard_size=2)
    assert copies.weights == sizes.memory(strategy="fsdp2", processes=2).weights
    host = sizes.memory(strategy="fsdp2", processes=4, offload_policy=True, offload_reference=True)
    assert host.always == host.gradients == 0
    assert host.gathered_update == sharded.gathered_update


def test_what_no_run_could_have_is_refused():
    config = published_config("Qwen2-VL-2B")
    with pytest.raises(ConfigConflictError, match="does not divide 8"):
        PolicySizes(config, Setup(strategy="fsdp2", processes=8, shard_size=3))
    with pytest.raises(ConfigConflictError, match="fsdp2 cannot shard 4-bit"):
        PolicySizes(config, Setup(strategy="fsdp2", processes=8, lora=LORA, quantize="nf4"))
    with pytest.raises(ConfigConflictError, match="strategy"):
        PolicySizes(config, Setup(strategy="deepspeed"))


def worker(rank, folder, policy):
    """What one of two processes holds after a step, for each tuning."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    measured = {}
    for tuning in SHARDED:
        model = load_policy(policy, **TUNINGS[tuning])
        reference = frozen_copy(model)
        shard(model, mesh)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        group_logprobs(model, *groups(policy)).sum().backward()
        optimizer.step()
        measured[tuning] = {
            "weights": held(model.parameters()),
            "gradients": held(p.grad for p in model.parameters() if p.grad is not None),
            "optimizer": held(value for of_one in optimizer.state.values() for value in of_one.values()),
        }
        if tuning != "lora":
            shard(reference, mesh)
            measured[tuning]["reference"] = held(reference.parameters())
    torch.save(measured, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_hold_what_is_counted(tmp_path, tiny_policy):
    with pytest.MonkeyPatch.context() as patch:
        # pytest imports test files under names of its own; the new processes need one they can find.
        patch.syspath_prepend(Path(__file__).parent)
        target = importlib.import_module(Path(__file__).stem).worker
        torch.multiprocessing.spawn(target, (str(tmp_path), tiny_policy), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for tuning in SHARDED:
        sizes = PolicySizes(load_config(tiny_policy), setup_for(groups(tiny_policy)[0], TUNINGS[tuning]))
        found = vars(sizes.memory(strategy="fsdp2", processes=2))
        assert first[tuning] == {name: found[name] for name in first[tuning]}, tuning
        assert all(second[tuning][name] <= found[name] for name in second[tuning]), tuning


# The command


def test_the_command_needs_neither_data_nor_weights(tmp_path, tiny_policy, capsys):
    folder = tmp_path / "sizes"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(tiny_policy) / "config.json").read_bytes())
    common = ["prepare", "-c", str(ROOT / "configs" / "coco.yaml"), "--estimate", "--model.policy", str(folder)]
    main([*common, "--devices", "8", "--strategy", "fsdp2"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 x fsdp2, per process: 2 prompts at once in a rollout, 1 in a micro-batch, 8 completions each" in shown
    assert "gathered weights, rollout" in shown
    assert "24 GB: fits" in shown
    main([*common, "-c", str(ROOT / "configs" / "strategy" / "hsdp.yaml"), "--devices", "8", "--num_nodes", "2"])
    assert "16 x fsdp2" in " ".join(capsys.readouterr().out.split())
    main([*common, "--model.lora", "{r: 4}", "--devices", "1", "--prompt_tokens", "900"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 x single" in shown
    assert "prompts of 900" in shown
    assert "reference model" not in shown


def test_a_policy_out_of_reach_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"No model configuration can be read from 'nobody/has-this'"):
        main(["prepare", "-c", str(ROOT / "configs" / "coco.yaml"), "--estimate", "--model.policy", "nobody/has-this"])


def test_options_of_an_estimate_mean_nothing_without_it():
    with pytest.raises(ConfigConflictError, match=r"--devices changes nothing but an estimate: add --estimate"):
        main(["prepare", "-c", str(ROOT / "configs" / "coco.yaml"), "--devices", "8"])
