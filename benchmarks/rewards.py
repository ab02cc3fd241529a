"""Time of reading and scoring: a rollout batch of detection answers, parsed and rewarded as in training.

    python benchmarks/rewards.py --output rewards.json

Completions are written by a program: as many boxes as the picture has objects, each a few units off. `spread` puts the
objects anywhere, `heaped` puts all of them in one place, where every box overlaps with every object: the worst case of
matching. Printed are medians over rounds in milliseconds of processor time for the whole batch (one thread), the
exponent with which the time grows from one number of boxes to the next (2 is the square), and the share of a training
step of the quickstart, which is run for a few steps to measure one.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import Answer, DetectionTarget
from rft_lightning.tasks import DetectionTask

FRAME, SIZE = CoordinateFrame(), (640, 480)
KINDS = ("spread", "heaped")
QUICKSTART_STEPS, GROUP_SIZE = 12, 8


# The completions ------------------------------------------------------------------------------------------------------


def corners(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """[K, 4] integers in the frame: objects anywhere, or all nearly the same."""
    if kind == "heaped":
        return np.array([200, 200, 800, 800]) + rng.integers(-40, 41, (count, 4))
    low = rng.integers(20, 850, (count, 2))
    return np.concatenate([low, low + rng.integers(40, 130, (count, 2))], 1)


def completion(boxes: np.ndarray, rng: np.random.Generator) -> str:
    """An answer with every box a few units off, in the format of the question."""
    entries = [
        {"Position": box, "Confidence": round(float(rng.uniform(0.5, 1)), 2)}
        for box in (boxes + rng.integers(-6, 7, boxes.shape)).tolist()
    ]
    return f"<think>I see {len(entries)} of them.</think>\n<answer>{entries}</answer>"


def make_batch(kind: str, count: int, completions: int) -> tuple[list[str], DetectionTarget]:
    rng = np.random.default_rng(count)
    boxes = corners(kind, count, rng)
    target = DetectionTarget(FRAME.to_pixels(torch.from_numpy(boxes), SIZE), image_size=SIZE)
    return [completion(boxes, rng) for _ in range(completions)], target


# What is measured -----------------------------------------------------------------------------------------------------


def read(texts: Sequence[str], task: DetectionTask) -> list[Answer]:
    return [task.read(text, FRAME, SIZE) for text in texts]


def measure(kind: str, count: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of parsing and of scoring one batch, medians over rounds."""
    task = DetectionTask(rules=arguments.rules)
    texts, target = make_batch(kind, count, arguments.completions)
    task.score(read(texts[:1], task)[0], target)  # imports are not counted
    groups = range(0, len(texts), GROUP_SIZE)
    parsing, scoring = [], []
    for _ in range(arguments.rounds):
        begun = time.process_time()
        answers = read(texts, task)
        parsed = time.process_time()
        for start in groups:  # as in training: the answers to a question together, then one by one
            group = answers[start : start + GROUP_SIZE]
            task.prepare(group, target)
            for answer in group:
                task.score(answer, target)
        parsing.append(1000 * (parsed - begun))
        scoring.append(1000 * (time.process_time() - parsed))
    return {"parse_ms": statistics.median(parsing), "score_ms": statistics.median(scoring)}


def quickstart_step() -> float:
    """Seconds of a training step of the quickstart: the median of a few, after the first."""
    config = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
    options = {"--trainer.max_steps": QUICKSTART_STEPS, "--trainer.limit_val_batches": 0}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rft_lightning", "fit", "-c", str(config)]
        command += [str(word) for option in options.items() for word in option]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        (log,) = Path(folder).rglob("metrics.csv")
        with open(log, encoding="utf-8", newline="") as lines:
            times = [float(row["train/step_time"]) for row in csv.DictReader(lines) if row.get("train/step_time")]
    return statistics.median(times[1:])


def with_growth(found: dict[int, dict[str, float]], step_seconds: float) -> dict[int, dict[str, float]]:
    """The same with the exponent of growth since the previous size (NaN for the first) and the share of a step."""
    before: tuple[int, float] | None = None
    for count, row in found.items():
        total = row["parse_ms"] + row["score_ms"]
        row["growth"] = math.nan if before is None else math.log(total / before[1]) / math.log(count / before[0])
        row["share_of_step"] = total / 1000 / step_seconds
        before = count, total
    return found


# The run --------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--completions", type=int, default=64, help="completions in a rollout batch")
    parser.add_argument("--boxes", type=int, nargs="+", default=[3, 5, 10, 20, 40, 80, 160], help="ascending")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rules", choices=("strict", "paper"), default="strict")
    parser.add_argument("--step-seconds", type=float, help="time of a training step; measured where it is not given")
    found = parser.parse_args(arguments)
    if found.boxes != sorted(set(found.boxes)) or found.boxes[0] < 1:
        parser.error(f"Expected numbers of boxes that ascend from 1 or more, found {found.boxes}.")
    if (found.step_seconds is not None and found.step_seconds <= 0) or found.completions < 1 or found.rounds < 1:
        parser.error("Expected step-seconds, completions and rounds above 0.")
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements; the keys below a kind are numbers of boxes."""
    if arguments.step_seconds is None:
        arguments.step_seconds = quickstart_step()
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
        "rewards": list(DetectionTask(rules=arguments.rules).rewards),
        **{
            kind: with_growth(
                {count: measure(kind, count, arguments) for count in arguments.boxes}, arguments.step_seconds
            )
            for kind in KINDS
        },
    }


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    settings = results["settings"]
    lines = [
        f"{settings['completions']} completions, rewards {', '.join(results['rewards'])}, rules {settings['rules']}; "
        f"a step takes {settings['step_seconds']:.3g} s"
    ]
    for kind in KINDS:
        lines.append(
            f"{kind + ', boxes':<16}{'parse ms':>10}{'score ms':>10}{'both ms':>10}{'growth':>8}{'of step':>9}"
        )
        for count, row in results[kind].items():
            growth = "" if math.isnan(row["growth"]) else f"{row['growth']:.2f}"
            lines.append(
                f"  {count:<14}{row['parse_ms']:>10.1f}{row['score_ms']:>10.1f}"
                f"{row['parse_ms'] + row['score_ms']:>10.1f}{growth:>8}{row['share_of_step']:>9.1%}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    torch.set_num_threads(1)
    results = run(settings)
    print(table(results))
    if settings.output is not None:
        settings.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
