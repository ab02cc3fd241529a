"""Evaluations found on disk, matched to the rows and columns of a table.

An evaluation is a folder with ``metrics.json``, as `rft evaluate` writes it. By the facts in its ``experiment`` it
belongs to

1. the recipe whose `match` it has (class of the data, classes, as names or as a named set), on a split that a column
   is read from, if it has one of the numbers that the columns of that recipe and split show: a metric, and where there
   are columns of classes, the value of one of these classes; what asks for presence alone belongs to none;
2. the row of its ``method``, its model and its ``shots``. A model is known by its ``policy``, or by the last part of
   that (a local copy). Shots count where something is trained and the row has shots.

What else differs (how categories are asked for, steps, tuning, rewards, what was trained before, votes over several
answers, how metrics scored, fewer questions than the data has) makes lines of their own: :data:`SETTINGS`. So does the
hash of all further settings of a training (``training``), where a row has runs of one recipe with several. What belongs
nowhere or cannot be read is named with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.report.table_definition import (
    Column,
    Recipe,
    Stage,
    TableDefinition,
    TableRow,
    class_names,
    named_classes,
)

# Facts that make lines of their own, with what counts as usual where a definition says nothing of them.
SETTINGS: dict[str, Any] = {
    "query_mode": None,
    "presence_map": None,
    "box_from": None,
    "steps": None,
    "tuning": "full",
    "thought": None,
    "rules": "strict",
    "group_size": None,
    "prompts_per_step": None,
    "before": (),
    "answers": 1,
    "choose": None,
    "temperature": 0.0,
    "ap_protocol": "coco",
    "score_from": "confidence",
    "mask_protocol": "lisa",
    "acc_50": "at least",
    "limit": None,
    "questions": None,
}
_SCORING = ("ap_protocol", "score_from", "mask_protocol", "acc_50")
_NEEDED = ("method", "policy", "data", "task", "split")
# What makes presence maps: its numbers by class are no AP.
_STAGE_ONE = "presence"


@dataclass(frozen=True)
class FoundRun:
    """One evaluation.

    Attributes:
        folder: where it lies.
        experiment: its facts; those of ``before`` as stages.
        metrics: its numbers, fractions.
        per_class: numbers per class.
        samples: how many questions it has.
        failures: how many answers could not be read.
    """

    folder: Path
    experiment: Mapping[str, Any]
    metrics: Mapping[str, float]
    per_class: Mapping[str, float]
    samples: int
    failures: int

    @property
    def settings(self) -> tuple[Any, ...]:
        """The values of :data:`SETTINGS`; how one of several answers is chosen says nothing of a single one."""
        facts = {name: self.experiment.get(name) for name in SETTINGS}
        if facts["answers"] in (None, 1):
            facts |= {"answers": 1, "choose": None}
        return tuple(facts.values())

    @property
    def training(self) -> str | None:
        """Hash of the further settings of its last training; None where none is stated."""
        return self.experiment.get("training")

    @property
    def numbers(self) -> tuple[Any, ...]:
        """All that was measured."""
        return self.metrics, self.per_class, self.samples, self.failures

    def value(self, column: Column) -> float | None:
        """Its number of a column in percent; None where it has none (-1 stands for absent)."""
        if column.metric is not None:
            numbers = [self.metrics.get(column.metric, -1.0)]
        else:
            names = [column.ap_of] if column.ap_of is not None else class_names(column.mean_ap_of or [])
            numbers = [self.per_class.get(str(name), -1.0) for name in names]
        # A mean GIoU may be negative, though no other number is.
        present = [number for number in numbers if number != -1 and math.isfinite(number)]
        return 100 * sum(present) / len(present) if present else None


@dataclass
class Line:
    """The evaluations of one row with the same settings.

    Attributes:
        settings: values of :data:`SETTINGS`.
        training: in words what tells its trainings from those of other lines with the same settings; else empty.
        runs: (recipe, split) -> seed -> evaluation.
    """

    settings: tuple[Any, ...]
    training: str = ""
    runs: dict[tuple[str, str], dict[int | None, FoundRun]] = field(default_factory=dict)

    @property
    def failure_share(self) -> float | None:
        """Share of answers that could not be read, of all its evaluations together, in percent."""
        runs = [run for seeds in self.runs.values() for run in seeds.values()]
        samples = sum(run.samples for run in runs)
        return 100 * sum(run.failures for run in runs) / samples if samples else None

    def values(self, table: TableDefinition, name: str) -> dict[int | None, float]:
        """Seed -> number of a column; a mean of columns has the seeds that all of them have."""
        column = table.columns[name]
        if column.is_measured:
            found = self.runs.get((table.recipe_of(column), column.split), {})
            numbers = {seed: run.value(column) for seed, run in found.items()}
        else:
            parts = {part: self.values(table, part) for part in column.weights}
            seeds = list(dict.fromkeys(seed for part in parts.values() for seed in part))
            numbers = {seed: column.mean({part: parts[part].get(seed) for part in parts}) for seed in seeds}
        return {seed: number for seed, number in numbers.items() if number is not None}


@dataclass
class Matched:
    """Evaluations by row.

    Attributes:
        lines: number of the row -> its lines.
        left: what belongs to no row, is there already, or cannot be read, with the reason.
    """

    lines: dict[int, list[Line]]
    left: list[tuple[Path, str]]


def find_runs(folders: Iterable[str | Path]) -> tuple[list[FoundRun], list[tuple[Path, str]]]:
    """The evaluations in and below some folders, each once, by name; and what is none, with the reason.

    Raises:
        DatasetNotFoundError: a folder does not exist, or holds none.
        AnnotationError: no ``metrics.json`` is of its form.
    """
    files: dict[Path, Path] = {}
    for folder in map(Path, folders):
        found = sorted(folder.rglob("metrics.json"))
        if not found:
            state = "holds no metrics.json" if folder.is_dir() else "is no folder"
            raise DatasetNotFoundError(f"{folder} {state}. Name a folder that `rft evaluate` wrote, or one above it.")
        files.update((file.resolve(), file) for file in found)
    runs: list[FoundRun] = []
    unread: list[tuple[Path, str]] = []
    for file in files.values():
        try:
            runs.append(read_run(file))
        except AnnotationError as error:
            unread.append((file.parent, str(error)))
    if not runs:
        raise AnnotationError(f"None of the {len(unread)} metrics.json that were found can be read. {unread[0][1]}")
    return runs, unread


def read_run(file: Path) -> FoundRun:
    """An evaluation from its ``metrics.json``.

    Raises:
        AnnotationError: it is not of its form.
    """
    try:
        block = json.loads(file.read_text(encoding="utf-8"))
        experiment, failures = block["experiment"], block["parse_failures"]["count"]
        if missing := [name for name in _NEEDED if name not in experiment]:
            raise KeyError(f"experiment.{missing[0]}")
        metrics, per_class = (
            {str(name): float(value) for name, value in block[part].items()} for part in ("metrics", "per_class")
        )
        facts = dict(experiment)
        if "before" in facts:
            facts["before"] = tuple(map(Stage.of, facts["before"]))
        found = FoundRun(file.parent, facts, metrics, per_class, int(block["samples"]), int(failures))
        hash((found.settings, found.training, facts.get("seed")))  # they tell runs apart: plain values alone
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnnotationError(
            f"{file}: expected what `rft evaluate` writes, with experiment, samples, metrics, per_class and "
            f"parse_failures, but {type(error).__name__}: {error}."
        ) from error


def match_runs(table: TableDefinition, runs: Sequence[FoundRun], unread: Sequence[tuple[Path, str]] = ()) -> Matched:
    """Sort evaluations into the rows of a table.

    Args:
        table: the table.
        runs: evaluations.
        unread: what could not be read, with the reason.

    Raises:
        ConfigConflictError: two of them are the same run, with different numbers.
    """
    found: dict[tuple[int, tuple[Any, ...]], list[tuple[tuple[str, str], FoundRun]]] = {}
    left: list[tuple[Path, str]] = []
    for run in runs:
        part, row = _part_of(table, run), _row_of(table, run)
        if isinstance(part, str) or isinstance(row, str):
            left.append((run.folder, part if isinstance(part, str) else str(row)))
            continue
        run = _counted(table.recipes[part[0]], _completed(table, table.rows[row], run))
        found.setdefault((row, run.settings), []).append((part, run))
    lines: dict[int, list[Line]] = {}
    for (row, _), parts in sorted(found.items(), key=lambda entry: (entry[0][0], str(entry[0][1]))):
        lines.setdefault(row, []).extend(_lines(table.rows[row], parts, left))
    return Matched(lines, [*left, *unread])


def worded(value: Any) -> str:
    """A setting as a reader sees it."""
    return " then ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def describe(run: FoundRun) -> str:
    """What an evaluation asked, in short."""
    words = [str(run.experiment["data"]), f"split {run.experiment['split']}"]
    facts = {**dict(zip(SETTINGS, run.settings, strict=True)), "training": run.training}
    words += [f"{name} {worded(value)}" for name, value in facts.items() if value not in (None, ())]
    return ", ".join(words)


def _lines(
    row: TableRow, parts: Sequence[tuple[tuple[str, str], FoundRun]], left: list[tuple[Path, str]]
) -> list[Line]:
    """Lines of evaluations with the same settings: of recipes that were trained in several ways one for each way.

    Recipes differ in their data, so that hashes of different ones say nothing about each other. Adds copies to `left`.
    """
    ways: dict[str, set[str | None]] = {}
    for (recipe, _), run in parts:
        ways.setdefault(recipe, set()).add(run.training)
    lines: dict[str, Line] = {}
    for part, run in parts:
        count, training = len(ways[part[0]]), ""
        if count > 1:
            training = f"one of {count} trainings that differ in other settings ({run.training or 'not recorded'})"
        line = lines.setdefault(training, Line(run.settings, training))
        seed = run.experiment.get("seed") if row.trainings else None
        same = line.runs.setdefault(part, {}).setdefault(seed, run)
        if same is run:
            continue
        if repr(same.numbers) != repr(run.numbers):  # their text, since NaN is not equal to itself
            of_seed = "" if seed is None else f" with seed {seed}"
            raise ConfigConflictError(
                f"{same.folder} and {run.folder} are the same run, but their numbers differ: {row}{of_seed}, "
                f"{describe(run)}. Name one of them."
            )
        left.append((run.folder, f"the same run as {same.folder}, with the same numbers; it counts once"))
    return [lines[training] for training in sorted(lines)]


def _completed(table: TableDefinition, row: TableRow, run: FoundRun) -> FoundRun:
    """An evaluation with what is usual where it does not say what came before and how it was scored.

    Earlier versions said neither, and nothing is said of metrics that a recipe does not have.
    """
    usual = {**SETTINGS, **table.usual(row)}
    open_facts = {name: usual[name] for name in _SCORING if run.experiment.get(name) is None}
    return replace(run, experiment={"before": usual["before"], **run.experiment, **open_facts})


def _part_of(table: TableDefinition, run: FoundRun) -> tuple[str, str] | str:
    """(recipe, split) of an evaluation, or why it has none."""
    facts, split = run.experiment, str(run.experiment["split"])
    if facts["task"] == _STAGE_ONE:
        return "presence evaluation, stage one"
    for name, recipe in table.recipes.items():
        if any(_resolved(key, facts.get(key)) != _resolved(key, value) for key, value in recipe.match.items()):
            continue
        columns = [c for c in table.columns.values() if c.is_measured and table.recipe_of(c) == name]
        columns = [column for column in columns if column.split == split]
        if not columns:
            return f"no column is read from split {split}"
        of_classes = [column for column in columns if column.metric is None]
        if not any(run.value(column) is not None for column in of_classes or columns):
            return f"it has none of the numbers of the columns, but {', '.join([*run.metrics][:4]) or 'none at all'}"
        return name, split
    expected = " or ".join(_facts(recipe.match) for recipe in table.recipes.values())
    return f"its data is {_facts({key: facts.get(key) for key in ('data', 'classes')})}; the table is on {expected}"


def _resolved(fact: str, value: Any) -> Any:
    """A fact as it is compared: named sets of classes are what they name."""
    return named_classes(value) if fact == "classes" else value


def _counted(recipe: Recipe, run: FoundRun) -> FoundRun:
    """An evaluation that says so where it has another number of questions than the data is known to have."""
    facts = run.experiment
    asked = (facts["split"], facts.get("query_mode"))
    same = [e for e in recipe.evaluations.values() if e.presence_map is None and (e.split, e.query_mode) == asked]
    known = [evaluation.questions for evaluation in same if isinstance(evaluation.questions, int)]
    if not known or run.samples in known:
        return run
    return replace(run, experiment={**facts, "questions": f"{run.samples:,} of {max(known):,}"})


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if key == "data" else f"{key} {value}" for key, value in facts.items())


def _row_of(table: TableDefinition, run: FoundRun) -> int | str:
    """Number of the row of an evaluation, or why it has none."""
    method, policy, shots = (run.experiment.get(name) for name in ("method", "policy", "shots"))
    rows = [(number, row) for number, row in enumerate(table.rows) if row.method == method]
    if not rows:
        return f"there is no row of method {method}"
    rows = [(number, row) for number, row in rows if _is_model(table, row, policy)]
    if not rows:
        return f"there is no row of method {method} with policy {policy}"
    for number, row in rows:
        if not row.trainings or row.shots is None or row.shots == shots:
            return number
    return f"there is no row of {rows[0][1].model}, {method} with {shots} shots"


def _is_model(table: TableDefinition, row: TableRow, policy: Any) -> bool:
    if row.model is None:
        return True
    expected = table.models[row.model].policy
    return policy is not None and expected.rstrip("/").rsplit("/", 1)[-1] == str(policy).rstrip("/").rsplit("/", 1)[-1]


__all__ = ["SETTINGS", "FoundRun", "Line", "Matched", "describe", "find_runs", "match_runs", "read_run", "worded"]
