"""Definitions of tables as YAML files: found by number, name or path, read, and checked."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from rft_lightning.errors import ConfigConflictError
from rft_lightning.report.table_definition import (
    PRESENCE_SOURCES,
    RFT,
    SFT,
    TRAININGS,
    Column,
    Evaluation,
    Recipe,
    Stage,
    System,
    TableDefinition,
    TableModel,
    TableRow,
    class_names,
)


def shipped_tables() -> dict[str, Path]:
    """Name -> file of the definitions that come with the package; ``2`` stands for ``table2``."""
    files = sorted((configs_root() / "paper" / "tables").glob("*.yaml"))
    return {file.stem: file for file in files}


def configs_root() -> Path:
    """Folder of the configuration files that come with the package."""
    return Path(str(resources.files("rft_lightning.configs")))


def is_table(word: str) -> bool:
    """Whether a word is the number or the name of a shipped definition."""
    return _shipped(word) is not None


def _shipped(word: str) -> Path | None:
    shipped = shipped_tables()
    return shipped.get(f"table{word}") or shipped.get(word)


def load_table(word: str) -> TableDefinition:
    """A definition by its number (3), its name (shapes_table3) or its file.

    Raises:
        ConfigConflictError: there is none of this name, or the file is not of the form that this module describes.
    """
    file = _shipped(word) or Path(word)
    if not file.is_file():
        names = ", ".join(name.removeprefix("table") for name in shipped_tables())
        raise ConfigConflictError(f"There is no table {word!r}. Give one of {names}, or a YAML file that defines one.")
    try:
        block = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigConflictError(f"{file} is no YAML file: {error}") from error
    table = _table(block, str(file), file.stem)
    _check(table, str(file))
    return table


def _table(block: Any, where: str, name: str) -> TableDefinition:
    if not isinstance(block, Mapping):
        raise ConfigConflictError(
            f"{where}: expected a mapping with the keys of a table, found {type(block).__name__}."
        )
    kinds = {"models": TableModel, "systems": System, "columns": Column}
    parts = {
        key: {name: _build(kind, part, f"{where}: {key}.{name}") for name, part in _mapping(block, key, where).items()}
        for key, kind in kinds.items()
        if key in block
    }
    if "recipes" in block:
        recipes = _mapping(block, "recipes", where).items()
        parts["recipes"] = {name: _recipe(part, f"{where}: recipes.{name}") for name, part in recipes}
    rows = block.get("rows")
    if not isinstance(rows, list):
        raise ConfigConflictError(f"{where}: expected rows to be a list, found {type(rows).__name__}.")
    built = [_build(TableRow, row, f"{where}: row {number}") for number, row in enumerate(rows, 1)]
    return _build(TableDefinition, {**block, **parts, "rows": built, "name": name}, where)


def _recipe(block: Any, where: str) -> Recipe:
    if not isinstance(block, Mapping):
        raise ConfigConflictError(f"{where}: expected a mapping, found {block!r}.")
    found = {
        name: _build(Evaluation, part or {}, f"{where}.evaluations.{name}")
        for name, part in _mapping(block, "evaluations", where).items()
    }
    parts: dict[str, Any] = {"evaluations": found}
    if block.get("presence") is not None:
        parts["presence"] = _build(Evaluation, block["presence"], f"{where}.presence")
    return _build(Recipe, {**block, **parts}, where)


def _mapping(block: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    part = block.get(key)
    if not isinstance(part, Mapping):
        raise ConfigConflictError(f"{where}: expected {key} to be a mapping of names, found {part!r}.")
    return part


def _build(kind: Any, block: Any, where: str) -> Any:
    """An object of a dataclass from the keys of a mapping, each of its type."""
    if not isinstance(block, Mapping):
        raise ConfigConflictError(f"{where}: expected a mapping, found {block!r}.")
    hints = get_type_hints(kind)
    for key in block:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            advice = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(hints)}."
            raise ConfigConflictError(f"{where}: unknown key {key!r}; {advice}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in block]:
        raise ConfigConflictError(f"{where}: {', '.join(missing)} is missing.")
    for key, value in block.items():
        if not _fits(value, hints[key]):
            name = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key])
            raise ConfigConflictError(f"{where}: expected {key} to be {name.replace('None', 'null')}, found {value!r}.")
    return kind(**block)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, and so are the things in it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if hint is Any:
        return True
    if isinstance(value, bool):  # which Python counts among the integers
        return hint is bool
    return isinstance(value, (float, int) if hint is float else hint)


def _check(table: TableDefinition, where: str) -> None:
    """See that the parts of a table fit together."""
    for name, model in table.models.items():
        if not isinstance(model.rft.get("model.group_size"), int):
            raise ConfigConflictError(f"{where}: models.{name}.rft needs model.group_size, found {model.rft}.")
    if unknown := set(table.training) - {SFT, RFT}:
        raise ConfigConflictError(f"{where}: training has {sorted(unknown)}; expected {SFT} and {RFT}.")
    for settings in (table.settings, *table.settings_of.values()):
        if not _fits(settings.get("before", []), list[dict[str, Any]]):
            raise ConfigConflictError(
                f"{where}: expected before of the settings to be a list of trainings, each with "
                f"{', '.join(Stage._fields)}; found {settings['before']!r}."
            )
    for name, recipe in table.recipes.items():
        _check_recipe(recipe, table, f"{where}: recipes.{name}")
    for name, column in table.columns.items():
        _check_column(column, table, f"{where}: columns.{name}")
    seen: set[tuple[str | None, str, int | None]] = set()
    for number, row in enumerate(table.rows, 1):
        _check_row(row, table, f"{where}: row {number} ({row})")
        if (row.model, row.method, row.shots) in seen:
            raise ConfigConflictError(f"{where}: row {number} ({row}) is there twice.")
        seen.add((row.model, row.method, row.shots))


def _check_recipe(recipe: Recipe, table: TableDefinition, where: str) -> None:
    if not recipe.evaluations:
        raise ConfigConflictError(f"{where}: there are no evaluations.")
    for name, evaluation in recipe.evaluations.items():
        if evaluation.presence_map not in (None, *PRESENCE_SOURCES):
            raise ConfigConflictError(
                f"{where}.evaluations.{name}: expected presence_map to be one of {', '.join(PRESENCE_SOURCES)}, found "
                f"{evaluation.presence_map!r}."
            )
        if evaluation.presence_map is not None and recipe.presence is None:
            raise ConfigConflictError(f"{where}.evaluations.{name} has a presence_map, but the recipe no presence.")
        if isinstance(evaluation.questions, dict) and (unknown := set(evaluation.questions) - set(table.models)):
            raise ConfigConflictError(f"{where}.evaluations.{name}: questions of unknown models {sorted(unknown)}.")


def _check_column(column: Column, table: TableDefinition, where: str) -> None:
    sources = [name for name in ("metric", "ap_of", "mean_ap_of") if getattr(column, name) is not None]
    if len(sources) > 1 or not (sources or column.mean_of):
        raise ConfigConflictError(f"{where}: expected one of metric, ap_of, mean_ap_of, or mean_of; found {sources}.")
    if unknown := set(column.weights) - set(table.columns):
        raise ConfigConflictError(f"{where}: mean_of has unknown columns {sorted(unknown)}.")
    if sources and column.recipe is None and len(table.recipes) > 1:
        raise ConfigConflictError(f"{where}: expected a recipe, one of {', '.join(table.recipes)}.")
    if column.recipe is not None and column.recipe not in table.recipes:
        raise ConfigConflictError(f"{where}: unknown recipe {column.recipe!r}; there are {', '.join(table.recipes)}.")
    splits = {evaluation.split for evaluation in table.recipes[table.recipe_of(column)].evaluations.values()}
    if sources and column.split not in splits:
        raise ConfigConflictError(f"{where}: no evaluation is on split {column.split}; they are on {sorted(splits)}.")
    if column.mean_ap_of is not None:
        class_names(column.mean_ap_of)


def _check_row(row: TableRow, table: TableDefinition, where: str) -> None:
    if row.method not in {**TRAININGS, **table.systems}:
        known = ", ".join([*TRAININGS, *table.systems])
        raise ConfigConflictError(f"{where}: unknown method {row.method!r}; expected one of {known}.")
    if (row.model is None) != (row.method in table.systems) or row.model not in (None, *table.models):
        known = ", ".join(table.models)
        raise ConfigConflictError(
            f"{where}: found model {row.model!r}; expected one of {known}, and none for a comparison system."
        )
    if missing := set(row.trainings) - set(table.training):
        raise ConfigConflictError(f"{where}: training says nothing of {sorted(missing)}.")
    if row.published is not None and len(row.published) != len(table.columns):
        raise ConfigConflictError(
            f"{where}: expected {len(table.columns)} published numbers ({', '.join(table.columns)}), found "
            f"{len(row.published)}."
        )
    if unknown := set(row.notes) - set(table.columns):
        raise ConfigConflictError(f"{where}: notes on unknown columns {sorted(unknown)}.")


__all__ = ["configs_root", "is_table", "load_table", "shipped_tables"]
