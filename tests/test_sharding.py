"""FSDP2: the plan, gathering, and the `fsdp2` strategy on one process and on two, over gloo."""

import importlib
import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from rft_lightning import GRPOModule, SFTModule, sharded_files
from rft_lightning.callbacks import HFExport, RolloutCheckpoint
from rft_lightning.cli import main
from rft_lightning.collectives import gather_objects
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import ConfigConflictError, NonFiniteError
from rft_lightning.policy.families import FAMILIES, base_model
from rft_lightning.policy.loading import load_policy, load_processor
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.rollout import sample_groups
from rft_lightning.policy.shared_prefix import group_logprobs
from rft_lightning.sharding import FSDP2Strategy, blocks, set_gradient_sync, shard, share_weights, unsharded
from rft_lightning.tasks import DetectionTask
from rft_lightning.trainer import check_trainer

pytestmark = pytest.mark.usefixtures("leave_no_group")

LAYOUTS = ["plain", "prefix_cache", "packed"]
CONFIGS = Path(__file__).parent.parent / "configs"


def length_reward(answer, target, *, rules, step):
    return (len(answer.text) % 17) / 17


def score(model, prompt, ids, mask, layout):
    if layout == "plain":
        return plain_group_logprobs(model, prompt, ids, mask)[0]
    return group_logprobs(model, prompt, ids, mask, forward=layout)


def group(folder, rank=0, length=6):
    """Two prompts with images and three ragged completions each: others, and longer ones, on rank 1."""
    data = ShapesDataModule(processor=folder, shots=2, task=DetectionTask())
    prompt = data.encoder(data.split("train")[2 * rank : 2 * rank + 2])
    generator = torch.Generator().manual_seed(rank)
    length += 4 * rank
    ids = torch.randint(20, 300, (2, 3, length), generator=generator)
    lengths = torch.tensor([[length, 2, 3], [1, length - 1, 4]])
    return prompt, ids, torch.arange(length) < lengths[..., None]


def backward(model, logp, mask, rank=0):
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(rank))
    (logp * weights * mask).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is not None:
            gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    model.zero_grad()
    return gradients


def relative(found, expected):
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((difference / sum(gradient.square().sum() for gradient in expected.values())).sqrt())


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


# The plan


@pytest.mark.parametrize("family", FAMILIES)
def test_all_decoder_and_vision_blocks_are_found(family_folder, family):
    model = load_policy(family_folder(family))
    found = [(name, module) for name, module in model.named_modules() if module in blocks(model)]
    assert len(found) == len(blocks(model))
    for part in ("vision_tower", "language_model"):
        prefix = FAMILIES[family].parts[part][0]
        lists = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
        expected = max(len(members) for name, members in lists.items() if name.startswith(prefix))
        assert len([name for name, _ in found if name.startswith(prefix)]) == expected >= 2


def test_a_model_without_blocks_is_refused_by_name(tiny_policy):
    model = load_policy(tiny_policy)
    model._no_split_modules = {"Nothing"}
    with pytest.raises(ConfigConflictError, match=r"Qwen2VLForConditionalGeneration.*\(Nothing\).*ddp"):
        blocks(model)


def test_sharding_twice_is_sharding_once(tiny_policy, mesh):
    model = load_policy(tiny_policy)
    shard(model, mesh)
    shard(model, mesh)
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 2 + 1 + 1
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_scores_as_unsharded(family_folder, family, layout, mesh):
    if layout not in ("plain", *FAMILIES[family].layouts):
        pytest.skip("no exact layout")
    folder = family_folder(family)
    prompt, ids, mask = group(folder)
    model, sharded = load_policy(folder), load_policy(folder)
    shard(sharded, mesh)
    expected, found = score(model, prompt, ids, mask, layout), score(sharded, prompt, ids, mask, layout)
    assert (found - expected)[mask].abs().max() < 1e-5
    assert relative(backward(sharded, found, mask), backward(model, expected, mask)) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_are_sharded_with_the_model_inside(tiny_policy, layout, mesh):
    prompt, ids, mask = group(tiny_policy)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = load_policy(tiny_policy, lora={"r": 4, "init_lora_weights": False})
        models.append(model)
    model, sharded = models
    shard(sharded, mesh)
    assert isinstance(base_model(sharded), FSDPModule)
    for _ in range(2):
        with torch.no_grad(), model.disable_adapter(), sharded.disable_adapter():
            expected, found = score(model, prompt, ids, mask, layout), score(sharded, prompt, ids, mask, layout)
        assert (found - expected)[mask].abs().max() < 1e-5
        expected, found = score(model, prompt, ids, mask, layout), score(sharded, prompt, ids, mask, layout)
        gradients = backward(sharded, found, mask)
        assert all("lora" in name for name in gradients)
        assert relative(gradients, backward(model, expected, mask)) < 1e-4


# Gathering


def test_unsharded_gathers_shards_again_and_leaves_training_exact(tiny_policy, mesh):
    prompt, ids, mask = group(tiny_policy)
    model, sharded = load_policy(tiny_policy), load_policy(tiny_policy)
    shard(sharded, mesh)
    tokenizer = load_processor(tiny_policy).tokenizer
    settings = {"tokenizer": tokenizer, "max_completion_length": 5, "seed": 0}
    # As a validation before training under NCCL does it.
    with torch.inference_mode(), unsharded(sharded):
        rollouts = sample_groups(sharded, prompt, 2, **settings)
        with unsharded(sharded):  # does nothing
            assert not any(isinstance(parameter, DTensor) for parameter in sharded.parameters())
        assert not any(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    assert rollouts.texts == sample_groups(model, prompt, 2, **settings).texts
    for _ in range(2):
        expected, found = score(model, prompt, ids, mask, "plain"), score(sharded, prompt, ids, mask, "plain")
        assert relative(backward(sharded, found, mask), backward(model, expected, mask)) < 1e-4
        with torch.no_grad(), unsharded(sharded):
            score(sharded, prompt, ids, mask, "plain")


def test_unsharded_does_nothing_to_a_model_that_is_not_sharded(tiny_policy):
    model = load_policy(tiny_policy)
    with unsharded(model):
        pass
    set_gradient_sync(model, sync=False, last=True)


def test_nothing_stays_gathered_after_a_forward(tiny_policy, mesh):
    prompt, ids, mask = group(tiny_policy)
    model = load_policy(tiny_policy)
    shard(model, mesh)
    for inside in (nullcontext(), unsharded(model), nullcontext()):
        with torch.no_grad(), inside:
            score(model, prompt, ids, mask, "prefix_cache")
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize(("param_dtype", "used"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_param_dtype_is_that_of_the_gathered_weights(tiny_policy, mesh, param_dtype, used):
    prompt, ids, mask = group(tiny_policy)
    model = load_policy(tiny_policy)
    shard(model, mesh, param_dtype=param_dtype)
    with unsharded(model):
        assert {parameter.dtype for parameter in model.parameters()} == {used}
    with torch.autocast("cpu", torch.bfloat16, enabled=param_dtype is not None, cache_enabled=False):
        logp = score(model, prompt, ids, mask, "prefix_cache")
    assert {gradient.dtype for gradient in backward(model, logp, mask).values()} == {torch.float32}


# The strategy on one process


def trainer(folder, steps, strategy, **settings):
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    defaults = {
        "accelerator": "cpu", "devices": devices, "max_epochs": -1, "logger": False,
        "enable_checkpointing": "callbacks" in settings, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False, "log_every_n_steps": 1, "limit_val_batches": 0, "default_root_dir": folder,
    }  # fmt: skip
    return Trainer(max_steps=steps, strategy=strategy, **{**defaults, **settings})


def data(policy, batch_size):
    task = DetectionTask(rewards={"length": length_reward}, reward_weights={"length": 1.0})
    return ShapesDataModule(
        processor=policy, seed=0, shots=2, val_size=5, eval_batch_size=1, batch_size=batch_size, task=task
    )


class SFT(SFTModule):
    """Three steps of SGD with micro-batches; says which samples it saw and how long its clipped gradients were."""

    def __init__(self, policy, **kwargs):
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.3)  # noqa: E731
        super().__init__(policy, optimizer=sgd, schedule="constant", micro_batch_prompts=1, seed=0, **kwargs)
        self.seen, self.norms = [], []

    def on_fit_start(self):
        super().on_fit_start()
        self.start = weights(self)

    def training_step(self, batch, batch_idx):
        self.seen += [sample.id for sample in batch.samples]
        super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        full = [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        self.norms.append(float(torch.stack([gradient.norm() for gradient in full]).norm()))


class GRPO(GRPOModule):
    """Two optimiser steps per batch, and longer completions on rank 1."""

    def __init__(self, policy, *, mini_batch_prompts=1, optimizer=torch.optim.AdamW, **kwargs):
        lr = 1e-3 if optimizer is torch.optim.AdamW else 0.1
        super().__init__(
            policy, optimizer=lambda parameters: optimizer(parameters, lr=lr), group_size=3, schedule="constant",
            seed=0, mini_batch_prompts=mini_batch_prompts, **kwargs,
        )  # fmt: skip

    def setup(self, stage):
        self.max_completion_length = 3 + 4 * self.global_rank


def weights(module):
    state = {}
    for name, value in module.policy.state_dict().items():
        state[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return state


def furthest(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_one_process_under_fsdp2_trains_as_without(tiny_policy, tmp_path):
    states = {}
    for strategy in ("auto", "fsdp2"):
        module = GRPO(tiny_policy, num_iterations=2)
        run = trainer(tmp_path, 4, strategy, limit_val_batches=1.0, val_check_interval=1)
        run.fit(module, data(tiny_policy, 2))
        states[strategy] = weights(module)
    assert module.device_mesh["data_parallel"].shape == (1,)
    assert isinstance(module._reference[0], FSDPModule)
    assert furthest(states["auto"], load_policy(tiny_policy).state_dict()) > 1e-3
    assert furthest(states["auto"], states["fsdp2"]) < 1e-5


SETTINGS = {"lora": {"lora": {"r": 4}}, "frozen": {"freeze": ["vision_tower"]}, "sgd": {"optimizer": torch.optim.SGD}}


@pytest.mark.parametrize(
    ("first", "second"), [("auto", "fsdp2"), ("fsdp2", "auto"), ("fsdp2", "fsdp2"), ("file", "auto"), ("file", "fsdp2")]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_may_go_on_under_another_strategy(tiny_policy, tmp_path, name, first, second):
    """Though not all weights have a state in the optimiser."""
    whole, half, rest = (GRPO(tiny_policy, **SETTINGS[name]) for _ in range(3))
    trainer(tmp_path, 4, "auto").fit(whole, data(tiny_policy, 2))
    keep = RolloutCheckpoint(every_n_steps=100, dirpath=str(tmp_path))
    strategy = FSDP2Strategy(save_distributed_checkpoint=False) if first == "file" else first
    trainer(tmp_path, 2, strategy, callbacks=[keep]).fit(half, data(tiny_policy, 2))
    assert (tmp_path / "last.ckpt").is_dir() == (first == "fsdp2")
    trainer(tmp_path, 4, second).fit(rest, data(tiny_policy, 2), ckpt_path=str(tmp_path / "last.ckpt"))
    assert furthest(weights(half), weights(whole)) > 1e-3
    assert furthest(weights(rest), weights(whole)) < 1e-5


@pytest.mark.parametrize(
    ("first", "second"), [("file", "fsdp2"), ("fsdp2", "fsdp2"), ("auto", "fsdp2"), ("file", "auto")]
)
def test_parameters_that_are_never_used_have_no_state_afterwards_either(family_folder, tmp_path, first, second):
    """LLaVA-OneVision's tower ends in a norm whose output nothing takes."""
    policy = family_folder("llava_onevision")
    adamw = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    whole, half, rest = (SFTModule(policy, optimizer=adamw, schedule="constant", seed=0) for _ in range(3))
    trainer(tmp_path, 4, "auto").fit(whole, data(policy, 2))
    keep = RolloutCheckpoint(every_n_steps=100, dirpath=str(tmp_path))
    strategy = FSDP2Strategy(save_distributed_checkpoint=False) if first == "file" else first
    trainer(tmp_path, 2, strategy, callbacks=[keep]).fit(half, data(policy, 2))
    run = trainer(tmp_path, 4, second)
    run.fit(rest, data(policy, 2), ckpt_path=str(tmp_path / "last.ckpt"))
    assert furthest(weights(half), weights(whole)) > 1e-3
    assert furthest(weights(rest), weights(whole)) < 1e-5
    without = [n for n, p in rest.named_parameters() if p not in run.optimizers[0].state]
    assert without
    assert all("post_layernorm" in name for name in without)


def test_validation_before_fit_and_the_command_line(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = (
        "--config", str(CONFIGS / "quickstart.yaml"), "--model.policy", tiny_policy, "--trainer.strategy", "fsdp2",
        "--model.max_completion_length", "4", "--data.batch_size", "2", "--data.shots", "2", "--data.val_size", "2",
        "--trainer.max_steps", "1", "--trainer.val_check_interval", "1",
    )  # fmt: skip
    main(["validate", *common])
    main(["fit", *common])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    exported = load_policy(str(tmp_path / "runs/quickstart/policy")).state_dict()
    saved = sharded_files.load_checkpoint(checkpoint)["state_dict"]
    assert furthest({name.removeprefix("policy."): value for name, value in saved.items()}, exported) == 0


# What is refused


@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_precisions_are_refused_though_the_strategy_is_chosen_by_name(tiny_policy, tmp_path, precision):
    with pytest.raises(ConfigConflictError, match=r"32-true|model\.dtype"):
        trainer(tmp_path, 1, "fsdp2", precision=precision).fit(SFTModule(tiny_policy), data(tiny_policy, 2))


def test_lightnings_own_strategy_is_refused(tiny_policy):
    with pytest.raises(ConfigConflictError, match=r"ModelParallelStrategy.*same batches.*fsdp2"):
        check_trainer(SimpleNamespace(strategy=ModelParallelStrategy()))
    assert isinstance(Trainer(strategy="fsdp2", accelerator="cpu", devices=2, logger=False).strategy, FSDP2Strategy)


def test_sync_gradients_is_checked(tiny_policy):
    with pytest.raises(ConfigConflictError, match="sync_gradients micro_batch or step, found 'never'"):
        SFTModule(tiny_policy, sync_gradients="never")


# Two processes


SFT_CASES = {
    "micro_batch": {"sync_gradients": "micro_batch", "max_grad_norm": None},
    "step": {"sync_gradients": "step", "max_grad_norm": None},
    "clipped": {"sync_gradients": "micro_batch", "max_grad_norm": 0.1},
    "bf16-mixed": {"max_grad_norm": None},
    "lora": {"lora": {"r": 4}},
    "frozen": {"freeze": ["vision_tower"], "gradient_checkpointing": True},
    "bf16-true": {"max_grad_norm": None},
    "two copies": {"max_grad_norm": 0.1},
    "in host memory": {"max_grad_norm": 0.1},
}
STRATEGIES = {"two copies": {"shard_size": 1}, "in host memory": {"offload_policy": True, "offload_reference": True}}


def train_sft(policy, folder, case, batch_size, strategy):
    module = SFT(policy, **SFT_CASES[case])
    precision = case if case.startswith("bf16") else "32-true"
    if strategy == "fsdp2" and case in STRATEGIES:
        strategy = FSDP2Strategy(**STRATEGIES[case])
    run = trainer(folder, 3, strategy, precision=precision)
    run.fit(module, data(policy, batch_size))
    moved = furthest(weights(module), module.start)
    mesh = None if module.device_mesh is None else tuple(run.strategy.shard_mesh.shape)
    return {"weights": weights(module), "moved": moved, "seen": module.seen, "norms": module.norms, "mesh": mesh}


def compare_scores(policy, rank, layout, mesh):
    """Largest difference of log-probs, and that of the gradients averaged over both processes."""
    prompt, ids, mask = group(policy, rank)
    model, sharded = load_policy(policy), load_policy(policy)
    shard(sharded, mesh)
    expected, found = score(model, prompt, ids, mask, layout), score(sharded, prompt, ids, mask, layout)
    averaged = backward(model, expected, mask, rank)
    for gradient in averaged.values():
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return float((found - expected)[mask].abs().max()), relative(backward(sharded, found, mask, rank), averaged)


def count_communication(policy, mesh):
    """Gathers in a rollout, and sums of gradients over two micro-batches."""
    model = load_policy(policy)
    shard(model, mesh)
    tokenizer = load_processor(policy).tokenizer
    prompt, ids, mask = group(policy)
    with CommDebugMode() as communication, unsharded(model):
        sample_groups(model, prompt, 2, tokenizer=tokenizer, max_completion_length=6, seed=0)
    counts = {"rollout": communication.get_total_counts()}
    for sync_gradients in ("micro_batch", "step"):
        with CommDebugMode() as communication:
            for last in (False, True):
                set_gradient_sync(model, sync=last or sync_gradients == "micro_batch", last=last)
                score(model, prompt, ids, mask, "plain").sum().backward()
        operations = {str(operation): count for operation, count in communication.get_comm_counts().items()}
        counts[sync_gradients] = sum(count for name, count in operations.items() if "reduce_scatter" in name)
    return counts


class BadOnRankOne(GRPO):
    def advantages(self, *args):
        return super().advantages(*args) + (float("nan") if self.global_rank == 1 else 0.0)


def bad_loss(policy, folder):
    try:
        trainer(folder, 2, "fsdp2").fit(BadOnRankOne(policy), data(policy, 2))
    except NonFiniteError as error:
        return str(error)
    return ""


class Counted(Callback):
    """How many predictions there are over all processes."""

    counted = 0

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counted += sum(gather_objects(len(outputs["predictions"])))


def train_grpo(policy, folder):
    """Four steps at once, and two of them in a second run that resumes a first."""
    validate = {"limit_val_batches": 1.0, "val_check_interval": 1}
    runs = {}
    for name, steps, source in (("whole", 4, None), ("half", 2, None), ("resumed", 4, f"{folder}/half/last.ckpt")):
        runs[name] = GRPO(policy)
        callbacks = [RolloutCheckpoint(every_n_steps=100, dirpath=f"{folder}/{name}"), HFExport(f"{folder}/{name}/hf")]
        run = trainer(folder, steps, "fsdp2", callbacks=callbacks, **validate)
        run.fit(runs[name], data(policy, 2), ckpt_path=source)
    evaluated = GRPO(policy)
    trainer(folder, 1, "fsdp2", **validate).validate(evaluated, data(policy, 2), ckpt_path=source)
    few = data(policy, 2)
    few.setup("validate")
    few._splits["val"] = few.split("val")[:1]
    for gathers in (True, False):
        run = trainer(folder, 1, FSDP2Strategy(gather_for_rollouts=gathers), callbacks=[Counted()], **validate)
        run.validate(GRPO(policy), few)
        assert run.callbacks[0].counted == 1
    return {name: weights(module) for name, module in {**runs, "evaluated": evaluated}.items()}


IN_STEP = {
    "native": {},
    "the model's own cache": {"attn_implementation": "eager"},
    "frozen features": {"freeze": ["vision_tower", "projector"], "rollout_prompts": 1},
    "adapters": {"lora": {"r": 4}},
}


def decode_in_step(policy, folder, settings):
    """Two steps and validations, with the whole policy on each process in rollouts and without."""
    found = []
    for gathers in (True, False):
        module = GRPO(policy, **settings)
        strategy = FSDP2Strategy(gather_for_rollouts=gathers)
        run = trainer(folder, 4, strategy, limit_val_batches=1.0, val_check_interval=1)
        run.validate(module, data(policy, 2))
        run.fit(module, data(policy, 2))
        found.append(weights(module))
    return found


def start_from_rank_0(rank, folder, mesh, lora):
    """How far a model whose weights rank 0 alone has read scores from one that was loaded here."""
    torch.manual_seed(0)
    whole = load_policy(folder, lora=lora)
    torch.manual_seed(rank)  # new adapters are drawn: those of rank 0 count
    model = load_policy(folder, lora=lora, skeleton=rank > 0)
    assert all(parameter.is_meta == (rank > 0) for parameter in model.parameters())
    weights = model.state_dict() if rank == 0 else {}
    shard(model, mesh)
    share_weights(model, weights)
    prompt, ids, mask = group(folder, rank)
    with torch.no_grad():
        expected, found = score(whole, prompt, ids, mask, "plain"), score(model, prompt, ids, mask, "plain")
    assert base_model(model).generation_config.to_dict() == base_model(whole).generation_config.to_dict()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        name: p.requires_grad for name, p in whole.named_parameters()
    }
    return float((found - expected)[mask].abs().max())


def worker(rank, folder, policy, families):
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # Lightning then starts no further processes
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results = {"scores": {layout: compare_scores(policy, rank, layout, mesh) for layout in LAYOUTS}}
    results["starts"] = {
        (family, adapted): start_from_rank_0(
            rank, path, mesh, {"r": 4, "init_lora_weights": False} if adapted else None
        )
        for family, path in families.items()
        for adapted in (False, True)
    }
    results["counts"] = count_communication(policy, mesh)
    results["sft"] = {case: train_sft(policy, folder, case, 2, "fsdp2") for case in SFT_CASES}
    results["error"] = bad_loss(policy, folder)
    results["grpo"] = train_grpo(policy, folder)
    results["in steps"] = {name: decode_in_step(policy, folder, settings) for name, settings in IN_STEP.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_policy, family_folder):
    """What each of two processes found, and the folder they wrote to; they start once, which takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        # pytest imports test files under names of its own; the new processes need one they can find.
        patch.syspath_prepend(Path(__file__).parent)
        target = importlib.import_module(Path(__file__).stem).worker
        torch.multiprocessing.spawn(
            target, (str(folder), tiny_policy, {name: family_folder(name) for name in FAMILIES}), nprocs=2
        )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], folder


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_score_as_unsharded(two, layout):
    for rank in two[0]:
        difference, gradient = rank["scores"][layout]
        assert difference < 1e-5
        assert gradient < 1e-4


@pytest.mark.distributed
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_processes_get_their_parts_from_rank_0(two, family, adapted):
    for rank in two[0]:
        assert rank["starts"][family, adapted] < 1e-5


@pytest.mark.distributed
def test_how_often_each_unit_communicates(two):
    units = 2 + 1 + 1
    for rank in two[0]:
        assert rank["counts"] == {"rollout": units, "micro_batch": 2 * units, "step": units}


@pytest.mark.distributed
@pytest.mark.parametrize("case", SFT_CASES)
def test_two_processes_make_the_supervised_update_of_one(two, tiny_policy, tmp_path, case):
    first, second = (rank["sft"][case] for rank in two[0])
    one = train_sft(tiny_policy, tmp_path, case, 4, "auto")
    assert first["mesh"] == second["mesh"] == ((2, 1) if case == "two copies" else (2,))
    assert one["moved"] > 1e-3
    assert furthest(first["weights"], second["weights"]) == 0
    assert furthest(first["weights"], one["weights"]) < (0.05 if case.startswith("bf16") else 1e-3) * one["moved"]
    for step in range(3):
        both = first["seen"][2 * step : 2 * step + 2] + second["seen"][2 * step : 2 * step + 2]
        assert both == one["seen"][4 * step : 4 * step + 4]
    if case in ("clipped", *STRATEGIES):
        assert first["norms"] == pytest.approx([0.1] * 3, rel=1e-4)
        assert one["norms"] == pytest.approx([0.1] * 3, rel=1e-4)


@pytest.mark.distributed
def test_a_bad_loss_on_one_process_names_its_samples_on_both(two):
    first, second = two[0]
    seen = [rank["sft"]["micro_batch"]["seen"][0] for rank in two[0]]
    for error in (first["error"], second["error"]):
        assert re.search(rf"Samples of the step: {seen[1]}\. The weights", error)
        assert re.search(r"[1-9]\d* gradients are not finite \(model", error)


def test_generate_must_have_the_whole_policy(tiny_policy, tmp_path):
    module = GRPO(tiny_policy, rollout_engine="hf")
    with pytest.raises(ConfigConflictError, match=r"rollout_engine is hf.*gather_for_rollouts false.*native"):
        trainer(tmp_path, 1, FSDP2Strategy(gather_for_rollouts=False)).fit(module, data(tiny_policy, 2))
    run = trainer(tmp_path, 1, "fsdp2", limit_val_batches=1)
    run.validate(module, data(tiny_policy, 2))  # encodes images past the root, before anything else has run


def test_groups_of_processes_must_be_of_one_size(tiny_policy, tmp_path):
    with pytest.raises(ConfigConflictError, match="shard_size is 2, which does not divide the 1 processes"):
        trainer(tmp_path, 1, FSDP2Strategy(shard_size=2)).fit(GRPO(tiny_policy), data(tiny_policy, 2))


@pytest.mark.distributed
@pytest.mark.parametrize("name", IN_STEP)
def test_a_policy_that_is_never_gathered_learns_the_same(two, tiny_policy, name):
    """Though completions end at other steps on the processes, and they validate on 3 and on 2 pictures."""
    start = load_policy(tiny_policy).state_dict()
    for rank in two[0]:
        gathered, in_step = rank["in steps"][name]
        if name != "adapters":
            assert furthest(gathered, start) > 1e-3
        assert furthest(gathered, in_step) < 1e-5


@pytest.mark.distributed
def test_grpo_on_two_processes_saves_a_folder(two, tiny_policy):
    """Though their completions differ in length, and they validate on 3 and on 2 pictures."""
    (first, second), folder = two
    start = load_policy(tiny_policy).state_dict()
    ours = first["grpo"]["whole"]
    assert furthest(ours, start) > 1e-3
    assert furthest(ours, second["grpo"]["whole"]) == 0
    path = folder / "whole" / "last.ckpt"
    assert {file.name for file in path.iterdir()} == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"}
    saved = sharded_files.load_checkpoint(path)["state_dict"]
    assert saved.keys() == {f"policy.{name}" for name in start}  # and no reference model
    assert furthest(ours, {name: saved[f"policy.{name}"] for name in start}) == 0
    assert furthest(ours, load_policy(str(folder / "whole" / "hf")).state_dict()) == 0


@pytest.mark.distributed
def test_a_checkpoint_is_resumed_and_evaluated_by_two_processes(two):
    for rank in two[0]:
        runs = rank["grpo"]
        assert furthest(runs["half"], runs["whole"]) > 1e-3
        assert furthest(runs["resumed"], runs["whole"]) == 0
        assert furthest(runs["evaluated"], runs["half"]) == 0


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_a_checkpoint_is_resumed_by_one_process(two, tiny_policy, tmp_path, strategy):
    """With the optimiser's state: the next step is the one that two processes make."""
    (first, _), folder = two
    alone = GRPO(tiny_policy, mini_batch_prompts=2)
    alone.load_for_sampling(str(folder / "half" / "last.ckpt"))
    assert furthest(first["grpo"]["half"], weights(alone)) == 0
    run = trainer(tmp_path, 4, strategy)
    run.fit(alone, data(tiny_policy, 4), ckpt_path=str(folder / "half" / "last.ckpt"))
    assert run.global_step == 4
    assert run.optimizers[0].state_dict()["state"][0]["step"] == 4
    assert furthest(weights(alone), first["grpo"]["half"]) > 1e-3
