"""Whole runs of the command line as the tests of scale and survival start, watch, kill and compare them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
POLICY = "asset:tiny-qwen2-vl"

# Processes are forked from one that has imported what takes long; each would take ten seconds to do so by itself.
PRELOAD = ["rft_lightning.cli", "transformers.optimization", "transformers.models.qwen2_vl.modeling_qwen2_vl"]
sys.path.insert(0, str(HERE))
import probes  # noqa: E402

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOAD)


def task(name: str) -> dict:
    rewards = {"rewards": {"length": "probes.length_reward"}, "reward_weights": {"length": 1.0}}
    return {"class_path": f"rft_lightning.tasks.{name}", "init_args": rewards}


def configuration(*, processes: int = 1, prompts: int = 4, strategy="auto", steps: int = 5, lr: float = 1.0,
                  optimizer: str = "SGD", lora: bool = False, callbacks=(), save_every: int = 100,
                  trainer=None, model=None, data=None, objective=None) -> dict:  # fmt: skip
    """Changes to the quickstart: three kinds of questions (prompts of different lengths), an unsteady policy.

    Args:
        processes: W.
        prompts: of a global batch, over all processes.
        strategy: the Trainer's.
        steps: optimiser steps.
        lr: learning rate.
        optimizer: a class of torch.optim.
        lora: adapters instead of all weights.
        callbacks: beside RolloutCheckpoint and the Journal.
        save_every: steps between checkpoints; one is always written at the end.
        trainer: further arguments of the Trainer; so `model` and `data`.
        objective: further arguments of the GRPOObjective.
    """
    checkpoint = {"every_n_steps": save_every, "dirpath": "checkpoints"}
    lora_settings = {"lora": {"r": 4, "lora_alpha": 16}} if lora else {}
    return {
        "trainer": {
            "devices": processes, "strategy": strategy, "max_steps": steps, "val_check_interval": 3,
            "num_sanity_val_steps": 0, "limit_val_batches": 0, "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}}],
            "callbacks": [
                {"class_path": "rft_lightning.callbacks.RolloutCheckpoint", "init_args": checkpoint},
                {"class_path": "probes.Journal"},
                *callbacks,
            ],
            **(trainer or {}),
        },
        "model": {
            "class_path": "probes.Recorder",
            "init_args": {
                "policy": POLICY, "group_size": 3, "max_completion_length": 32, "temperature": 1.5,
                "micro_batch_prompts": 1, "schedule": "constant",
                "optimizer": {"class_path": f"torch.optim.{optimizer}", "init_args": {"lr": lr, "weight_decay": 0.0}},
                "objective": {
                    "class_path": "rft_lightning.GRPOObjective",
                    "init_args": {"loss_type": "dapo", "beta": 0.5, **(objective or {})},
                },
                **lora_settings, **(model or {}),
            },
        },
        "data": {
            "init_args": {
                "batch_size": prompts // processes, "eval_batch_size": 4, "shots": None, "train_size": 7, "val_size": 3,
                "task": [task("DetectionTask"), task("ClassificationTask"), task("GroundingTask")],
                **(data or {}),
            },
        },
    }  # fmt: skip


def resuming(checkpoint: Path) -> tuple[str, str]:
    return ("--ckpt_path", str(checkpoint))


def words(folder: Path, settings: dict, *more: str) -> list[str]:
    """The command line of a `fit`, whose changes it writes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "changes.yaml").write_text(json.dumps(settings))
    return ["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", "changes.yaml", *more]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Run:
    """The processes of one `fit`, all on this machine."""

    def __init__(self, folder: Path, settings: dict, *more: str) -> None:
        self.folder, count = folder, settings["trainer"]["devices"]
        command, port = words(folder, settings, *more), str(free_port())
        self.processes = []
        for rank in range(count):
            variables = {"OMP_NUM_THREADS": "1"}
            if count > 1:  # Lightning then starts none itself
                variables |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = FORKS.Process(target=probes.serve, args=(str(folder), command, variables))
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, timeout: float) -> list[int | None]:
        """The exit statuses."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_for(self, step: int, timeout: float = 100) -> None:
        """Until `step` was made, or the run has ended."""
        end = time.monotonic() + timeout
        while self.running and all(line["step"] < step for line in steps(self.folder)):
            assert time.monotonic() < end, f"{self.folder} did not reach step {step}"
            time.sleep(0.002)

    def kill(self) -> None:
        """SIGKILL to each process and those it started, as when a machine dies; harmless for what has ended."""
        for process in self.processes:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def log(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in sorted(self.folder.glob("log-*.txt")))


@contextmanager
def started(folder: Path, settings: dict, *more: str):
    """A run that does not outlive the block."""
    run = Run(folder, settings, *more)
    try:
        yield run
    finally:
        run.kill()


def fit(folder: Path, settings: dict, *more: str, timeout: float = 300) -> Path:
    """A whole run; returns its checkpoint."""
    with started(folder, settings, *more) as run:
        statuses = run.wait(timeout)
    assert set(statuses) == {0}, f"exit statuses {statuses}\n{run.log()}"
    return last(folder)


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def _lines(files) -> list[dict]:
    """Of JSON files; one that is being written may end inside a line."""
    return [json.loads(line) for file in files for line in file.read_text().splitlines(True) if line.endswith("\n")]


def steps(folder: Path) -> list[dict]:
    return _lines(folder.glob("steps.jsonl"))


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss; of a step that was made twice, the later one."""
    return {line["step"]: line["loss"] for line in steps(folder)}


def rollouts(folder: Path, rank: int | str = "*") -> dict[tuple, dict]:
    """(step, sample, occurrence) -> what was rolled out for it; of a step that was made twice, the later one."""
    lines = _lines(sorted(folder.glob(f"rollouts-{rank}.jsonl")))
    return {(line.pop("step"), line.pop("sample"), line.pop("occurrence")): line for line in lines}


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights and the optimiser's tensors in a checkpoint, by name; a folder is read by torch's own means."""
    if not checkpoint.is_dir():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return tensors({"state_dict": state["state_dict"], "optimizer": state["optimizer_states"]})
    with tempfile.NamedTemporaryFile() as whole:
        dcp_to_torch_save(checkpoint, whole.name)
        return tensors(torch.load(whole.name, weights_only=True))


def step_of(checkpoint: Path) -> int:
    """Optimiser steps that a checkpoint has behind it."""
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    return torch.load(file, map_location="cpu", weights_only=True)["global_step"]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of the policy in a checkpoint, or those that it trains."""
    prefix = "state_dict.policy."
    return {name.removeprefix(prefix): w for name, w in saved(checkpoint).items() if name.startswith(prefix)}


def tensors(value, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dictionaries and lists, by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {path: tensor for key, part in items for path, tensor in tensors(part, f"{name}.{key}".strip(".")).items()}


def flat(state: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> torch.Tensor:
    """All changes since `start` as one vector, in double precision."""
    assert state.keys() == start.keys()
    return torch.cat([(state[name].double() - start[name].double()).flatten() for name in sorted(state)])
