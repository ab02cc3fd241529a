"""The estimate of memory against what policies of the same settings are measured to hold."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh

from rft_lightning.cli import main
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.memory import PolicySizes, estimate
from rft_lightning.memory_setup import Memory, Setup
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


@pytest.mark.parametrize("name", ["Muon", "LBFGS"])
def test_an_optimiser_that_no_run_could_use_is_refused(tiny_policy, name):
    sizes = PolicySizes(load_config(tiny_policy), Setup(optimizer=getattr(torch.optim, name)))
    with pytest.raises(ConfigConflictError, match="The optimiser cannot make a step"):
        sizes.memory()


def test_an_8_bit_optimiser_cannot_be_sharded(tiny_policy):
    from bitsandbytes.optim import AdamW8bit

    sizes = PolicySizes(load_config(tiny_policy), Setup(optimizer=lambda parameters: AdamW8bit(list(parameters))))
    assert sizes.memory().optimizer > 0
    for processes in (1, 2):
        with pytest.raises(ConfigConflictError, match="bitsandbytes' AdamW8bit cannot update parameters that fsdp2 sh"):
            sizes.memory(strategy="fsdp2", processes=processes)


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


REFUSED = {
    "does not divide 8.*--devices 3": {"strategy": "fsdp2", "processes": 8, "shard_size": 3},
    "fsdp2 cannot shard 4-bit": {"strategy": "fsdp2", "processes": 8, "lora": LORA, "quantize": "nf4"},
    "strategy to be one of": {"strategy": "deepspeed"},
    "strategy single is one process.*found 2": {"processes": 2},
    "nothing to train: freeze names all parts": {"freeze": ("vision_tower", "projector", "language_model")},
    "micro_batch_prompts >= 1, found 0": {"micro_batch_prompts": 0},
    "eval_prompts >= 0, found -1": {"eval_prompts": -1},
    "is greater than prompt_tokens": {"prompt_tokens": 100, "image_tokens": 101},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_run_could_have_is_refused(message):
    with pytest.raises(ConfigConflictError, match=message):
        PolicySizes(published_config("Qwen2-VL-2B"), Setup(**REFUSED[message]))


def test_a_validation_is_a_rollout_of_single_answers(tiny_policy):
    settings = {"prompt_tokens": 40, "image_tokens": 20, "completion_tokens": 8, "mixed": True}
    sizes = PolicySizes(load_config(tiny_policy), Setup(**settings, eval_prompts=32, rollout_prompts=32, group_size=1))
    for strategy in ("ddp", "fsdp2"):
        phases = sizes.memory(strategy=strategy, processes=2).phases
        assert phases["validation"] == phases["rollout"]
    supervised = PolicySizes(
        load_config(tiny_policy), Setup(**settings, eval_prompts=32, rollout_prompts=0, group_size=1)
    )
    memory = supervised.memory(strategy="fsdp2", processes=2)
    assert memory.phases.keys() == {"update", "step", "validation"}
    assert memory.gathered_rollout == sum(w.count * 2 for w in supervised.weights)
    assert memory.phases["validation"] == memory.always + memory.gathered_rollout + memory.validation
    assert memory.total == memory.phases["validation"]
    none = PolicySizes(load_config(tiny_policy), Setup(**settings, eval_prompts=0)).memory()
    assert "validation" not in none.phases


def test_checkpointing_changes_no_prefill(tiny_policy):
    settings = {"prompt_tokens": 40, "image_tokens": 20, "completion_tokens": 8}
    plain, recomputing = (
        PolicySizes(load_config(tiny_policy), Setup(**settings, gradient_checkpointing=on)).memory()
        for on in (False, True)
    )
    assert plain.prefill == recomputing.prefill > 0
    assert recomputing.working == 2 * plain.working


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


COCO = ["prepare", "-c", str(ROOT / "configs" / "coco.yaml"), "--estimate", "--model.policy", "asset:tiny-qwen2-vl"]
SMALL = ["--data.min_pixels", "784", "--data.max_pixels", "3136"]


@pytest.fixture
def printed(capsys):
    """printed(*words) -> what the estimate of coco.yaml with the shipped policy prints, on one line."""

    def estimate_of(*words: str) -> str:
        main([*COCO, *SMALL, *words])
        return " ".join(capsys.readouterr().out.split())

    return estimate_of


def test_files_are_laid_over_each_other_as_for_fit(printed):
    overlay = str(ROOT / "configs" / "strategy" / "fsdp2.yaml")
    laid = printed("-c", overlay, "--devices", "8")
    assert laid == printed("--strategy", "fsdp2", "--devices", "8")
    assert laid != printed("-c", overlay, "--devices", "8", "--precision", "32-true")


def test_options_of_the_trainer_are_those_of_the_estimate(printed):
    assert printed("--trainer.precision", "32-true") == printed("--precision", "32-true")
    assert printed("--trainer.devices", "4") == printed("--devices", "4")
    assert printed("--trainer.devices", "[0,1]", "--trainer.strategy", "fsdp2") == printed(
        "--devices", "2", "--strategy", "fsdp2"
    )


def test_precisions_have_lightnings_other_names(printed):
    mixed, full = printed("--precision", "bf16-mixed"), printed("--precision", "32-true")
    assert mixed != full
    assert printed("--precision", "bf16") == printed("--trainer.precision", "bf16") == mixed
    assert printed("--precision", "32") == printed("--trainer.precision", "32") == full


@pytest.mark.parametrize(("given", "count"), [("[0,1]", 2), ("0,1", 2), ("3,", 1), ("4", 4), ("auto", 1)])
def test_devices_are_counted(printed, given, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert f" {count} x {'ddp' if count > 1 else 'single'}," in printed("--devices", given)


WRONG = {
    "--devices abc": "Expected --devices .* found 'abc'",
    "--devices 0": "Expected --devices .* found 0",
    "--devices [0,0]": "Expected --devices",
    "--devices []": "Expected --devices",
    "--devices -3": "Expected --devices",
    "--num_nodes 0": "Expected --num_nodes >= 1, found 0",
    "--prompt_tokens 0": "Expected --prompt_tokens >= 1, found 0",
    "--prompt_tokens -5": "Expected --prompt_tokens >= 1, found -5",
    "--data.max_pixels 100": r"min_pixels \(784\) is greater than max_pixels \(100\)",
    "--data.max_pixels 100 --data.min_pixels null": r"min_pixels \(882\) is greater than max_pixels \(100\)",
    "--data.batch_size 0": "Expected data.batch_size >= 1, found 0",
    "--data.eval_batch_size 0": "Expected data.eval_batch_size >= 1, found 0",
    "--model.micro_batch_prompts 0": "Expected model.micro_batch_prompts >= 1, found 0",
    "--strategy single --devices 2": "strategy single is one process",
    "--precision 16": "float16 needs loss scaling, which manual steps do not do",
    "--precision 16-true": "float16 needs loss scaling, which manual steps do not do",
    "--precision 64 --strategy fsdp2": "fsdp2 runs in precision 32-true, bf16-mixed, bf16-true, found 64-true",
    "--precision abc": "Nothing is known about the memory of trainer.precision abc",
    "--trainer.accumulate_grad_batches 4": "One batch is already split into optimiser steps",
    "--model.attn_implementation abc": "Expected model.attn_implementation to be one of sdpa, eager.*found 'abc'",
    f"-c {ROOT / 'configs' / 'strategy' / 'hsdp.yaml'} --devices 1": "does not divide 1 .*--devices 8",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_a_user_can_get_wrong_is_named(printed, words):
    with pytest.raises(ConfigConflictError, match=WRONG[words]):
        printed(*words.split())


def test_a_kernel_that_needs_a_device_is_counted_as_another(printed):
    found = printed("--model.attn_implementation", "flash_attention_2")
    note = "Counted with the attention kernel sdpa: flash_attention_2 runs on devices alone. "
    assert note in found
    assert found.replace(note, "") == printed()


def test_a_micro_batch_is_part_of_a_mini_batch(printed):
    words = ["--data.batch_size", "8", "--model.mini_batch_prompts", "2"]
    assert " 8 prompts at once in a rollout, 2 in a micro-batch" in printed(*words, "--model.micro_batch_prompts", "4")


def test_images_without_a_limit_have_the_processors(printed, capsys):
    main(["prepare", "-c", str(ROOT / "configs" / "quickstart.yaml"), "--estimate"])
    shown = " ".join(capsys.readouterr().out.split())
    # 1764 pixels at most (processor_config.json), 14 x 14 of which are a token.
    assert "prompts of 265 (9 of the image), 64 prompts at once in validation" in shown
    assert "0 prompts at once in validation" in printed("--trainer.limit_val_batches", "0")


# The numbers of configs/tuning/one_24gb_card.yaml


def card(name: str, **more) -> Memory:
    settings = {"dtype": "bfloat16", "lora": {"r": 16, "lora_alpha": 32}, "gradient_checkpointing": True, **more}
    setup = Setup(**settings, mixed=True, group_size=8, rollout_prompts=4, eval_prompts=16)
    return PolicySizes(published_config(name), setup).memory()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_numbers_of_one_card_are_those_of_the_estimate():
    text = " ".join((ROOT / "configs" / "tuning" / "one_24gb_card.yaml").read_text().replace("#", "").split())
    memory, whole = card("Qwen2-VL-2B"), card("Qwen2-VL-2B", gradient_checkpointing=False)
    phases = memory.phases
    stated = {
        "weights": memory.weights,
        "optimiser": memory.optimizer,
        "reference model": memory.reference,
        "rollout": memory.cache + max(memory.prefill, memory.sampling),
        "gradients": memory.gradients,
        "micro-batch": memory.activations + memory.working,
        "without gradient_checkpointing": whole.activations + whole.working,
        "log-probs": memory.head,
        "validation": memory.validation,
        "in all": memory.total,
        "they need": phases["rollout"],
        r"they need \d+\.\d,": phases["update"],
        r"they need \d+\.\d, \d+\.\d and": phases["validation"],
        r"without checkpointing too \(": whole.total,
        "tuning/qlora.yaml on top of this file needs": card("Qwen2-VL-2B", quantize="nf4").total,
        "Qwen2-VL-7B needs": card("Qwen2-VL-7B").total,
        "like this and": card("Qwen2-VL-7B", quantize="nf4").total,
        "precision of the published runs": estimate(published_config("Qwen2-VL-2B"), Setup(mixed=True)).total,
    }
    for words, value in stated.items():
        (number,) = re.findall(rf"(?:^|[ (]){words.removeprefix(' ')} ?(\d+\.\d)", text)
        assert abs(value / 2**30 - float(number)) < 0.06, (words, value / 2**30)
    assert max(memory.total, whole.total) < 0.9 * 24 * 2**30
