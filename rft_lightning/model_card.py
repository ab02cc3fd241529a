"""The model card of an exported policy: what it was made of, on which rows, how, and what was measured."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from rft_lightning.errors import CheckpointError

CARD, CONFIG, ROWS, RUN = "README.md", "rft_config.yaml", "rft_rows.json", "rft_run.json"
# Rows of a split beyond this are stated by count and hash alone.
_MOST_IDS = 20_000


def run_facts(module: Any) -> dict[str, Any]:
    """What a checkpoint says of its run, as plain data: method, steps, versions, configuration, rows and metrics.

    Also the runs `before` it, which made the policy that it started from: see :func:`runs_of`.

    Args:
        module: a PolicyModule with a Trainer.
    """
    import transformers

    from rft_lightning import __version__

    trainer = module.trainer
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")}
    return {
        "method": type(module).__name__,
        "steps": trainer.global_step,
        "versions": {
            "rft_lightning": __version__,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "config": module.run_configuration,
        "before": module.runs_before,
        "rows": _rows(getattr(trainer, "datamodule", None)),
        "metrics": metrics,
    }


def runs_of(policy: str) -> list[dict[str, Any]]:
    """The runs that made a policy, the first one first; none of a folder that no run exported.

    Args:
        policy: name or folder of a Hugging Face checkpoint.

    Raises:
        CheckpointError: what the folder says of its run cannot be read.
    """
    folder = Path(policy).expanduser()
    file, config = folder / RUN, folder / CONFIG
    if not file.is_file() and not config.is_file():
        return []
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        text = config.read_text(encoding="utf-8") if config.is_file() else None
        return [*facts["before"], run_of({**facts, "config": text})]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{folder} does not say what trained it: expected {RUN} and {CONFIG} as an export writes them, but "
            f"{type(error).__name__}: {error}. Export the policy again, or remove both files from the folder."
        ) from error


def run_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run with its `steps`; of one without a configuration, what is known.

    Args:
        facts: see :func:`run_facts`.
    """
    text = facts.get("config")
    config = yaml.safe_load(text) if text else {"model": {"class_path": facts.get("method")}}
    return {**config, "steps": facts.get("steps")}


def configuration(trainer: Any) -> str | None:
    """The whole configuration as YAML; None for a run that was not started by the command line."""
    for callback in trainer.callbacks:
        if hasattr(callback, "parser") and hasattr(callback, "config"):
            return str(callback.parser.dump(callback.config, skip_none=False))
    return None


def _rows(data: Any) -> dict[str, Any]:
    """Of the splits that the run has read: how many rows, which, and a hash of their ids."""
    found: dict[str, Any] = {}
    for name, ids in ({} if data is None else data.row_ids()).items():
        found[name] = {"count": len(ids), "sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest()}
        if len(ids) <= _MOST_IDS:
            found[name]["ids"] = ids
    return found


def write_card(folder: Path, base: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the card, and beside it the configuration, the rows, and what :func:`runs_of` reads.

    Args:
        folder: of the exported policy.
        base: the checkpoint that training started from.
        settings: what was trained: `lora`, `freeze`, `quantize`, `dtype`.
        facts: see :func:`run_facts`.
    """
    (folder / CARD).write_text(card(base, settings, facts), encoding="utf-8")
    if facts.get("config"):
        (folder / CONFIG).write_text(facts["config"], encoding="utf-8")
    run = {name: facts.get(name) for name in ("method", "steps")} | {"before": facts.get("before", [])}
    (folder / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if facts.get("rows"):
        (folder / ROWS).write_text(json.dumps(facts["rows"], indent=1) + "\n", encoding="utf-8")


def card(base: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The text of the card, in the form that the Hugging Face hub reads. See :func:`write_card` for the arguments."""
    hub_id = not base.startswith(("/", ".", "asset:"))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        "---",
        *([f"base_model: {base}"] if hub_id else []),
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [visual-rft, rft_lightning]",
        "---",
        "",
        f"# {base.rsplit('/', 1)[-1]}, tuned with rft_lightning",
        "",
        f"{facts['method']}, {facts['steps']} optimiser steps from `{base}`; {_trained(settings)}.",
        f"Made with {versions}. The licence is that of the policy it started from, and of the data.",
        "",
        "## Metrics",
        "",
        *_metrics(facts["metrics"]),
        "",
        "## Rows",
        "",
        *_counts(facts["rows"]),
    ]
    if facts["config"]:
        parts += ["", "## Configuration", "", f"As `{CONFIG}`:", "", "```yaml", facts["config"].rstrip(), "```"]
    return "\n".join(parts).rstrip() + "\n"


def _trained(settings: Mapping[str, Any]) -> str:
    frozen = f" Frozen: {', '.join(settings['freeze'])}." if settings.get("freeze") else ""
    if settings.get("lora") is None:
        return f"all weights were trained, in {settings['dtype']}.{frozen}".removesuffix(".")
    under = f"{settings['quantize']}, dequantised here" if settings.get("quantize") else settings["dtype"]
    return f"LoRA adapters were trained and merged into the weights ({under}).{frozen}".removesuffix(".")


def _counts(rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return ["Not known: the run had no datamodule."]
    lines = [f"- {split}: {found['count']}; SHA-256 of the ids {found['sha256']}" for split, found in rows.items()]
    return [*lines, "", f"The ids are in `{ROWS}`, up to {_MOST_IDS} of a split."]


def _metrics(metrics: Mapping[str, float]) -> list[str]:
    if not metrics:
        return ["None were measured before it was saved."]
    return [
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())),
    ]
