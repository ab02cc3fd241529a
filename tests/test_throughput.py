"""Throughput and what it counts with: against PyTorch's own counter of operations, brute force, and real runs."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from rft_lightning import GRPOModule, GRPOObjective, SFTModule
from rft_lightning.callbacks import RolloutCheckpoint, Throughput
from rft_lightning.callbacks.throughput import measured_bandwidth, measured_flops
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import ConfigConflictError
from rft_lightning.flops import Matmuls, PolicyCosts, policy_costs
from rft_lightning.policy.families import FAMILIES
from rft_lightning.policy.loading import load_policy
from rft_lightning.prompts import PromptEncoder
from rft_lightning.run_statistics import GroupSizes, Workload, group_sizes
from rft_lightning.sample import ClassTarget, Sample
from rft_lightning.tasks import ClassificationTask, DetectionTask

PEAK, BANDWIDTH = 1e9, 1e6
NOTHING = Matmuls(0, 0, 0)
ATTENTION = ("flash_attention", "efficient_attention", "bmm")


def length_reward(answer, target, *, rules, step):
    """A reward that a random policy varies in."""
    return (len(answer.text) % 17) / 17


def data(tiny_policy, **kwargs):
    config = {"batch_size": 5, "train_size": 10, "val_size": 2, "eval_batch_size": 2}
    # Questions of different lengths.
    config["task"] = [task(rewards={"length": length_reward}) for task in (DetectionTask, ClassificationTask)]
    return ShapesDataModule(processor=tiny_policy, **{**config, **kwargs})


def grpo(tiny_policy, **kwargs):
    """A policy that ends its answers soon, since every tenth token does."""
    config = {"group_size": 3, "max_completion_length": 24, "schedule": "constant"}
    module = GRPOModule(tiny_policy, **{**config, **kwargs})
    module.configure_model()
    module.policy.generation_config.eos_token_id = list(range(10, 870, 10))
    return module


class Record(Callback):
    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, *args):
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def fitted(module, make_trainer, source, steps=1, **kwargs):
    """What each batch of a run logged; numbers of the hardware are given."""
    record = Record()
    callbacks = [Throughput(peak_flops=PEAK, bandwidth=BANDWIDTH), record]
    make_trainer(steps, callbacks=callbacks, **kwargs).fit(module, datamodule=source)
    return record.metrics


def kept_rollouts(module):
    """What `module` rolls out, as it does."""
    kept, roll_out = [], module.roll_out

    def keep(*args, **kwargs):
        kept.append(roll_out(*args, **kwargs))
        return kept[-1]

    module.roll_out = keep
    return kept


def sizes(prompts, completions, rows=None):
    completions = torch.tensor(completions)
    rows = [0] * len(prompts) if rows is None else rows
    truncated = torch.zeros_like(completions, dtype=torch.bool)
    return GroupSizes(torch.tensor(prompts), completions, truncated, torch.tensor(rows))


# Operations, against PyTorch's counter


def picture_prompt(folder):
    image = Image.new("RGB", (100, 60), "red")
    return PromptEncoder(folder)([Sample("0", image, ClassTarget("cup"), ClassificationTask(), image.size)])


def seen(length, window):
    """Pairs that a causal layer sees, by its mask."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    return int(((j <= i) & (j > i - (window or length))).sum())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_5"])
def test_forward_operations_are_those_pytorch_counts(family, family_folder):
    """PyTorch counts the pairs of attention that a mask hides as well, which are added to ours here.

    What is left is rounding of windows (Qwen2.5-VL), a class token (InternVL), and a projection kept as a bare
    parameter (Gemma3).
    """
    folder = family_folder(family)
    model, prompt = load_policy(folder).eval(), picture_prompt(folder)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            use_cache=False,
            logits_to_keep=1,
            **prompt.vision,
        )
    costs = policy_costs(model)
    length = prompt.lengths[0]
    hidden = 4 * costs.query_width * sum(length**2 - seen(length, window) for window in costs.windows)
    own = costs.forward(group_sizes(prompt, torch.tensor([[1]])))
    assert 0 < hidden < 0.2 * own
    assert own + hidden == pytest.approx(counter.get_total_flops(), rel=0.02)
    if family == "qwen2_vl":
        assert own + hidden == counter.get_total_flops()


@pytest.mark.parametrize("tuning", ["all", "no tower", "decoder alone", "adapters"])
def test_backward_operations_are_those_pytorch_counts(tuning, family_folder):
    """Products with weights; attention, whose kernels count what they compute anew, has its own factor of two."""
    folder = family_folder("qwen2_vl")
    freeze = {"no tower": ["vision_tower"], "decoder alone": ["vision_tower", "projector"]}.get(tuning, [])
    lora = {"r": 4, "lora_alpha": 8} if tuning == "adapters" else None
    model, prompt = load_policy(folder, freeze=freeze, lora=lora), picture_prompt(folder)
    length, written = prompt.lengths[0], 40
    types = prompt.vision["mm_token_type_ids"]
    vision = {**prompt.vision, "mm_token_type_ids": torch.nn.functional.pad(types, (0, written - 1))}
    ids = torch.cat([prompt.input_ids, prompt.input_ids[:, -1:].expand(-1, written - 1)], 1)
    with FlopCounterMode(display=False) as counter:
        model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=written, **vision
        ).logits.square().mean().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for name, count in counted.items() if not any(word in str(name) for word in ATTENTION))
    costs = policy_costs(model)
    group = group_sizes(prompt, torch.tensor([[written]]))
    bare = replace(costs, windows=(), tower_windows=())
    assert ids.shape[1] == length + written - 1
    assert bare.forward(group) + bare.backward(group) == pytest.approx(products, rel=0.03)
    assert costs.vision_is_frozen is (tuning == "decoder alone")
    tower = 2 * (costs.forward(group) - costs.forward(group, vision=False)) if tuning in ("all", "adapters") else 0
    attention = costs.backward(group) - bare.backward(group)
    decoder = 8 * costs.query_width * 2 * seen(length + written - 1, None)
    assert attention == pytest.approx(decoder + (tower and 2 * costs._tower_attention(group)))


def test_bytes_are_those_of_the_precision_that_is_computed_in(family_folder):
    model = load_policy(family_folder("qwen2_vl"))
    whole, half = policy_costs(model), policy_costs(model, dtype=torch.bfloat16)
    weights = whole.decoder.weights
    assert (whole.decoder.bytes, half.decoder.bytes) == (4 * weights, 2 * weights)
    assert whole.key_value_bytes == 2 * half.key_value_bytes


def test_a_family_that_is_not_in_the_table_has_no_costs():
    model = torch.nn.Module()
    model.config = SimpleNamespace(model_type="unknown")
    assert policy_costs(model) is None


groups = st.integers(1, 3).flatmap(
    lambda size: (
        st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=size, max_size=size)))
        .filter(bool)
        .map(lambda rows: sizes([prompt for prompt, _ in rows], [completions for _, completions in rows]))
    )
)


def only(**kwargs):
    blank = {name: NOTHING for name in ("patch_embedding", "tower", "projector", "decoder", "head")}
    blank |= {"tower_width": 1, "tower_windows": (), "patches_per_row": 1, "patches_per_token": 1.0}
    return PolicyCosts(**{**blank, "query_width": 1, "key_value_bytes": 1, "windows": (), **kwargs})


@settings(max_examples=60, deadline=None)
@given(group=groups, window=st.one_of(st.none(), st.integers(1, 15)))
def test_attention_of_a_group_by_brute_force(group, window):
    pairs = 0
    for prompt, completions in zip(group.prompts.tolist(), group.completions.tolist(), strict=True):
        pairs += seen(prompt, window)
        pairs += sum(seen(prompt + length - 1, window) - seen(prompt, window) for length in completions)
    assert only(windows=(window,)).forward(group) == 4 * pairs


@settings(max_examples=60, deadline=None)
@given(group=groups, window=st.one_of(st.none(), st.integers(1, 15)), size=st.integers(1, 3))
def test_bytes_of_decoding_by_brute_force(group, window, size):
    pieces = group.cut(size)
    rows = max(piece.completions.numel() for piece in pieces)
    later = [length - 1 for lengths in group.completions.tolist() for length in lengths]
    steps = max(max(later), math.ceil(sum(later) / rows))
    weights = only(decoder=Matmuls(0, 0, 7), head=Matmuls(0, 0, 5), key_value_bytes=0)
    assert weights.decode_bytes(pieces) == 12 * steps

    read = 0
    for prompt, completions in zip(group.prompts.tolist(), group.completions.tolist(), strict=True):
        for step in range(1, max(completions)):
            places = {("prompt", i) for i in range(prompt) if window is None or prompt + step - i <= window}
            for row in (row for row, length in enumerate(completions) if length - 1 >= step):
                places |= {(row, i) for i in range(step) if window is None or step - i <= window}
            read += len(places)
    assert only(windows=(window, window), key_value_bytes=3).decode_bytes(pieces) == 6 * read


# Runs


def decoder_weights(policy):
    matrices = {n: p for n, p in policy.named_parameters() if "language_model.layers" in n and p.ndim == 2}
    return sum(matrix.numel() for matrix in matrices.values())


def tower_operations(policy, patches):
    """Of one picture by the tiny Qwen2-VL: 1 block of width 32, patches merged by four."""
    of = {n: p.numel() for n, p in policy.named_parameters() if "visual" in n and p.ndim >= 2}
    merged = sum(count for name, count in of.items() if "merger" in name)
    return 2 * patches * (sum(of.values()) - merged) + 2 * merged * patches // 4 + 4 * 32 * patches**2


def test_the_numbers_of_a_run_are_those_of_a_hand_computation(tiny_policy, make_trainer):
    module = grpo(tiny_policy, objective=GRPOObjective(beta=0.04), rollout_prompts=2, micro_batch_prompts=3)
    rollouts = kept_rollouts(module)
    (logged,) = fitted(module, make_trainer, data(tiny_policy))
    (rollout,) = rollouts
    prompts = rollout.prompts.attention_mask.sum(1).tolist()
    completions = rollout.completion_mask.sum(-1).tolist()
    tokens = sum(map(sum, completions))
    assert len(set(prompts)) > 1
    assert len({length for lengths in completions for length in lengths}) > 2
    assert logged["train/num_tokens"] == 3 * sum(prompts) + tokens

    phases = {name: logged[f"train/time/{name}"] for name in ("rollout", "score", "logprobs", "update", "loading")}
    seconds = sum(phases.values())
    assert logged["train/step_time"] == pytest.approx(seconds - phases["loading"])
    assert logged["train/throughput/prompts_per_second"] == pytest.approx(5 / seconds, rel=1e-4)
    assert logged["train/throughput/completion_tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-4)
    assert 0 < phases["loading"] < 60
    assert 0.1 < logged["train/throughput/peak_memory_gib"] < 64

    held = sum(len(part) * max(part) for part in (prompts[:2], prompts[2:4], prompts[4:]))
    assert logged["train/throughput/padding/prompts"] == pytest.approx(1 - sum(prompts) / held, abs=1e-6)
    parts = [[length for lengths in completions[i : i + 2] for length in lengths] for i in (0, 2, 4)]
    held = sum(len(part) * max(part) for part in parts)
    assert logged["train/throughput/padding/completions"] == pytest.approx(1 - tokens / held, abs=1e-6)

    # Width 64 in two layers; a head of 64 x V.
    policy = module.policy
    head, pairs, forward = policy.get_output_embeddings().weight.numel(), 0, 0
    for prompt, lengths in zip(prompts, completions, strict=True):
        later = sum(lengths) - len(lengths)
        forward += 2 * decoder_weights(policy) * (prompt + later) + 2 * head * (1 + later)
        pairs += seen(prompt, None) + sum(prompt + t for length in lengths for t in range(1, length))
    forward += 4 * 64 * 2 * pairs + sum(tower_operations(policy, count) for count in rollout.prompts.patch_counts)
    # The first layer, a patch embedding, passes no gradient on.
    patches = sum(rollout.prompts.patch_counts)
    backward = 2 * forward - 2 * patches * policy.model.visual.patch_embed.proj.weight.numel()
    update, step = forward + forward + backward, 3 * forward + backward
    expected = update / (phases["logprobs"] + phases["update"]) / PEAK
    assert logged["train/throughput/mfu/update"] == pytest.approx(expected, rel=1e-4)
    assert logged["train/throughput/mfu/step"] == pytest.approx(step / logged["train/step_time"] / PEAK, rel=1e-4)

    # One key and one value head of width 32 in two layers, four bytes a number.
    reads = 0
    for prompt, lengths in zip(prompts, completions, strict=True):
        reads += sum(prompt + sum(t < length for length in lengths) * t for t in range(1, max(lengths)))
    steps = max(max(map(max, completions)) - 1, math.ceil((tokens - 15) / 6))
    floor = (steps * 4 * (decoder_weights(policy) + head) + 2 * 32 * 2 * 4 * reads) / BANDWIDTH
    assert logged["train/throughput/decode_floor_ratio"] == pytest.approx(phases["rollout"] / floor, rel=1e-4)


def test_old_log_probs_and_further_iterations_count(tiny_policy, make_trainer):
    def operations(**kwargs):
        module = grpo(tiny_policy, micro_batch_prompts=2, **kwargs)  # of one, rollout and update share the tower's pass
        (logged, *_) = fitted(module, make_trainer, data(tiny_policy), steps=2 if kwargs.get("num_iterations") else 1)
        seconds = logged["train/time/logprobs"] + logged["train/time/update"]
        forward = sum(policy_costs(module.policy).forward(piece) for piece in module.workload.trained)
        return logged["train/throughput/mfu/update"] * seconds * PEAK / forward

    once = operations(objective=GRPOObjective(beta=0.0))
    assert 2.9 < once < 3.0  # forward and backward
    assert operations(objective=GRPOObjective(beta=0.04)) == pytest.approx(once + 1, rel=1e-3)
    assert operations(objective=GRPOObjective(beta=0.0), num_iterations=2) == pytest.approx(2 * once + 1, rel=1e-3)


def test_a_tower_pass_that_rollout_and_update_share_counts_once(tiny_policy, make_trainer):
    module = grpo(tiny_policy, objective=GRPOObjective(beta=0.0), micro_batch_prompts=None)
    (logged,) = fitted(module, make_trainer, data(tiny_policy))
    costs, pieces = policy_costs(module.policy), module.workload.trained
    assert module.workload.one_tower_pass
    needed = sum(costs.forward(piece, vision=False) + costs.backward(piece) for piece in pieces)
    seconds = logged["train/time/logprobs"] + logged["train/time/update"]
    assert logged["train/throughput/mfu/update"] * seconds * PEAK == pytest.approx(needed, rel=1e-3)


def test_a_frozen_tower_counts_once(tiny_policy, make_trainer):
    module = grpo(tiny_policy, objective=GRPOObjective(beta=0.04), freeze=["vision_tower", "projector"])
    (logged,) = fitted(module, make_trainer, data(tiny_policy))
    costs, pieces = policy_costs(module.policy), module.workload.trained
    text = sum(costs.forward(piece, vision=False) for piece in pieces)
    seconds = logged["train/time/logprobs"] + logged["train/time/update"]
    assert logged["train/throughput/mfu/update"] * seconds * PEAK == pytest.approx(4 * text, rel=1e-3)
    tower = sum(costs.forward(piece) for piece in pieces) - text
    step = logged["train/throughput/mfu/step"] * logged["train/step_time"] * PEAK
    assert step == pytest.approx(5 * text + tower, rel=1e-3)


@pytest.mark.parametrize(
    ("forward", "attention"), [("packed", "sdpa"), ("packed", "eager"), ("prefix_cache", "sdpa"), ("plain", "sdpa")]
)
def test_padding_of_training_is_what_the_policy_is_given(forward, attention, tiny_policy, make_trainer):
    module = grpo(tiny_policy, forward=forward, attn_implementation=attention, micro_batch_prompts=2)
    rollouts, given = kept_rollouts(module), []
    update = module.update

    def counted(*args):
        hook = module.policy.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        try:
            return update(*args)
        finally:
            hook.remove()

    module.update = counted
    (logged,) = fitted(module, make_trainer, data(tiny_policy))
    (rollout,) = rollouts
    repeats = 3 if forward == "plain" else 1
    tokens = repeats * int(rollout.prompts.attention_mask.sum()) + int(rollout.completion_mask.sum())
    share = logged["train/throughput/padding/training"]
    assert share == pytest.approx(1 - tokens / sum(given), abs=1e-6)
    assert (share > 0) == ((forward, attention) != ("packed", "sdpa"))


def test_dynamic_sampling_counts_all_it_rolled_out_and_trains_on_some(tiny_policy, make_trainer):
    module = grpo(tiny_policy)
    rollouts = kept_rollouts(module)
    source = data(tiny_policy, batch_size=2, oversample=3, task=DetectionTask(rewards={"flat": lambda *_, **__: 1.0}))
    (logged,) = fitted(module, make_trainer, source)
    assert len(rollouts) == 3
    assert [len(piece) for piece in module.workload.rolled_out] == [2, 2, 2]
    assert [len(piece) for piece in module.workload.trained] == [2]
    seconds = logged["train/step_time"] + logged["train/time/loading"]
    assert logged["train/throughput/prompts_per_second"] == pytest.approx(6 / seconds, rel=1e-4)


def test_supervised_runs_log_what_they_have(tiny_policy, make_trainer):
    module = SFTModule(tiny_policy, schedule="constant", mini_batch_prompts=3, micro_batch_prompts=2)
    (*_, logged) = fitted(module, make_trainer, data(tiny_policy), steps=2)
    found = {name.removeprefix("train/throughput/") for name in logged if "throughput" in name}
    assert found == {
        "prompts_per_second", "completion_tokens_per_second", "padding/training", "peak_memory_gib", "mfu/update",
    }  # fmt: skip
    pieces = module.workload.trained
    assert [len(piece) for piece in pieces] == [2, 1, 2]
    costs = policy_costs(module.policy)
    operations = sum(costs.forward(piece) + costs.backward(piece) for piece in pieces)
    assert logged["train/throughput/mfu/update"] == pytest.approx(
        operations / logged["train/time/update"] / PEAK, rel=1e-4
    )
    seconds = logged["train/step_time"] + logged["train/time/loading"]
    tokens = sum(int(piece.completions.sum()) for piece in pieces)
    assert logged["train/throughput/completion_tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-4)


def test_tokens_go_on_counting_after_a_resume(tiny_policy, make_trainer, tmp_path):
    whole = [m["train/num_tokens"] for m in fitted(grpo(tiny_policy), make_trainer, data(tiny_policy), steps=3)]
    assert whole == sorted(set(whole))
    callbacks = [Throughput(), RolloutCheckpoint(dirpath=str(tmp_path))]
    make_trainer(2, callbacks=callbacks).fit(grpo(tiny_policy), datamodule=data(tiny_policy))
    record = Record()
    make_trainer(3, callbacks=[Throughput(), record]).fit(
        grpo(tiny_policy), datamodule=data(tiny_policy), ckpt_path=tmp_path / "last.ckpt"
    )
    assert record.metrics[-1]["train/num_tokens"] == whole[-1]


def test_nothing_is_logged_outside_fit_or_for_other_modules(tiny_policy, make_trainer, tmp_path):
    trainer = make_trainer(1, callbacks=[Throughput()], limit_val_batches=1)
    trainer.validate(grpo(tiny_policy), datamodule=data(tiny_policy))
    assert not any("throughput" in name or "tokens" in name for name in trainer.callback_metrics)
    trainer = make_trainer(2, callbacks=[Throughput()])
    trainer.fit(BoringModel())
    assert not any("throughput" in name or "tokens" in name for name in trainer.callback_metrics)


def test_what_the_hardware_does_is_measured_where_it_is_not_given():
    device = torch.device("cpu")
    assert 1e8 < measured_flops(device, torch.float32) < 1e14
    assert 1e8 < measured_bandwidth(device) < 1e13


@pytest.mark.parametrize("kwargs", [{"peak_flops": 0.0}, {"bandwidth": -1.0}, {"bandwidth": math.nan}])
def test_a_speed_must_be_positive(kwargs):
    with pytest.raises(ConfigConflictError, match="expected a positive number per second"):
        Throughput(**kwargs)


# Two processes


def workload(rank):
    rolled_out = [sizes([10, 6], [[4, 7], [2, 2]], [16, 16]), sizes([9 + rank], [[3, 1 + rank]], [16])]
    return Workload(
        seconds={"rollout": 2.0 + rank, "score": 0.5, "logprobs": 0.25, "update": 1.0},
        rolled_out=rolled_out,
        trained=rolled_out[: 2 - rank],
        layout="prefix_cache",
        scoring_passes=1,
        training_passes=1.0,
    )


def drive(policy, rank):
    """The hooks of two batches; returns what they logged."""
    logged = []
    module = SimpleNamespace(
        device=torch.device("cpu"),
        policy=load_policy(policy),
        workload=workload(rank),
        log_dict=lambda values, **kwargs: logged.append(values),
    )
    trainer = SimpleNamespace(precision="32-true", world_size=2)
    callback = Throughput(peak_flops=PEAK * (1 + rank), bandwidth=BANDWIDTH)
    callback.on_train_start(trainer, module)
    for _ in range(2):
        callback.on_train_batch_start(trainer, module, [0], 0)
        callback.on_train_batch_end(trainer, module, None, [0], 0)
    return logged


def worker(rank, folder, policy):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    Path(folder, f"{rank}.json").write_text(json.dumps(drive(policy, rank)))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_log_the_numbers_of_both(tmp_path, tiny_policy):
    with pytest.MonkeyPatch.context() as patch:
        # pytest imports test files under names of its own; the new processes need one they can find.
        patch.syspath_prepend(Path(__file__).parent)
        target = importlib.import_module(Path(__file__).stem).worker
        torch.multiprocessing.spawn(target, (str(tmp_path), tiny_policy), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    first, second = ranks[0]
    pieces = [piece for rank in range(2) for piece in workload(rank).rolled_out]
    tokens = sum(int((piece.prompts[:, None] + piece.completions).sum()) for piece in pieces)
    assert (first["train/num_tokens"], second["train/num_tokens"]) == (tokens, 2 * tokens)
    seconds = 4.25 + first["train/time/loading"]
    assert first["train/throughput/prompts_per_second"] == pytest.approx(6 / seconds)
    assert first["train/throughput/completion_tokens_per_second"] == pytest.approx((19 + 20) / seconds)
    assert first["train/throughput/padding/prompts"] == pytest.approx(1 - (16 + 9 + 16 + 10) / (20 + 9 + 20 + 10))

    costs = policy_costs(load_policy(tiny_policy))
    work = [workload(rank) for rank in range(2)]
    update = sum(2 * costs.forward(piece) + costs.backward(piece) for part in work for piece in part.trained)
    assert first["train/throughput/mfu/update"] == pytest.approx(update / (1.25 * 3 * PEAK))
    floor = sum(costs.decode_bytes(part.rolled_out) for part in work) / BANDWIDTH
    assert first["train/throughput/decode_floor_ratio"] == pytest.approx(5 / floor)


@pytest.mark.parametrize(
    "lora", [{"r": 4, "target_modules": ["lm_head", "q_proj"]}, {"r": 4, "modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapted_head_counts_once(family_folder, lora):
    folder = family_folder("internvl")  # its head is not tied to the embeddings
    plain, adapted = policy_costs(load_policy(folder)), policy_costs(load_policy(folder, lora=lora))
    vocabulary, width = load_policy(folder).lm_head.weight.shape
    rank = 4 * (vocabulary + width) if "target_modules" in lora else 0
    assert adapted.head.weights == plain.head.weights + rank
    assert plain.decoder.weights < adapted.decoder.weights < plain.decoder.weights + vocabulary * width
