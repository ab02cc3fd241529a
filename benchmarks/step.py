"""A whole training step beside TRL's GRPOTrainer: rollout, rewards, reference model, update and optimiser.

    python benchmarks/step.py --output step.json

Both train the same random policy (step_config.json) with the same pictures, questions, rewards, optimiser, beta and
loss, in their own training loops, each in its own process. They take turns: one makes a step while the other waits.
Completions are forced to a fixed length. A step begins where the step before ended, so loading and encoding of the
prompts are in it. Printed are medians of seconds, the ratio of each pair of steps that follow one another, and the
largest memory that each process had. Without a CUDA device the small policy is trained in float32, with one the
Qwen2-VL-2B-shaped policy in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from random_policy import build, machine, now, sizes

BETA, LEARNING_RATE, TRAINERS = 0.04, 1e-6, ("trl", "ours")
MARK = "step: "


# The two trainers -----------------------------------------------------------------------------------------------------


class Turns:
    """A worker's side of taking turns: ended() reports a step and waits for the next turn."""

    def __init__(self) -> None:
        self.begun: float | None = None

    def ended(self) -> None:
        ended = now()
        if self.begun is not None:
            print(f"{MARK}{json.dumps(ended - self.begun)}", flush=True)
        sys.stdin.readline()
        self.begun = now()


def reward_of(text: str) -> float:
    """Rewards that differ, at no cost."""
    return zlib.crc32(text.encode()) % 101 / 100


def varied_reward(answer: Any, target: Any, *, rules: str = "strict", step: int | None = None) -> float:
    return reward_of(answer.text)


def datamodule(settings: argparse.Namespace) -> Any:
    from rft_lightning.datamodules import ShapesDataModule
    from rft_lightning.tasks import DetectionTask

    return ShapesDataModule(
        processor=settings.folder,
        image_side=sizes(settings.policy)["image_side"],
        batch_size=settings.prompts,
        train_size=settings.prompts * (settings.rounds + 2),
        task=DetectionTask(rewards={"varied": varied_reward}, reward_time_limit=None),
    )


def ours(settings: argparse.Namespace) -> dict[str, Any]:
    from lightning.pytorch import Callback, Trainer

    from rft_lightning import GRPOModule, GRPOObjective

    class Report(Callback):
        def on_train_batch_end(self, _: Any, module: GRPOModule, *__: Any) -> None:
            phases.append(dict(module.workload.seconds))
            turns.ended()

    phases: list[dict[str, float]] = []
    turns = Turns()
    module = GRPOModule(
        settings.folder,
        group_size=settings.group_size,
        objective=GRPOObjective(loss_type="grpo", beta=BETA),
        max_completion_length=settings.length,
        min_completion_length=settings.length,
        micro_batch_prompts=settings.micro_batch_prompts,
        dtype=sizes(settings.policy)["dtype"],
    )
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_steps=settings.rounds + 1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[Report()],
    )
    trainer.fit(module, datamodule=datamodule(settings))
    return {"phases": {name: statistics.median(found[name] for found in phases[1:]) for name in phases[0]}}


def trl(settings: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Report(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.ended()

    turns = Turns()
    data = datamodule(settings)
    samples = [data.encoder.complete(sample) for sample in data.split("train")]
    rows = [
        {"prompt": [{"role": "user", "content": sample.question}], "image": sample.load_image()} for sample in samples
    ]
    bfloat16 = sizes(settings.policy)["dtype"] == "bfloat16"
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=settings.prompts * settings.group_size,
        num_generations=settings.group_size,
        max_completion_length=settings.length,
        generation_kwargs={"min_new_tokens": settings.length},
        beta=BETA,
        loss_type="grpo",
        learning_rate=LEARNING_RATE,
        max_steps=settings.rounds + 1,
        gradient_checkpointing=False,
        bf16=bfloat16,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if bfloat16 else "float32"},
    )
    trainer = GRPOTrainer(
        model=settings.folder,
        args=config,
        train_dataset=Dataset.from_list(rows),
        reward_funcs=lambda completions, **_: [reward_of(completion[0]["content"]) for completion in completions],
        callbacks=[Report()],
    )
    trainer.train()
    return {}


def work(settings: argparse.Namespace) -> None:
    """One trainer; the last line on stdout states the memory and, of ours, the seconds of the phases."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    found = {"trl": trl, "ours": ours}[settings.worker](settings)
    found |= {"memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        found["device_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(f"{MARK}{json.dumps(found)}", flush=True)


# The comparison -------------------------------------------------------------------------------------------------------


class Worker:
    """A trainer in a process of its own that steps when it is told to."""

    def __init__(self, name: str, settings: argparse.Namespace) -> None:
        options = ["--worker", name]
        for option in ("policy", "folder", "prompts", "group_size", "length", "rounds", "threads"):
            options += [f"--{option.replace('_', '-')}", str(getattr(settings, option))]
        if settings.micro_batch_prompts is not None:
            options += ["--micro-batch-prompts", str(settings.micro_batch_prompts)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": settings.errors, "text": True}
        self.name, self.errors = name, settings.errors
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", __file__, *options], **pipes)

    def step(self) -> Any:
        """The seconds of one step, or at the end the memory."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.errors.seek(0)
        raise SystemExit(f"The trainer {self.name} stopped:\n{self.errors.read()[-3000:]}")


def compare(settings: argparse.Namespace) -> dict[str, Any]:
    """Steps in turns; the first of each is left out."""
    with tempfile.TemporaryFile("w+") as settings.errors:
        workers = {name: Worker(name, settings) for name in settings.trainers}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        try:
            for _ in range(settings.rounds):
                for name, worker in workers.items():
                    seconds[name].append(worker.step())
            memory = {name: worker.step() for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.process.kill()
                worker.process.wait()
    found: dict[str, Any] = {
        name: {
            "seconds": statistics.median(times),
            "prompts_per_second": settings.prompts / statistics.median(times),
            "all_seconds": times,
            **memory[name],
        }
        for name, times in seconds.items()
    }
    if len(workers) == 2:
        ratios = [theirs / mine for theirs, mine in zip(seconds["trl"], seconds["ours"], strict=True)]
        found["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return found


# The run --------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--policy", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu", help="its sizes")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[8] if cuda else [8, 16])
    parser.add_argument("--prompts", type=int, default=16 if cuda else 1, help="prompts per step")
    parser.add_argument("--length", type=int, default=256 if cuda else 64, help="tokens of each completion")
    parser.add_argument(
        "--micro-batch-prompts", type=int, help="ours: prompts per forward and backward; all by default"
    )
    parser.add_argument("--rounds", type=int, default=6, help="steps of each trainer that count; one more comes first")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes by itself")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--group-size", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    settings = results["settings"]
    lines = [f"{settings['prompts']} prompts of {results['prompt_tokens']} tokens, completions of {settings['length']}"]
    lines.append(f"{'':<8}{'trainer':<9}{'s/step':>9}{'prompts/s':>11}{'MiB':>8}{'TRL time / ours':>26}")
    for group_size, row in results["group_sizes"].items():
        for name in settings["trainers"]:
            found = row[name]
            line = f"G = {group_size:<4}{name:<9}{found['seconds']:>9.2f}{found['prompts_per_second']:>11.2f}"
            line += f"{found.get('device_memory_mib', found['memory_mib']):>8.0f}"
            if name == "ours" and "ratio" in row:
                ratio = row["ratio"]
                line += f"{ratio['median']:>12.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            lines.append(line)
        if "ours" in row:
            phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["ours"]["phases"].items())
            lines.append(f"{'':<8}ours by phase, s: {phases}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    settings = parse(arguments)
    if settings.worker is not None:
        return work(settings)
    with tempfile.TemporaryDirectory() as folder:
        settings.folder = str(build(settings.policy, Path(folder)))
        data = datamodule(settings)
        length = data.encoder([data.split("train")[0]]).input_ids.shape[1]
        rows = {}
        for group_size in settings.group_sizes:
            settings.group_size = group_size
            rows[group_size] = compare(settings)
    shown = ("policy", "group_sizes", "prompts", "length", "micro_batch_prompts", "rounds", "threads", "trainers")
    results = {
        "machine": machine(),
        "settings": {name: getattr(settings, name) for name in shown},
        "policy": sizes(settings.policy),
        "prompt_tokens": length,
        "group_sizes": rows,
    }
    print(table(results))
    if settings.output is not None:
        settings.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
