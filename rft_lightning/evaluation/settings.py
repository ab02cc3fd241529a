"""What the answers of an evaluation depend on, so that one is never continued with the answers of another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.evaluation.parts import SETTINGS
from rft_lightning.evaluation.voting import Voting

# How the work is cut and where the data lies; the questions themselves are compared by their ids.
_NOT_OF_ANSWERS = {"root", "image_root", "num_workers", "batch_size", "eval_batch_size", "oversample"}
# Attributes that are no settings.
_STATE = {
    "trainer", "policy", "processor", "voting", "workload", "layout", "trained_here", "runs_before", "collate",
    "training",
}  # fmt: skip


def settings_of(
    model: Any,
    config: Mapping[str, Any],
    ids: Sequence[str],
    ckpt_path: str | None,
    *,
    folder: Path,
    split: str,
    voting: Voting,
    callbacks: Iterable[Any] = (),
) -> dict[str, Any]:
    """All that an answer depends on but for the machine, as plain data.

    Args:
        model: the module that answers.
        config: the configuration; outside of the command line see :func:`configured`.
        ids: of the questions.
        ckpt_path: the checkpoint of `fit`, where there is one.
        folder: of the evaluation, which is no part of a policy even if it lies in its folder.
        split: which is asked.
        voting: how a question is answered.
        callbacks: metric callbacks, which may add to answers.
    """
    data = dict((config.get("data") or {}).get("init_args") or {})
    arguments = {"policy": getattr(model, "checkpoint", None), **((config.get("model") or {}).get("init_args") or {})}
    files = {name: _fingerprint(value, folder) for name, value in arguments.items() if _is_file(value)}
    return {
        "split": split,
        "questions": len(ids),
        "questions_sha256": hashlib.sha256("\n".join(ids).encode("utf-8", "surrogatepass")).hexdigest(),
        "voting": asdict(voting),
        "checkpoint": _fingerprint(ckpt_path, folder),
        "policy": arguments["policy"],
        "files": files,
        "completed": {type(c).__name__: c.completed_by for c in callbacks if c.completed_by},
        "seed": config.get("seed_everything"),
        "precision": (config.get("trainer") or {}).get("precision"),
        "model": config.get("model"),
        "data": {name: value for name, value in data.items() if name not in _NOT_OF_ANSWERS},
    }


def configured(trainer: Any, model: Any, datamodule: Any) -> dict[str, Any]:
    """What a configuration would say of objects that were made in Python, as far as they keep what they were given."""
    return {"trainer": {"precision": str(trainer.precision)}, "model": _kept(model), "data": _kept(datamodule)}


def _kept(value: Any) -> Any:
    """Plain data as it is; an object of this package, or of a class made from one, by its public attributes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _kept(entry) for key, entry in value.items()}
    if isinstance(value, Sequence | Set):
        return [_kept(entry) for entry in (sorted(value, key=str) if isinstance(value, Set) else value)]
    kind = value if hasattr(value, "__qualname__") else type(value)  # classes and functions have names of their own
    found: dict[str, Any] = {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    if kind is value or not any(base.__module__.startswith("rft_lightning.") for base in kind.__mro__):
        return found
    names = [name for name in sorted(vars(value)) if not name.startswith("_") and name not in _STATE]
    return {**found, "init_args": {name: _kept(vars(value)[name]) for name in names}}


def check_settings(before: Mapping[str, Any] | None, now: Mapping[str, Any], folder: Path) -> None:
    """Compare with what the answers in the folder depend on.

    Raises:
        ConfigConflictError: they are those of another evaluation.
    """
    if before is None:
        return
    old, new = dict(_flat(before)), dict(_flat(now))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        told = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in changed[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigConflictError(
            f"{folder} holds answers of another evaluation: {told}{more}. Give this one a folder of its own "
            "(--output_dir), or remove that one."
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and len(value) < 1000 and Path(value).exists()


def _fingerprint(path: str | None, folder: Path) -> str | None:
    """A file or folder by its size and the time it was written: a later checkpoint of the same name is another one.

    Raises:
        CheckpointError: there is nothing at `path`.
    """
    if not path:
        return None
    place = Path(path).resolve()
    if not place.exists():
        raise CheckpointError(f"No checkpoint at {path}; expected a .ckpt file or folder that `rft fit` wrote.")
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    # What evaluations write into the folder of a policy is no part of it.
    results = {file.parent for file in files if file.name == SETTINGS} | {folder.resolve()}
    files = [file for file in files if results.isdisjoint(file.parents)]
    states = [(str(file.relative_to(place)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{place.name} {hashlib.sha256(repr(states).encode()).hexdigest()[:16]}"


__all__ = ["check_settings", "configured", "settings_of"]
