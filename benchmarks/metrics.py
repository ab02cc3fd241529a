"""Time, memory and exactness of average precision: ours beside the evaluators in use, in one run.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py --output metrics.json

Generated detections of fixed seeds, in the sizes that occur: a detector on COCO (100 and 20 boxes per picture), a
vision-language model on COCO (a box or none), a few-shot test split, a crowded one, and LVIS. Ours and torchmetrics are
given tensors in batches, as in a training loop; pycocotools, faster-coco-eval and lvis-api what they read, dicts in
memory. Printed are the processor time of each (all threads together; on CUDA the time on the wall), how often it takes
ours, with loading and for the evaluation alone, and the largest difference of its summary numbers from those of
pycocotools or lvis-api. Times are minima over rounds in which the evaluators take turns; what takes long runs once.
Memory is the peak above the inputs, in a process of its own. The last table holds scores fixed but for ties, and
shuffles the order of pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metrics_data import PRESETS, Data, Preset, annotations, batches, generate

from rft_lightning.lvis_api import load_lvis
from rft_lightning.metrics.coco_map import COCOMeanAveragePrecision
from rft_lightning.metrics.lvis_ap import LVISAveragePrecision

OURS, FASTER, PYCOCO = "rft_lightning", "faster-coco-eval", "pycocotools"
COCO_KEYS = (
    "map", "map_50", "map_75", "map_small", "map_medium", "map_large",
    "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large",
)  # fmt: skip
LVIS_KEYS = (
    *COCO_KEYS[:6], "map_rare", "map_common", "map_frequent", "mar_300", "mar_small", "mar_medium", "mar_large",
)  # fmt: skip
MIB = 1024**2


# The evaluators -------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of the stages of one evaluation."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = self.now()
        yield
        self.seconds[stage] = self.now() - begun

    def now(self) -> float:
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Evaluator:
    """How one is run.

    Attributes:
        inputs: makes what it reads, in memory; not timed.
        run: evaluates and returns the summary numbers.
        package: what has to be installed.
        slow: left out by --skip-slow.
    """

    inputs: Callable[[Data, argparse.Namespace], Any]
    run: Callable[[Any, Clock], np.ndarray]
    package: str
    slow: bool = False


def tensors(data: Data, arguments: argparse.Namespace) -> tuple[Data, Any]:
    return data, batches(data, arguments.batch_size, arguments.device)


def contents(data: Data, _: argparse.Namespace) -> Any:
    return annotations(data)


def update_and_compute(metric: Any, inputs: Any, clock: Clock, keys: Sequence[str]) -> np.ndarray:
    with clock("loading"):
        for preds, targets in inputs:
            metric.update(preds, targets)
    with clock("evaluation"):
        found = metric.compute()
        # One transfer, as a callback makes it.
        values = torch.stack([found[key] for key in keys]).cpu()
    return values.double().numpy()


def run_ours(inputs: tuple[Data, Any], clock: Clock) -> np.ndarray:
    data, parts = inputs
    classes, device = range(1, data.preset.classes + 1), parts[0][0][0]["boxes"].device
    if not data.preset.lvis:
        metric = COCOMeanAveragePrecision(classes=classes).to(device)
        return update_and_compute(metric, parts, clock, COCO_KEYS)
    frequency = dict(zip(classes, data.frequency.tolist(), strict=True))
    return update_and_compute(
        LVISAveragePrecision(frequency=frequency, classes=classes).to(device), parts, clock, LVIS_KEYS
    )


def run_torchmetrics(inputs: tuple[Data, Any], clock: Clock, *, backend: str) -> np.ndarray:
    from torchmetrics.detection import MeanAveragePrecision

    _, parts = inputs
    metric = MeanAveragePrecision(backend=backend).to(parts[0][0][0]["boxes"].device)
    metric.warn_on_many_detections = False
    return update_and_compute(metric, parts, clock, COCO_KEYS)


def run_pycocotools(inputs: Any, clock: Clock) -> np.ndarray:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with clock("loading"):
        truth = COCO()
        truth.dataset = inputs[0]
        truth.createIndex()
        found = truth.loadRes(inputs[1])
    with clock("evaluation"):
        return evaluated(COCOeval(truth, found, "bbox")).stats


def run_faster(inputs: Any, clock: Clock, *, lvis: bool = False) -> np.ndarray:
    from faster_coco_eval import COCO, COCOeval_faster

    with clock("loading"):
        truth = COCO(inputs[0])
        found = truth.loadRes(inputs[1])
    with clock("evaluation"):
        evaluation = COCOeval_faster(truth, found, "bbox", lvis_style=lvis)
        if lvis:
            evaluation.params.maxDets = [300]
        numbers = np.asarray(evaluated(evaluation).all_stats)
    # LVIS: AP by threshold and area; rare, common, frequent; recall, and by area.
    return numbers[[0, 1, 2, 3, 4, 5, 14, 15, 16, 6, 9, 10, 11]] if lvis else numbers[:12]


def run_lvis_api(inputs: Any, clock: Clock) -> np.ndarray:
    api = load_lvis()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # its reader takes nothing else
        json.dump(inputs[0], file)
        file.flush()
        with clock("loading"):
            truth = api.LVIS(file.name)
            found = api.LVISResults(truth, inputs[1])
    with clock("evaluation"):
        evaluation = api.LVISEval(truth, found, "bbox")
        evaluation.run()
    return np.array(list(evaluation.get_results().values()), dtype=np.float64)


def evaluated(evaluation: Any) -> Any:
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


COCO_EVALUATORS = {
    OURS: Evaluator(tensors, run_ours, "torchmetrics"),
    FASTER: Evaluator(contents, run_faster, "faster_coco_eval"),
    f"torchmetrics[{FASTER}]": Evaluator(
        tensors, partial(run_torchmetrics, backend="faster_coco_eval"), "faster_coco_eval"
    ),
    PYCOCO: Evaluator(contents, run_pycocotools, "pycocotools", slow=True),
    f"torchmetrics[{PYCOCO}]": Evaluator(
        tensors, partial(run_torchmetrics, backend="pycocotools"), "pycocotools", slow=True
    ),
}
LVIS_EVALUATORS = {
    OURS: Evaluator(tensors, run_ours, "torchmetrics"),
    f"{FASTER} lvis_style": Evaluator(contents, partial(run_faster, lvis=True), "faster_coco_eval"),
    "lvis-api": Evaluator(contents, run_lvis_api, "lvis", slow=True),
}
REFERENCE = {False: PYCOCO, True: "lvis-api"}


def evaluators(preset: Preset, arguments: argparse.Namespace) -> dict[str, Evaluator]:
    """Those that are installed and wanted."""
    return {
        name: evaluator
        for name, evaluator in (LVIS_EVALUATORS if preset.lvis else COCO_EVALUATORS).items()
        if importlib.util.find_spec(evaluator.package) and not (arguments.skip_slow and evaluator.slow)
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the evaluators' messages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# What is measured -----------------------------------------------------------------------------------------------------


def once(evaluator: Evaluator, data: Data, arguments: argparse.Namespace) -> tuple[np.ndarray, dict[str, float]]:
    """The summary numbers and the seconds of the stages."""
    inputs = evaluator.inputs(data, arguments)  # anew each time: evaluators write into what they are given
    gc.collect()
    clock = Clock(arguments.device)
    with quiet():
        numbers = evaluator.run(inputs, clock)
    return numbers, clock.seconds


def compare(preset: Preset, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each evaluator milliseconds, times of ours, and the largest difference from the reference."""
    data, wanted = generate(preset), evaluators(preset, arguments)
    small = generate(preset.scaled(0.02))
    numbers: dict[str, np.ndarray] = {}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in wanted}
    for evaluator in wanted.values():
        once(evaluator, small, arguments)  # imports are not counted
    for round_number in range(arguments.rounds):
        for name, evaluator in wanted.items():
            if round_number == 0 or sum(seconds[name][0].values()) < arguments.once_above:
                numbers[name], found = once(evaluator, data, arguments)
                seconds[name].append(found)
    reference = numbers.get(REFERENCE[preset.lvis])
    total = {name: min(sum(found.values()) for found in rounds) for name, rounds in seconds.items()}
    evaluation = {name: min(found["evaluation"] for found in rounds) for name, rounds in seconds.items()}
    return {
        name: {
            "ms": 1000 * total[name],
            "evaluation_ms": 1000 * evaluation[name],
            "rounds": len(seconds[name]),
            "this_to_ours": total[name] / total[OURS],
            "evaluation_to_ours": evaluation[name] / total[OURS],
            "difference": None if reference is None else float(np.abs(numbers[name] - reference).max()),
            "numbers": numbers[name].tolist(),
        }
        for name in wanted
    }


def peak_memory(name: str, preset: str, arguments: argparse.Namespace) -> float:
    """MiB above the inputs at the peak of one evaluation, in a new process."""
    command = [sys.executable, __file__, "--memory-of", name, "--presets", preset]
    command += [
        "--scale",
        str(arguments.scale),
        "--batch-size",
        str(arguments.batch_size),
        "--device",
        arguments.device,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def own_peak_memory(name: str, preset: Preset, arguments: argparse.Namespace) -> float:
    """The same in this process; on CUDA, of the device."""
    evaluator = evaluators(preset, arguments)[name]
    once(evaluator, generate(preset.scaled(0.02)), arguments)  # imports are not counted
    inputs = evaluator.inputs(generate(preset), arguments)
    gc.collect()
    clock = Clock(arguments.device)
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with quiet():
            evaluator.run(inputs, clock)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # What making the inputs left free would otherwise be used again, unseen.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory("VmRSS")
    with quiet():
        evaluator.run(inputs, clock)
    return (memory("VmHWM") - before) / 1024


def memory(kind: str) -> int:
    """KiB of this process, as the kernel counts them."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{kind}:")]
    return int(line.split()[1])


def compare_ties(preset: Preset, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What the order of pictures moves, for scores with more or fewer ties; AP in points."""
    data = generate(replace(preset, decimals=None))
    scores = {
        "as they are": data.det_scores,
        "two decimals": data.det_scores.round(2),
        "one decimal": data.det_scores.round(1),
        "all equal": np.ones_like(data.det_scores),
    }
    result = {}
    for name, values in scores.items():
        rng, found = np.random.default_rng(0), []
        for _ in range(arguments.orders):
            order = rng.permutation(data.preset.images) + 1
            shuffled = replace(data, det_scores=values)
            parts = batches(shuffled, arguments.batch_size, arguments.device)
            for target in (target for _, targets in parts for target in targets):
                target["image_id"] = int(order[target["image_id"] - 1])
            with quiet():
                found.append(100 * float(run_ours((shuffled, parts), Clock(arguments.device))[0]))
        result[name] = {"lowest": min(found), "median": statistics.median(found), "highest": max(found)}
    return result


# The run --------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--once-above", type=float, default=8.0, help="seconds; what takes longer runs once")
    parser.add_argument("--skip-slow", action="store_true", help="leave out pycocotools and lvis-api: no differences")
    parser.add_argument("--memory", nargs="*", choices=PRESETS, default=["coco500", "lvis"], help="presets")
    parser.add_argument("--orders", type=int, default=50, help="orders of pictures in the table of ties; 0: no table")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures in each update (eval_batch_size)")
    parser.add_argument("--device", default="cpu", help="of the tensors, for ours and torchmetrics")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pictures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if found.rounds < 1 or found.batch_size < 1 or found.orders < 0 or not 0 < found.scale <= 1:
        parser.error("Expected rounds and batch-size of 1 or more, orders of 0 or more and a scale in (0, 1].")
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    presets = {name: PRESETS[name].scaled(arguments.scale) for name in arguments.presets}
    results: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), **versions()},
        "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
        "data": {name: asdict(preset) for name, preset in presets.items()},
        "presets": {},
    }
    for name, preset in presets.items():
        found = results["presets"][name] = compare(preset, arguments)
        for evaluator, row in found.items():
            row["memory_mib"] = peak_memory(evaluator, name, arguments) if name in arguments.memory else None
        print(table(name, results), flush=True)
    if arguments.orders:
        results["ties"] = compare_ties(PRESETS["fewshot"].scaled(arguments.scale), arguments)
        print(ties_table(results))
    return results


def versions() -> dict[str, str | None]:
    found = {}
    for name in ("torch", "torchmetrics", "numpy", "pycocotools", "faster-coco-eval", "lvis"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def table(name: str, results: dict[str, Any]) -> str:
    """One preset for people."""
    data = results["data"][name]
    sizes = f"{data['images']:,} pictures, {data['classes']:,} classes, {data['objects']:,} objects"
    lines = [
        f"{name}: {sizes}, {data['detections']:,} detections",
        f"{'':<32}{'ms':>10}{'of ours':>9}{'evaluation alone':>18}{'difference':>12}{'MiB':>8}",
    ]
    for evaluator, row in results["presets"][name].items():
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        peak = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        lines.append(
            f"  {evaluator:<30}{row['ms']:>10.1f}{row['this_to_ours']:>8.1f}x{row['evaluation_to_ours']:>17.1f}x"
            f"{difference:>12}{peak:>8}"
        )
    return "\n".join(lines)


def ties_table(results: dict[str, Any]) -> str:
    lines = [f"{'AP of fewshot, orders of pictures':<36}{'lowest':>8}{'median':>8}{'highest':>8}"]
    for name, row in results["ties"].items():
        lines.append(f"  scores {name:<27}{row['lowest']:>8.2f}{row['median']:>8.2f}{row['highest']:>8.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    settings = parse(arguments)
    torch.set_num_threads(1)
    if settings.memory_of is not None:
        (preset,) = settings.presets
        print(own_peak_memory(settings.memory_of, PRESETS[preset].scaled(settings.scale), settings))
        return None
    results = run(settings)
    if settings.output is not None:
        settings.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
