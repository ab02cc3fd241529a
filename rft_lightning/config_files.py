"""`config: base.yaml` inside a configuration file: start from another file.

jsonargparse replaces whole groups when a file includes another one (checked with 4.53), so that a file which sets
`trainer.max_steps` loses every other trainer setting of its base. Files are therefore merged here, before parsing: the
including file wins, key by key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonargparse
import yaml


def install_loader() -> None:
    """Make every YAML file that jsonargparse reads resolve its `config:` line; calling it again changes nothing."""
    load = jsonargparse.get_loader("yaml")
    if getattr(load, "resolves_base", False):
        return

    def load_with_base(text: str) -> Any:
        data = load(text)
        if not isinstance(data, dict) or not isinstance(data.get("config"), str):
            return data
        base_file = jsonargparse.Path(data.pop("config"), mode="fr")
        with base_file.relative_path_context():
            base = load_with_base(Path(base_file.absolute).read_text(encoding="utf-8"))
        return merge(base, data)

    load_with_base.resolves_base = True  # type: ignore[attr-defined]
    jsonargparse.set_loader("yaml", load_with_base, (yaml.YAMLError,))


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`, key by key.

    A block whose `class_path` changes is taken from `over` alone: arguments of one class must not reach another. Lists
    are replaced; a key that ends in "+" appends its list to the base's.
    """
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "class_path" in over and _class_name(over) != _class_name(base):
        return over
    merged = dict(base)
    for key, value in over.items():
        plain = key.removesuffix("+")
        if key.endswith("+") and isinstance(merged.get(plain), list):
            merged[plain] = merged[plain] + (value if isinstance(value, list) else [value])
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def _class_name(block: dict[str, Any]) -> str:
    """The last part: a class may be named by its full path, by a shorter public one, or bare."""
    return str(block.get("class_path")).rsplit(".", 1)[-1]
