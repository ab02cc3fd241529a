"""`config: base.yaml` inside a configuration file: start from another file; and what `--data CLASS` leaves of a file.

jsonargparse replaces whole groups when a file includes another one (checked with 4.53), so that a file which sets
`trainer.max_steps` loses every other trainer setting of its base. Files are therefore merged here, before parsing: the
including file wins, key by key.

jsonargparse also keeps arguments of the same name when the command line names another class: `--data ImagesDataModule`
would ask about the `classes` of the file's data set. What describes the file's own data is therefore left out.

And it replaces whole mappings when a second file is given: one that changes a single reward would lose the others. The
rewards and weights of a task are therefore merged over the files as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonargparse
import yaml


def install_loader(words: Sequence[str] = (), shared: Collection[str] = ()) -> None:
    """Make every YAML file that jsonargparse reads resolve its `config:` line; calling it again replaces the settings.

    Args:
        words: the command line. Where it names a datamodule, a file's `data` block of another class keeps only
            `shared`.
        shared: arguments that are not about the data of one class.
    """
    load = jsonargparse.get_loader("yaml")
    load = getattr(load, "plain", load)
    named, current = named_data_class(words), None
    task: dict[str, Any] = {}

    def load_with_base(text: str) -> Any:
        nonlocal current, task
        config = resolve(text)
        data = config.get("data") if isinstance(config, dict) else None
        if not isinstance(data, dict):
            return config
        task = merge_rewards(data, task)
        if named is None:
            return config
        current = _class_name(data) if "class_path" in data else current  # else more of the file before
        return config if current in (None, named) else {**config, "data": _only(data, shared)}

    def resolve(text: str) -> Any:
        data = load(text)
        if not isinstance(data, dict) or not isinstance(data.get("config"), str):
            return data
        base_file = jsonargparse.Path(data.pop("config"), mode="fr")
        with base_file.relative_path_context():
            base = resolve(Path(base_file.absolute).read_text(encoding="utf-8"))
        return merge(base, data)

    load_with_base.plain = load  # type: ignore[attr-defined]
    jsonargparse.set_loader("yaml", load_with_base, (yaml.YAMLError,))


def named_data_class(words: Sequence[str]) -> str | None:
    """The datamodule class that a command line names with `--data CLASS`; None without one (or where it is a file)."""
    named = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        value = following if word == "--data" else word.removeprefix("--data=") if word.startswith("--data=") else ""
        if value.replace(".", "_").isidentifier() and not value.endswith((".yaml", ".yml", ".json")):
            named = value.rsplit(".", 1)[-1]
    return named


def merge_rewards(data: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Complete the rewards and weights of a file's task, in place, by those of the files before it.

    A reward that is null is left out, and its weight with it.

    Args:
        data: the file's `data` block.
        earlier: the task of the files before it.

    Returns:
        the task of all files so far.
    """
    block = (data.get("init_args") or data).get("task")
    if not isinstance(block, dict):
        return earlier
    # A copy, since the parser works in place on what it is given.
    whole = deepcopy(block if {"class_path", "init_args"} & block.keys() else {"init_args": block})
    task = merge(earlier, whole)
    arguments, settings = block.get("init_args") or block, task.get("init_args") or {}
    rewards, weights = settings.get("rewards"), settings.get("reward_weights")
    if isinstance(rewards, dict) and isinstance(weights, dict):
        settings["reward_weights"] = {name: w for name, w in weights.items() if rewards.get(name, name) is not None}
    if isinstance(rewards, dict):
        settings["rewards"] = {name: reward for name, reward in rewards.items() if reward is not None}
    arguments.update({name: deepcopy(settings[name]) for name in ("rewards", "reward_weights") if name in settings})
    return task


def _only(block: dict[str, Any], shared: Collection[str]) -> dict[str, Any]:
    """A class block with no other arguments than `shared`."""
    arguments = block.get("init_args") or {}
    return {**block, "init_args": {key: value for key, value in arguments.items() if key in shared}}


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`, key by key.

    A block whose `class_path` changes is taken from `over` alone: arguments of one class must not reach another. Lists
    are replaced; a key that ends in "+" appends its list to the base's, where an entry of a class that the base's list
    already holds is merged into that one.
    """
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "class_path" in over and _class_name(over) != _class_name(base):
        return over
    merged = dict(base)
    for key, value in over.items():
        plain = key.removesuffix("+")
        if key.endswith("+") and isinstance(merged.get(plain), list):
            merged[plain] = _appended(merged[plain], value if isinstance(value, list) else [value])
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def _appended(base: list[Any], more: list[Any]) -> list[Any]:
    """`base` and `more`: two callbacks of one class would do the same work twice, so theirs are merged."""
    result = list(base)
    places = {_class_name(item): i for i, item in enumerate(base) if isinstance(item, dict) and "class_path" in item}
    for entry in more:
        place = places.get(_class_name(entry)) if isinstance(entry, dict) else None
        if place is None:
            result.append(entry)
        else:
            result[place] = merge(result[place], entry)
    return result


def _class_name(block: dict[str, Any]) -> str:
    """The last part: a class may be named by its full path, by a shorter public one, or bare."""
    return str(block.get("class_path")).rsplit(".", 1)[-1]
