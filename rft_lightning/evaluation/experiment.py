"""What was evaluated, in the facts by which tables find the run of a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rft_lightning.checkpointing import read_record
from rft_lightning.errors import CheckpointError
from rft_lightning.evaluation.voting import Voting
from rft_lightning.model_card import CONFIG

ZERO_SHOT, SFT, RFT = "zero-shot", "SFT", "RFT"
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
) -> dict[str, Any]:
    """The facts of an evaluation.

    - ``method``: zero-shot, SFT, RFT, ``SFT then RFT`` and so on, by what trained the policy one after the other; of
      another system its name.
    - ``policy``: the checkpoint that all training started from; None without one.
    - ``shots seed steps tuning thought rules group_size prompts_per_step``: of the last training; None without one.
      `steps` is what the checkpoint has; `tuning` full, lora or qlora; `thought` whether supervised answers had one;
      `rules` and `group_size` of reinforcement; `prompts_per_step` over all devices, None where their number is left
      to the machine.
    - ``task``: name of what was asked; of several, joined by "and".
    - ``data split limit classes query_mode presence_map box_from``: what was asked; `presence_map` is base or tuned
      where an evaluation of such a policy wrote the map, else the file's name.
    - ``answers choose temperature``: how each question was answered; `choose` of several.

    Args:
        model: the module that answers.
        datamodule: what asks.
        config: the configuration as YAML; None outside of the command line.
        ckpt_path: the checkpoint of `fit`, where there is one.
        split: which is asked.
        voting: how a question is answered.
        limit: how many questions were asked at most.
    """
    start = getattr(model, "checkpoint", None)
    trained = hasattr(model, "voting")
    runs = [] if not trained else history(str(start), ckpt_path)
    last = runs[-1] if runs else {}
    settings, data = _arguments(last, "model"), _arguments(last, "data")
    asked = _arguments(yaml.safe_load(config) if config else {}, "data")
    map_file = asked.get("presence_map")
    temperature = voting.heat(getattr(model, "eval_temperature", 0.0)) if trained else None
    return {
        "method": _method(runs) if trained else getattr(model, "name", None) or type(model).__name__,
        "policy": _origin(runs, start) if trained else start,
        "data": type(datamodule).__name__,
        "task": " and ".join(sorted({task.name for task in _tasks(datamodule)})) or None,
        "split": split,
        "limit": limit,
        "classes": asked.get("classes"),
        "shots": data.get("shots"),
        "seed": last.get("seed_everything"),
        "steps": last.get("steps") or (last.get("trainer") or {}).get("max_steps"),
        "tuning": _tuning(settings) if runs else None,
        "thought": settings.get("with_thought"),
        "rules": _rules(data) if settings.get("group_size") else None,
        "group_size": settings.get("group_size"),
        "prompts_per_step": _prompts_per_step(last, data, settings),
        "query_mode": asked.get("query_mode"),
        "presence_map": None if not map_file else map_origin(Path(str(map_file))),
        "box_from": asked.get("box_from"),
        "answers": voting.answers,
        "choose": voting.choose if voting.answers > 1 else None,
        "temperature": temperature,
    }


def history(policy: str, ckpt_path: str | None, known: frozenset[Path] = frozenset()) -> list[dict[str, Any]]:
    """The configurations of the runs that made a policy, the first one first.

    Args:
        policy: the policy as it starts; the folder of one that `fit` exported says what made it.
        ckpt_path: a checkpoint of `fit` that follows on it.
        known: configurations that were read already: a policy may have been exported over the one it started from.

    Raises:
        CheckpointError: `ckpt_path` is no checkpoint that `fit` wrote.
    """
    if ckpt_path is not None:
        record = read_record(ckpt_path)
        text = (record.get("run") or {}).get("config")
        run = yaml.safe_load(text) if text else {"model": {"class_path": (record.get("run") or {}).get("method")}}
        return [*history(str(record["policy"]), None), {**run, "steps": (record.get("run") or {}).get("steps")}]
    file = (Path(policy) / CONFIG).resolve()
    if not file.is_file() or file in known:
        return []
    run = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(run, Mapping):
        raise CheckpointError(f"{file} is no configuration of a run; remove it, or export the policy again.")
    return [*history(str(_arguments(run, "model").get("policy")), None, known | {file}), dict(run)]


def map_origin(file: Path) -> str:
    """``base`` or ``tuned``, if an evaluation of such a policy wrote a presence map; else the name of its file."""
    beside = file.parent / "metrics.json"
    if not beside.is_file():
        return file.name
    method = json.loads(beside.read_text(encoding="utf-8"))["experiment"]["method"]
    return "base" if method == ZERO_SHOT else "tuned"


def _method(runs: list[dict[str, Any]]) -> str:
    names = [str((run.get("model") or {}).get("class_path")).rsplit(".", 1)[-1] for run in runs]
    return " then ".join(_METHODS.get(name, name) for name in names) or ZERO_SHOT


def _origin(runs: list[dict[str, Any]], start: Any) -> Any:
    return _arguments(runs[0], "model").get("policy", start) if runs else start


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


def _prompts_per_step(run: Mapping[str, Any], data: Mapping[str, Any], settings: Mapping[str, Any]) -> int | None:
    trainer = run.get("trainer") or {}
    devices, prompts = trainer.get("devices"), settings.get("mini_batch_prompts") or data.get("batch_size")
    if not isinstance(devices, int) or devices < 1 or prompts is None:
        return None
    return int(devices * (trainer.get("num_nodes") or 1) * prompts)


def _arguments(config: Mapping[str, Any], block: str) -> dict[str, Any]:
    return dict((config.get(block) or {}).get("init_args") or {})


__all__ = ["ZERO_SHOT", "describe", "history", "map_origin"]
