"""The table of docs/tuning.md: what works where. Cells that no other file tests train here on two processes."""

import importlib
import os
import re
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from lightning.pytorch import Trainer
from torch.distributed.tensor import DTensor

from rft_lightning import SFTModule
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.families import PARTS, part_parameters
from rft_lightning.policy.loading import checkpointing_active
from rft_lightning.sharding import FSDP2Strategy
from rft_lightning.trainer import check_trainer

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "tuning.md"


def matrix() -> dict[tuple[str, str], str]:
    """The cells of the table by row and column."""
    rows = [line.strip("| ").split(" | ") for line in DOC.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    first = next(number for number, row in enumerate(rows) if "FSDP2" in row)
    columns, body = rows[first], rows[first + 2 :]
    return {(row[0], column): cell for row in body for column, cell in zip(columns[1:], row[1:], strict=True)}


def sft(policy, **options):
    return SFTModule(policy, **{"schedule": "constant", "seed": 0, "micro_batch_prompts": 1, **options})


def data(policy, batch_size):
    return ShapesDataModule(processor=policy, seed=0, shots=2, val_size=2, batch_size=batch_size)


# What each cell says


def test_every_cell_is_tested_or_refused_or_does_not_apply():
    cells = matrix()
    assert {column for _, column in cells} == {"one device", "DDP", "FSDP2", "HSDP"}
    for place, cell in cells.items():
        assert re.match(r"tested \(`test_\w+`|refused: |does not apply: ", cell), (place, cell)


def test_the_tests_that_are_named_exist():
    named = set(re.findall(r"`(test_\w+)`", DOC.read_text(encoding="utf-8")))
    assert named
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in named)
    assert {place for place, cell in matrix().items() if f"`{Path(__file__).stem}`" in cell} == CELLS.keys()


def under(strategy, **kwargs):
    """A check of a Trainer with this strategy."""
    settings = {"precision": "32-true", "accumulate_grad_batches": 1, "gradient_clip_val": None}
    check_trainer(SimpleNamespace(strategy=strategy, **settings), **kwargs)


def test_what_is_refused_is_refused_for_that_reason(tiny_policy, make_trainer):
    def sharded(**options):
        module = sft(tiny_policy, optimizer=lambda parameters: bnb.optim.AdamW8bit(parameters, lr=1e-2))
        make_trainer(1, strategy=FSDP2Strategy(**options)).fit(module, datamodule=data(tiny_policy, 2))

    refusals = {
        ("QLoRA", "FSDP2"): lambda: under(FSDP2Strategy(), quantize="nf4"),
        ("QLoRA", "HSDP"): lambda: under(FSDP2Strategy(shard_size=2), quantize="nf4"),
        ("8-bit optimiser", "FSDP2"): sharded,
        ("8-bit optimiser", "HSDP"): lambda: sharded(shard_size=1),
    }
    refused = {place: cell.removeprefix("refused: ") for place, cell in matrix().items() if cell.startswith("refused")}
    assert refused.keys() == refusals.keys()
    for place, reason in refused.items():
        with pytest.raises(ConfigConflictError, match=re.escape(reason)):
            refusals[place]()


# Two processes beside one

# Settings of the module, of the Trainer and of FSDP2 by row of the table.
TOWER = {"freeze": ["vision_tower"]}
BF16 = {"precision": "bf16-true"}
CELLS = {
    ("freeze", "DDP"): (TOWER, {}, {}),
    ("freeze", "HSDP"): (TOWER, {}, {}),
    ("bf16-true", "DDP"): ({}, BF16, {}),
    ("bf16-true", "HSDP"): ({}, BF16, {}),
    ("gradient checkpointing", "HSDP"): ({"gradient_checkpointing": True}, {}, {}),
    ("CPU offload", "HSDP"): ({}, {}, {"offload_policy": True, "offload_reference": True}),
}
# Float32 adapters, and modules trained whole in float32, among weights in bfloat16: the output head and the projector's
# adapters are in one unit of FSDP2, which takes trained weights of one dtype alone; a tower has units of its own.
ADAPTED = {
    "head": {"lora": {"r": 4, "modules_to_save": ["lm_head"]}},
    "tower": {"lora": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["visual"]}},
}
MIXED = {
    (name, column): ({**settings, "dtype": "bfloat16"}, {"precision": precision}, {})
    for name, settings in ADAPTED.items()
    for column, precision in (("DDP", "bf16-true"), ("FSDP2", "bf16-true"), ("HSDP", "bf16-mixed"))
}
CASES = {**CELLS, **MIXED}


def whole(parameter):
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


class Watched(SFTModule):
    """Says what it was at the start and during training."""

    def on_fit_start(self):
        super().on_fit_start()
        self.start = {name: whole(parameter) for name, parameter in self.policy.named_parameters()}

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.checkpoints = checkpointing_active(self.policy)


def train(policy, folder, case, strategy, *, processes, batch_size):
    """Three steps of SGD; how the weights changed, and what the run was like."""
    options, settings, _ = CASES[case]
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.3)  # noqa: E731
    module = Watched(policy, optimizer=sgd, schedule="constant", micro_batch_prompts=1, seed=0, **options)
    run = Trainer(
        max_steps=3, strategy=strategy, accelerator="cpu", devices=processes, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        use_distributed_sampler=False, default_root_dir=folder, **settings,
    )  # fmt: skip
    run.fit(module, data(policy, batch_size))
    parameters = dict(module.policy.named_parameters())
    return {
        "change": {name: whole(p) - module.start[name] for name, p in parameters.items() if p.requires_grad},
        "frozen": all(torch.equal(whole(p), module.start[n]) for n, p in parameters.items() if not p.requires_grad),
        "parts": [
            part for part in PARTS if all(p.requires_grad for p in part_parameters(module.policy, part).values())
        ],
        "dtypes": {str(p.dtype) for p in parameters.values() if p.requires_grad},
        "checkpoints": module.checkpoints,
        "mesh": tuple(run.strategy.shard_mesh.shape) if isinstance(run.strategy, FSDP2Strategy) else None,
    }


def strategy_of(case):
    if case[1] == "DDP":
        return "ddp"
    return FSDP2Strategy(shard_size=1 if case[1] == "HSDP" else None, **CASES[case][2])


def worker(rank, folder, policy):
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # Lightning then starts no further processes
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {case: train(policy, folder, case, strategy_of(case), processes=2, batch_size=2) for case in CASES}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_policy):
    """What each of two processes found; they start once, which takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        # pytest imports test files under names of its own; the new processes need one they can find.
        patch.syspath_prepend(Path(__file__).parent)
        target = importlib.import_module(Path(__file__).stem).worker
        torch.multiprocessing.spawn(target, (str(folder), tiny_policy), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_two_processes_make_the_update_of_one(two, tiny_policy, tmp_path, case):
    first, second = (rank[case] for rank in two)
    one = train(tiny_policy, tmp_path, case, "auto", processes=1, batch_size=4)
    assert first["change"].keys() == one["change"].keys()
    assert all(torch.equal(first["change"][name], change) for name, change in second["change"].items())
    expected, found = (torch.cat([c.flatten().double() for c in run["change"].values()]) for run in (one, first))
    assert expected.abs().max() > 1e-3
    # Gradients are summed over processes in another order, which weights in bfloat16 round otherwise.
    assert (found - expected).norm() < (0.05 if case[0] == "bf16-true" else 1e-3) * expected.norm()
    for run in (one, first):
        assert run["frozen"]
        if case in CELLS:
            assert run["parts"] == [part for part in PARTS if case[0] != "freeze" or part != "vision_tower"]
        assert run["dtypes"] == {"torch.bfloat16" if case[0] == "bf16-true" else "torch.float32"}
        assert run["checkpoints"] == (case[0] == "gradient checkpointing")
    assert first["mesh"] == {"DDP": None, "FSDP2": (2,), "HSDP": (2, 1)}[case[1]]
