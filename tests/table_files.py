"""Evaluation folders made by hand, as `rft evaluate` writes them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TINY = {
    "data": "ShapesDataModule", "classes": None, "policy": "asset:tiny-qwen2-vl", "steps": 60,
    "prompts_per_step": 8,
}  # fmt: skip
COCO = {
    "data": "COCODetectionDataModule", "classes": "few_shot_8", "policy": "Qwen/Qwen2-VL-2B-Instruct", "steps": 200,
    "query_mode": "all", "prompts_per_step": 16,
}  # fmt: skip
_FACTS = {
    "method": "RFT", "policy": None, "before": [], "training": "0a1b2c3d", "data": None, "task": "detection",
    "split": "test", "limit": None, "classes": None, "shots": None, "seed": 0, "steps": None, "tuning": "full",
    "thought": None, "prompts_per_step": None, "rules": "strict", "group_size": 8, "query_mode": None,
    "presence_map": None, "box_from": None, "answers": 1, "choose": None, "temperature": 0.0, "ap_protocol": "coco",
    "score_from": "confidence", "mask_protocol": None, "acc_50": "at least",
}  # fmt: skip
_STAGE = ("steps", "tuning", "thought", "prompts_per_step")
_TRAINED = ("SFT", "RFT", "SFT then RFT")


def write_evaluation(
    folder: Path,
    *,
    metrics: dict[str, float],
    per_class: dict[str, float] | None = None,
    samples: int = 256,
    failures: int = 0,
    without: Iterable[str] = (),
    **facts: Any,
) -> Path:
    """A folder with the `metrics.json` of an evaluation, whose experiment lacks the facts of `without`."""
    experiment = {**_FACTS, **facts}
    if not experiment["method"].endswith("RFT"):
        experiment |= {"rules": None, "group_size": None}
    if experiment["method"] not in _TRAINED:
        experiment |= dict.fromkeys(("training", "seed", "steps", "tuning", "shots", "prompts_per_step"))
    if experiment["method"] == "SFT then RFT" and "before" not in facts:
        experiment["before"] = [{"method": "SFT", **{name: experiment[name] for name in _STAGE}, "thought": True}]
    experiment = {name: value for name, value in experiment.items() if name not in without}
    record = {
        "version": 1,
        "experiment": experiment,
        "samples": samples,
        "metrics": metrics,
        "per_class": per_class or {},
        "parse_failures": {"count": failures, "share": failures / samples, "kinds": {}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder
