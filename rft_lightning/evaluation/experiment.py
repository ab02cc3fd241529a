"""What was evaluated, in the facts by which tables find the run of a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rft_lightning.checkpointing import read_record
from rft_lightning.evaluation.voting import Voting
from rft_lightning.model_card import run_of, runs_of

ZERO_SHOT, SFT, RFT = "zero-shot", "SFT", "RFT"
SCORING = ("ap_protocol", "score_from", "mask_protocol", "acc_50")
_OF_TRAINING = ("steps", "tuning", "thought", "prompts_per_step")
# Settings that are facts of their own or no part of an outcome: where files lie, how work is cut, what is validated.
_APART = {
    "policy", "seed", "shots", "quantize", "with_thought", "group_size", "batch_size", "mini_batch_prompts",
    "micro_batch_prompts", "rollout_prompts", "forward", "cuda_graphs", "gradient_checkpointing", "sync_gradients",
    "on_nonfinite", "root", "image_root", "annotation_root", "manifest", "num_workers", "eval_batch_size", "val_shots",
    "val_limit", "query_mode", "presence_map", "processor", "on_bad_image",
}  # fmt: skip
_METHODS = {"SFTModule": SFT, "GRPOModule": RFT}


def describe(
    model: Any,
    datamodule: Any,
    config: str | None,
    ckpt_path: str | None,
    *,
    split: str,
    voting: Voting,
    limit: int | None = None,
    callbacks: Iterable[Any] = (),
) -> dict[str, Any]:
    """The facts of an evaluation.

    - ``method``: zero-shot, SFT, RFT, ``SFT then RFT`` and so on, by what trained the policy one after the other; of
      another system its name.
    - ``policy``: the checkpoint that all training started from; None without one.
    - ``shots seed steps tuning thought rules group_size prompts_per_step``: of the last training; None without one.
      `steps` is what the checkpoint has; `tuning` full, lora or qlora; `thought` whether supervised answers had one;
      `rules` and `group_size` of reinforcement; `prompts_per_step` over all devices, None where their number is left
      to the machine.
    - ``before``: of each training before the last one ``method steps tuning thought prompts_per_step``.
    - ``training``: a hash of all further settings of the last training that its outcome depends on; None without one.
    - ``task``: name of what was asked; of several, joined by "and".
    - ``data split limit classes query_mode presence_map box_from``: what was asked; `presence_map` is base, tuned or a
      comparison system where an evaluation of one wrote the map, else the file's name.
    - ``answers choose temperature``: how each question was answered; `choose` of several.
    - ``ap_protocol score_from mask_protocol acc_50``: how the metric callbacks scored; None of what none of them does.

    Args:
        model: the module that answers.
        datamodule: what asks.
        config: the configuration as YAML; None outside of the command line.
        ckpt_path: the checkpoint of `fit`, where there is one.
        split: which is asked.
        voting: how a question is answered.
        limit: how many questions were asked at most.
        callbacks: metric callbacks.
    """
    start = getattr(model, "checkpoint", None)
    trained = hasattr(model, "voting")
    runs = history(str(start), ckpt_path) if trained else []
    last = runs[-1] if runs else {}
    settings, data = _arguments(last, "model"), _arguments(last, "data")
    asked = _arguments(yaml.safe_load(config) if config else {}, "data")
    map_file = asked.get("presence_map")
    temperature = voting.heat(getattr(model, "eval_temperature", 0.0)) if trained else None
    return {
        "method": _method(runs) if trained else getattr(model, "name", None) or type(model).__name__,
        "policy": _origin(runs, start) if trained else start,
        "before": [_stage(run) for run in runs[:-1]],
        "training": _training(last) if runs else None,
        "data": type(datamodule).__name__,
        "task": " and ".join(sorted({task.name for task in _tasks(datamodule)})) or None,
        "split": split,
        "limit": limit,
        "classes": asked.get("classes"),
        "shots": data.get("shots"),
        "seed": last.get("seed_everything"),
        **(_of_training(last) if runs else dict.fromkeys(_OF_TRAINING)),
        "rules": _rules(data) if settings.get("group_size") else None,
        "group_size": settings.get("group_size"),
        "query_mode": asked.get("query_mode"),
        "presence_map": None if not map_file else map_origin(Path(str(map_file))),
        "box_from": asked.get("box_from"),
        "answers": voting.answers,
        "choose": voting.choose if voting.answers > 1 else None,
        "temperature": temperature,
        **dict.fromkeys(SCORING),
        **{name: value for callback in callbacks for name, value in callback.scoring.items()},
    }


def history(policy: str, ckpt_path: str | None) -> list[dict[str, Any]]:
    """The configurations of the runs that made a policy, the first one first, each with its ``steps``.

    Args:
        policy: the policy as it starts; the folder of one that `fit` exported says what made it.
        ckpt_path: a checkpoint of `fit` that follows on it.

    Raises:
        CheckpointError: `ckpt_path` is no checkpoint that `fit` wrote, or the folder cannot be read.
    """
    if ckpt_path is None:
        return runs_of(policy)
    record = read_record(ckpt_path)
    facts = record.get("run") or {}
    return [*facts.get("before", []), run_of(facts)]


def map_origin(file: Path) -> str:
    """Who wrote a presence map: ``base``, ``tuned`` or a comparison system by name; else the name of its file."""
    beside = file.parent / "metrics.json"
    if not beside.is_file():
        return file.name
    experiment = json.loads(beside.read_text(encoding="utf-8")).get("experiment") or {}
    method = str(experiment.get("method") or file.name)
    if method == ZERO_SHOT:
        return "base"
    return "tuned" if set(method.split(" then ")) <= set(_METHODS.values()) else method


def _method(runs: list[dict[str, Any]]) -> str:
    names = [str((run.get("model") or {}).get("class_path")).rsplit(".", 1)[-1] for run in runs]
    return " then ".join(_METHODS.get(name, name) for name in names) or ZERO_SHOT


def _origin(runs: list[dict[str, Any]], start: Any) -> Any:
    return _arguments(runs[0], "model").get("policy", start) if runs else start


def _stage(run: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": _method([dict(run)]), **_of_training(run)}


def _of_training(run: Mapping[str, Any]) -> dict[str, Any]:
    settings = _arguments(run, "model")
    values = run.get("steps"), _tuning(settings), settings.get("with_thought"), _prompts_per_step(run)
    return dict(zip(_OF_TRAINING, values, strict=True))


def _training(run: Mapping[str, Any]) -> str:
    """Equal for runs that differ in their seed, their machine and in what is a fact of its own alone."""
    parts = {name: _without(_arguments(run, name), _APART) for name in ("model", "data")}
    parts["precision"] = (run.get("trainer") or {}).get("precision")
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _without(value: Any, names: Collection[str]) -> Any:
    """A nested value without the entries of these names."""
    if isinstance(value, Mapping):
        return {key: _without(entry, names) for key, entry in value.items() if key not in names}
    return [_without(entry, names) for entry in value] if isinstance(value, list) else value


def _tuning(settings: Mapping[str, Any]) -> str:
    if not settings.get("lora"):
        return "full"
    return "qlora" if settings.get("quantize") else "lora"


def _tasks(datamodule: Any) -> list[Any]:
    """The tasks of a datamodule, or of the members of a mixture."""
    found: list[Any] = []
    for part in datamodule.parts().values():
        tasks = getattr(part, "tasks", None) or getattr(part, "task", None) or []
        found += tasks if isinstance(tasks, list) else [tasks]
    return found


def _rules(data: Mapping[str, Any]) -> str | None:
    task = data.get("task")
    tasks = task if isinstance(task, list) else [task or {}]
    found = {str(rules) for one in tasks if (rules := (one.get("init_args") or {}).get("rules")) is not None}
    return " and ".join(sorted(found)) or None


def _prompts_per_step(run: Mapping[str, Any]) -> int | None:
    trainer, data, settings = run.get("trainer") or {}, _arguments(run, "data"), _arguments(run, "model")
    devices, prompts = trainer.get("devices"), settings.get("mini_batch_prompts") or data.get("batch_size")
    if not isinstance(devices, int) or devices < 1 or prompts is None:
        return None
    return int(devices * (trainer.get("num_nodes") or 1) * prompts)


def _arguments(config: Mapping[str, Any], block: str) -> dict[str, Any]:
    return dict((config.get(block) or {}).get("init_args") or {})


__all__ = ["ZERO_SHOT", "describe", "history", "map_origin"]
