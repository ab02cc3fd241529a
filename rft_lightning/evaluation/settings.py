"""What the answers of an evaluation depend on, so that one is never continued with the answers of another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rft_lightning.errors import ConfigConflictError
from rft_lightning.evaluation.voting import Voting

# How the work is cut and where the data lies; the questions themselves are compared by their ids.
_NOT_OF_ANSWERS = {"root", "image_root", "num_workers", "batch_size", "eval_batch_size", "oversample"}


def settings_of(
    model: Any,
    config: str | None,
    ids: Sequence[str],
    ckpt_path: str | None,
    *,
    split: str,
    voting: Voting,
    callbacks: Iterable[Any] = (),
) -> dict[str, Any]:
    """All that an answer depends on but for the machine, as plain data.

    Args:
        model: the module that answers.
        config: the configuration as YAML; None outside of the command line.
        ids: of the questions.
        ckpt_path: the checkpoint of `fit`, where there is one.
        split: which is asked.
        voting: how a question is answered.
        callbacks: metric callbacks, which may add to answers.
    """
    found = yaml.safe_load(config) if config else {}
    data = dict((found.get("data") or {}).get("init_args") or {})
    arguments = {"policy": getattr(model, "checkpoint", None), **((found.get("model") or {}).get("init_args") or {})}
    files = {name: _fingerprint(value) for name, value in arguments.items() if _is_file(value)}
    return {
        "split": split,
        "questions": len(ids),
        "questions_sha256": hashlib.sha256("\n".join(ids).encode("utf-8", "surrogatepass")).hexdigest(),
        "voting": asdict(voting),
        "checkpoint": _fingerprint(ckpt_path),
        "policy": arguments["policy"],
        "files": files,
        "completed": {type(c).__name__: c.completed_by for c in callbacks if c.completed_by},
        "seed": found.get("seed_everything"),
        "precision": (found.get("trainer") or {}).get("precision"),
        "model": found.get("model"),
        "data": {name: value for name, value in data.items() if name not in _NOT_OF_ANSWERS},
    }


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


def _fingerprint(path: str | None) -> str | None:
    """A file or folder by its size and the time it was written: a later checkpoint of the same name is another one."""
    if not path:
        return None
    place = Path(path).resolve()
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    states = [(str(file.relative_to(place)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{place.name} {hashlib.sha256(repr(states).encode()).hexdigest()[:16]}"


__all__ = ["check_settings", "settings_of"]
