"""What a choice of rewards is worth: the quickstart (GRPO on Shapes detection) with one thing changed at a time.

    python benchmarks/rewards_on_shapes.py [--variants strict paper] [--seeds 0 1 2] [--processes 2]

Prints the metrics before and after training as a Markdown table: means over seeds, and the range. A run takes minutes
on one core. Runs that are already in --folder are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METRICS = {"val/box_iou_mean": "mean IoU", "val/map": "mAP", "train/parse_rate": "parse rate"}


def reward(name: str, **options: Any) -> Any:
    """A reward as a configuration names it."""
    path = f"rft_lightning.rewards.{name}_reward"
    if not options:
        return path
    init_args = {"reward": path, "options": options}
    return {"class_path": "rft_lightning.rewards.RewardWithOptions", "init_args": init_args}


def task(rules: str = "strict", **rewards: Any) -> dict[str, Any]:
    """What a second file changes in the quickstart's task: its rules and rewards; a reward that is None is left out."""
    return {"class_path": "rft_lightning.tasks.DetectionTask", "init_args": {"rules": rules, "rewards": rewards}}


VARIANTS = {
    "strict": task(),
    "paper": task("paper"),
    "published_code": task("published_code"),
    "strict, IoU over predictions": task(iou=reward("detection_iou", denominator="predictions")),
    "strict, Hungarian": task(
        iou=reward("detection_iou", matching="hungarian"),
        confidence=reward("detection_confidence", matching="hungarian"),
    ),
    "strict, No Objects worth 0": task(
        iou=reward("detection_iou", true_negative=0.0), confidence=reward("detection_confidence", true_negative=0.0)
    ),
    "strict, no confidence reward": task(confidence=None),
    "AP for IoU and confidence": task(iou=None, confidence=None, ap=reward("average_precision")),
    "odLength for IoU and confidence": task(iou=None, confidence=None, od_length=reward("od_length")),
}


def run(variant: str, seed: int, folder: Path, max_steps: int | None) -> dict[str, list[float]]:
    """Metrics of one run: first and last value of each."""
    place = folder / variant.replace(" ", "_").replace(",", "") / str(seed)
    if not (place / "done").exists():
        place.mkdir(parents=True, exist_ok=True)
        config = {"data": {"init_args": {"task": VARIANTS[variant]}}, "trainer": {"default_root_dir": str(place)}}
        (place / "variant.yaml").write_text(json.dumps(config), encoding="utf-8")
        steps = (
            []
            if max_steps is None
            else ["--trainer.max_steps", str(max_steps), "--trainer.val_check_interval", str(max_steps)]
        )
        arguments = [
            "fit",
            "-c",
            str(ROOT / "configs/quickstart.yaml"),
            "-c",
            "variant.yaml",
            "--seed_everything",
            str(seed),
            *steps,
        ]
        with open(place / "log.txt", "w", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, "-m", "rft_lightning", *arguments],
                cwd=place, stdout=log, stderr=log, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        (place / "done").touch()
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for file in sorted(place.rglob("metrics.csv")):
        with open(file, encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                for name in METRICS:
                    if row.get(name):
                        values[name].append(float(row[name]))
    return values


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=Path("runs/rewards_on_shapes"))
    parser.add_argument("--max-steps", type=int, default=None)
    arguments = parser.parse_args()
    jobs = [(variant, seed) for seed in arguments.seeds for variant in arguments.variants]
    folder = arguments.folder.resolve()
    with ThreadPoolExecutor(arguments.processes) as pool:
        found = dict(zip(jobs, pool.map(lambda job: run(*job, folder, arguments.max_steps), jobs), strict=True))
    print(f"| rewards | {' | '.join(METRICS.values())} |\n|---|{'---|' * len(METRICS)}")
    for variant in arguments.variants:
        cells = []
        for name in METRICS:
            ends = [found[variant, seed][name][-1] for seed in arguments.seeds]
            cells.append(f"{sum(ends) / len(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})")
        print(f"| {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
