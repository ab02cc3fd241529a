"""What runs inside the processes of the tests of whole runs: a module and callbacks that write down what happens.

Configurations name it as `probes`: `tests/runs.py` puts this folder on the path of the processes.
"""

import gc
import json
import multiprocessing
import os
import sys
from pathlib import Path

from lightning.pytorch import Callback

from rft_lightning import GRPOModule
from rft_lightning.cli import main


def length_reward(answer, target, *, rules, step):
    """A reward that any policy varies in."""
    return (len(answer.text) % 17) / 17


class Recorder(GRPOModule):
    """Appends to rollouts-RANK.jsonl what each prompt was answered in each step, and its rewards."""

    def score(self, rollouts):
        scores = super().score(rollouts)
        prompts, (_, G) = rollouts.prompts, rollouts.completion_ids.shape[:2]
        lengths, rewards = rollouts.completion_mask.sum(-1).tolist(), scores.rewards.tolist()
        with open(f"rollouts-{self.global_rank}.jsonl", "a") as file:
            for b, sample in enumerate(prompts.samples):
                line = {
                    "step": self.global_step,
                    "sample": sample.id,
                    "occurrence": sample.occurrence,
                    "prompt": prompts.lengths[b],
                    "lengths": lengths[b],
                    "texts": rollouts.texts[b],
                    "rewards": rewards[b * G : (b + 1) * G],
                }
                file.write(json.dumps(line) + "\n")
        return scores


class Journal(Callback):
    """Appends the step and loss of each batch to steps.jsonl at once, for whoever waits for a step to kill the run."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.is_global_zero:
            loss = float(trainer.callback_metrics["train/loss"])
            with open("steps.jsonl", "a") as file:
                file.write(json.dumps({"step": trainer.global_step, "loss": loss}) + "\n")


class Usage(Callback):
    """Appends to usage.jsonl, every so many steps, what the process holds: memory, files, threads."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step % self.every:
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        usage = {
            "step": trainer.global_step,
            "memory": pages * os.sysconf("SC_PAGE_SIZE"),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "objects": len(gc.get_objects()),
        }
        with open("usage.jsonl", "a") as file:
            file.write(json.dumps(usage) + "\n")


def serve(folder: str, words: list[str], variables: dict[str, str]) -> None:
    """The command line in a process of its own that was forked from a warm one: what `python -m rft_lightning` does."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as Python has it on Linux, for the loaders' workers
    os.chdir(folder)
    os.environ.update(variables)
    log = os.open(f"log-{variables.get('LOCAL_RANK', '0')}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = ["rft", *words]
    main()
