"""Definitions of result tables: which runs fill one, how each column is read, and what is published.

The shipped ones are ``configs/paper/tables/*.yaml``: their keys are the attributes of the classes here, and
:mod:`rft_lightning.report.table_files` reads and checks them.
Numbers of a table are percents: a hundred times the fractions that ``metrics.json`` holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

from rft_lightning.errors import ConfigConflictError

_SETS_OF = ("coco", "lvis", "shapes")
ZERO_SHOT, SFT, RFT, SFT_RFT = "zero-shot", "SFT", "RFT", "SFT then RFT"
# The trainings that lead to each method, in order; comparison systems are not trained.
TRAININGS = {ZERO_SHOT: (), SFT: (SFT,), RFT: (RFT,), SFT_RFT: (SFT, RFT)}
PRESENCE_SOURCES = ("base", "tuned")
# What two printed numbers that were each rounded to one decimal can differ by.
ROUNDING = 0.1 + 1e-6


class Stage(NamedTuple):
    """A training before the last one, in the facts that evaluations state; None stands for not known.

    Attributes:
        method: what trained.
        steps: of the optimiser.
        tuning: full, lora or qlora.
        thought: whether supervised answers had one.
        prompts_per_step: of all processes together.
    """

    method: str | None
    steps: int | None = None
    tuning: str | None = None
    thought: bool | None = None
    prompts_per_step: int | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Stage:
        """The stage that an entry of ``before`` describes."""
        return cls(*(facts.get(name) for name in cls._fields))

    def fits(self, planned: Stage) -> bool:
        """Whether it is trained as planned, as far as is known."""
        return all(value in (None, other) for value, other in zip(self, planned, strict=True))

    def __str__(self) -> str:
        facts = [
            None if self.steps is None else f"{self.steps} steps",
            self.tuning,
            None if self.thought is None else "with thought" if self.thought else "no thought",
            None if self.prompts_per_step is None else f"{self.prompts_per_step} prompts per step",
        ]
        known = ", ".join(fact for fact in facts if fact is not None)
        return f"{self.method} ({known})" if known else str(self.method)


@dataclass(frozen=True)
class TableModel:
    """A model of a table.

    Attributes:
        policy: checkpoint that its runs start from.
        parameters: how many it has; the cost estimate follows from it.
        rft: settings of its Visual-RFT runs by their options, such as ``model.group_size``, which is required.
    """

    policy: str
    parameters: float
    rft: dict[str, Any]


@dataclass(frozen=True)
class System:
    """A comparison system, which is only evaluated.

    Attributes:
        files: configuration files over the recipe's.
        overrides: settings by their options.
        parameters: how many it has; null leaves it out of the cost estimate.
        note: what has to be done before.
    """

    files: list[str]
    overrides: dict[str, Any] = field(default_factory=dict)
    parameters: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of every run of a recipe.

    Attributes:
        split: what it asks about.
        query_mode: which categories are asked for, where the data has the setting.
        presence_map: whose presence map it asks by: of the model before training (base) or after it (tuned).
        files: configuration files over those of the run.
        overrides: settings by their options.
        questions: how many there are; by model where they depend on it; null: not known before.
        answer_tokens: the most of an answer; the table's when null.
        optional: planned only where it is named.
    """

    split: str = "test"
    query_mode: str | None = None
    presence_map: str | None = None
    files: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    questions: int | dict[str, int] | None = None
    answer_tokens: int | None = None
    optional: bool = False

    def questions_of(self, model: str | None) -> int | None:
        """How many questions a model gets."""
        return self.questions.get(model or "") if isinstance(self.questions, dict) else self.questions


@dataclass(frozen=True)
class Recipe:
    """A data set of a table with its configuration files.

    Attributes:
        file: configuration file of the runs.
        match: facts of an evaluation (``experiment`` in ``metrics.json``) by which it is known as one of this recipe.
        evaluations: by name.
        fit: configuration file of the training, where it is another one.
        fit_table: the table among whose runs the trained ones are, where that is another one.
        presence: the evaluation that makes a presence map, where one is used; ``files`` make it one.
    """

    file: str
    match: dict[str, Any]
    evaluations: dict[str, Evaluation]
    fit: str | None = None
    fit_table: str | None = None
    presence: Evaluation | None = None


@dataclass(frozen=True)
class Column:
    """A column, read from the evaluations of one recipe and split.

    Exactly one of the first three says how; or none, and the column is the mean of others.

    Attributes:
        metric: name of a number in ``metrics``.
        ap_of: class whose number in ``per_class`` it is.
        mean_ap_of: classes whose mean in ``per_class`` it is: a list, or the name of a constant that holds them.
        mean_of: columns whose mean it is, or column -> weight. Beside one of the first three it is what published
            numbers are recomputed by.
        recipe: name of the recipe; where there is one only, that.
        split: split of the evaluation.
    """

    metric: str | None = None
    ap_of: str | None = None
    mean_ap_of: str | list[str] | None = None
    mean_of: list[str] | dict[str, float] | None = None
    recipe: str | None = None
    split: str = "test"

    @property
    def is_measured(self) -> bool:
        """Whether evaluations hold it, not other columns."""
        return any(source is not None for source in (self.metric, self.ap_of, self.mean_ap_of))

    @property
    def weights(self) -> dict[str, float]:
        """Column -> weight of the mean; empty without one."""
        return dict(self.mean_of) if isinstance(self.mean_of, dict) else dict.fromkeys(self.mean_of or (), 1.0)

    def mean(self, values: Mapping[str, float | None]) -> float | None:
        """The mean of the columns it depends on; None where one of them is missing."""
        parts = [(values.get(name), weight) for name, weight in self.weights.items()]
        if not parts or any(value is None for value, _ in parts):
            return None
        return sum(value * weight for value, weight in parts if value is not None) / sum(self.weights.values())


@dataclass(frozen=True)
class TableRow:
    """A row: what was trained, and what is published of it.

    Attributes:
        method: ``zero-shot``, ``SFT``, ``RFT``, ``SFT then RFT`` or a comparison system.
        model: name of the model; none for comparison systems.
        shots: pictures per class in training; null where it is no few-shot experiment.
        published: a number per column, in their order, null where there is none; null for a row that is not published.
        notes: column -> what is odd about its published number.
        label: how the publication calls the method, where that is another name.
    """

    method: str
    model: str | None = None
    shots: int | None = None
    published: list[float | None] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    label: str | None = None

    @property
    def trainings(self) -> tuple[str, ...]:
        """What is trained, in order."""
        return TRAININGS.get(self.method, ())

    def __str__(self) -> str:
        shots = f"{self.shots} {'shot' if self.shots == 1 else 'shots'}" if self.shots is not None else ""
        method = f"{self.method} ({self.label})" if self.label is not None else self.method
        return ", ".join(word for word in (self.model, method, shots) if word)


@dataclass(frozen=True)
class TableDefinition:
    """A table.

    Attributes:
        title: what it shows.
        source: where the published numbers are from.
        models: by name.
        training: trained method -> configuration files over the recipe's.
        recipes: by name.
        columns: by name, in order.
        rows: in order.
        steps: optimiser steps of a training.
        prompts_per_step: of all processes together.
        prompt_tokens: of a prompt with its picture; about.
        completion_tokens: the most of a completion in training.
        answer_tokens: the most of an answer in evaluation.
        seeds: of the training runs.
        settings: of the published runs, by the names of ``experiment``; runs with others are marked.
        settings_of: the same, of one method: over `settings`.
        systems: comparison systems by name.
        notes: lines below the table.
        name: of the file, and of the folder of the runs.
    """

    title: str
    source: str
    models: dict[str, TableModel]
    training: dict[str, list[str]]
    recipes: dict[str, Recipe]
    columns: dict[str, Column]
    rows: list[TableRow]
    steps: int
    prompts_per_step: int
    prompt_tokens: int
    completion_tokens: int
    answer_tokens: int
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    settings_of: dict[str, dict[str, Any]] = field(default_factory=dict)
    systems: dict[str, System] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = ""

    def usual(self, row: TableRow) -> dict[str, Any]:
        """Settings of the published runs of a row; those of the training are None where nothing is trained.

        ``before`` has the trainings before the last one as they are planned: where the definition says nothing else,
        all weights, and answers with a thought.
        """
        group_size = None
        if row.model is not None and row.trainings[-1:] == (RFT,):
            group_size = self.models[row.model].rft["model.group_size"]
        stage = {"steps": self.steps, "tuning": "full", "thought": True, "prompts_per_step": self.prompts_per_step}
        training = {
            "group_size": group_size,
            "prompts_per_step": self.prompts_per_step if row.trainings else None,
            "before": [{"method": name, **stage} for name in row.trainings[:-1]],
        }
        usual = {**training, **self.settings, **self.settings_of.get(row.method, {})}
        return {**usual, "before": tuple(map(Stage.of, usual["before"]))}

    def published(self, row: TableRow) -> dict[str, float | None]:
        """Column -> published number of a row."""
        return dict(zip(self.columns, row.published or [None] * len(self.columns), strict=True))

    def recipe_of(self, column: Column) -> str:
        """Name of the recipe that a column is measured with."""
        return column.recipe or next(iter(self.recipes))

    def flags(self, row: TableRow) -> dict[str, str]:
        """Column -> what is odd about the published number: notes of the definition, and means that are none."""
        numbers, flags = self.published(row), dict(row.notes)
        for name, column in self.columns.items():
            printed, mean = numbers[name], column.mean(numbers)
            if printed is not None and mean is not None and abs(printed - mean) > ROUNDING:
                flags[name] = f"printed {printed:.1f}, but the mean of the printed cells is {mean:.1f}" + (
                    f"; {flags[name]}" if name in flags else ""
                )
        return flags


def named_classes(classes: str | Sequence[str] | None) -> frozenset[str] | None:
    """The names that a `classes` of the data stands for: those of sets such as ``few_shot_8``; None for all."""
    if classes is None:
        return None
    # By name, as the definitions name them: the data sets lie above this package.
    modules = [import_module(f"rft_lightning.datamodules.{name}") for name in _SETS_OF]
    sets: dict[str, Sequence[str]] = {name: names for module in modules for name, names in module.CLASS_SETS.items()}
    words = [classes] if isinstance(classes, str) else classes
    return frozenset(str(name) for word in words for name in sets.get(str(word), [word]))


def class_names(classes: str | list[str]) -> list[str]:
    """The names of a set of classes.

    Raises:
        ConfigConflictError: a string is no constant of a module that holds names.
    """
    if isinstance(classes, list):
        return classes
    module, _, constant = classes.rpartition(".")
    try:
        names = list(getattr(import_module(module), constant))
    except (ImportError, ValueError, AttributeError, TypeError) as error:
        raise ConfigConflictError(
            f"mean_ap_of {classes!r}: expected a list of class names, or the full name of a constant that holds them, "
            f"such as rft_lightning.datamodules.coco.NOVEL_15 ({error})."
        ) from error
    return [str(name) for name in names]


__all__ = [
    "RFT",
    "SFT",
    "SFT_RFT",
    "TRAININGS",
    "ZERO_SHOT",
    "Column",
    "Evaluation",
    "Recipe",
    "Stage",
    "System",
    "TableDefinition",
    "TableModel",
    "TableRow",
    "class_names",
    "named_classes",
]
