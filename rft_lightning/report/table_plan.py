"""`rft table N --plan`: the runs that fill a table, with what they cost.

Every run has a folder: ``RUNS/TABLE/[RECIPE/]MODEL/METHOD_SHOTS/seedN``, its evaluations below it in ``evaluation/``.
:mod:`rft_lightning.report.table_script` makes a shell script of a plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft_lightning.errors import ConfigConflictError
from rft_lightning.report.table_cost import Cost, evaluation_cost, total, training_cost
from rft_lightning.report.table_definition import (
    RFT,
    SFT,
    Evaluation,
    Recipe,
    TableDefinition,
    TableRow,
)
from rft_lightning.report.table_files import configs_root

# What a training run writes at its end, one folder for each attempt; and its checkpoint in such a folder.
TRAINED, LAST = Path("csv/version_*/policy/config.json"), "checkpoints/last.ckpt"
_DATA_ROOT = ("--data.root", "--data.init_args.root")


@dataclass(frozen=True)
class Later:
    """A word that is known when the command runs.

    Attributes:
        function: what of a training run it is: ``last`` (checkpoint), ``begun`` (the same, or null), ``policy``.
        run: folder of the run.
    """

    function: str
    run: Path


@dataclass
class Step:
    """One command of a plan.

    Attributes:
        heading: the row it is first needed for.
        words: the command.
        folder: what it fills.
        cost: of the command.
        needs: keys in the plan of the steps before it.
        done: whether nothing is left to do.
    """

    heading: str
    words: list[str | Later]
    folder: Path
    cost: Cost
    needs: tuple[str, ...] = ()
    done: bool = False

    @property
    def is_training(self) -> bool:
        """Whether it is a training, not an evaluation."""
        return self.words[1] == "fit"

    @property
    def output(self) -> Path:
        """The file below its folder that says it is done; a pattern for a training."""
        return TRAINED if self.is_training else Path("metrics.json")


@dataclass
class Choice:
    """Which runs of a table are planned; None for all of them.

    Attributes:
        models: names of models.
        methods: names of methods.
        shots: numbers of shots; rows that have none (zero-shot) stay.
        evaluations: names of evaluations; all but the optional ones when None.
        seeds: of the training runs; the definition's when None.
    """

    models: Sequence[str] | None = None
    methods: Sequence[str] | None = None
    shots: Sequence[int] | None = None
    evaluations: Sequence[str] | None = None
    seeds: Sequence[int] | None = None

    def check(self, table: TableDefinition) -> None:
        """See that the table has what is named.

        Raises:
            ConfigConflictError: it has not.
        """
        known: dict[str, Sequence[Any]] = {
            "models": list(table.models),
            "methods": list(dict.fromkeys(row.method for row in table.rows)),
            "shots": list(dict.fromkeys(row.shots for row in table.rows if row.shots is not None)),
            "evaluations": list(dict.fromkeys(name for r in table.recipes.values() for name in r.evaluations)),
        }
        for name, words in known.items():
            if unknown := [word for word in getattr(self, name) or () if word not in words]:
                has = ", ".join(map(str, words)) or "none"
                raise ConfigConflictError(f"--{name}: the table has no {', '.join(map(str, unknown))}; it has {has}.")

    def nothing(self, table: TableDefinition) -> str:
        """That a table has no such run, and the rows it has of the models that are named."""
        named = {name: words for name, words in vars(self).items() if words is not None}
        chosen = " ".join(f"--{name} {' '.join(map(str, words))}" for name, words in named.items())
        if rows := self.rows(table):
            return f"{chosen}: the rows {'; '.join(map(str, rows))} have no such evaluation. Leave --evaluations out."
        rows = Choice(models=self.models).rows(table)
        return f"{chosen}: the table has no such row. Name one of those that it has: {'; '.join(map(str, rows))}."

    def rows(self, table: TableDefinition) -> list[TableRow]:
        """The rows that are planned."""
        return [
            row
            for row in table.rows
            if (self.models is None or row.model in self.models)
            and (self.methods is None or row.method in self.methods)
            and (self.shots is None or row.shots is None or row.shots in self.shots)
        ]


@dataclass
class Plan:
    """The commands that fill a table, each once, in an order in which they can be run.

    Attributes:
        table: the table.
        root: folder of all runs.
        choice: what is planned.
        more: further words of every command, such as ``--data.root FOLDER``.
        data_roots: recipe -> ``--data.root`` of its commands; ``RECIPE.fit`` for its trainings, where those have a
            configuration file of their own.
        steps: by the folder that each fills.

    Raises:
        ConfigConflictError: the table has not what is named, or nothing of all that together; or one ``--data.root``
            is given for several.
    """

    table: TableDefinition
    root: Path
    choice: Choice = field(default_factory=Choice)
    more: Sequence[str] = ()
    data_roots: Mapping[str, str] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.choice.check(self.table)
        self._check_roots()
        for row in self.choice.rows(self.table):
            for name, recipe in self.table.recipes.items():
                self._add_row(row, name, recipe)
        if not self.steps:
            raise ConfigConflictError(self.choice.nothing(self.table))
        self._settle()

    def left(self) -> Cost:
        """The cost of what is not done."""
        return total(step.cost for step in self.steps.values() if not step.done)

    def _check_roots(self) -> None:
        recipes = self.table.recipes.items()
        places = [place for name, recipe in recipes for place in (name, f"{name}.fit" if recipe.fit else None) if place]
        if unknown := [place for place in self.data_roots if place not in places]:
            raise ConfigConflictError(
                f"--root: the table has no recipe {', '.join(unknown)}; it has {', '.join(places)}."
            )
        shared = any(word.split("=")[0] in _DATA_ROOT for word in self.more)
        if shared and (len(places) > 1 or self.data_roots):
            raise ConfigConflictError(
                f"--options: --data.root would be that of {', '.join(places)}. Leave it out, and give --root "
                f"{' '.join(f'{place}=FOLDER' for place in places)}."
            )

    def _add_row(self, row: TableRow, name: str, recipe: Recipe) -> None:
        seeds = self.table.seeds if self.choice.seeds is None else self.choice.seeds
        for seed in seeds if row.trainings else [None]:
            run = _Run(self.table, row, name, recipe, seed, self.root, self.more, self.data_roots)
            for step in run.trainings():
                self.steps.setdefault(*step)
            for evaluation in self._evaluations(row, recipe):
                for step in run.evaluation(evaluation):
                    self.steps.setdefault(*step)

    def _evaluations(self, row: TableRow, recipe: Recipe) -> list[str]:
        """Names of the evaluations of a row; a comparison system makes no presence map."""
        wanted = self.choice.evaluations
        return [
            name
            for name, evaluation in recipe.evaluations.items()
            if (name in wanted if wanted is not None else not evaluation.optional)
            and not (evaluation.presence_map is not None and row.model is None)
            # Without a training there is one map only, that of the base model.
            and not (evaluation.presence_map == "tuned" and not row.trainings)
        ]

    def _settle(self) -> None:
        """A step is also done where all that need it are, though its own output may be gone."""
        for key, step in reversed(self.steps.items()):
            users = [other for other in self.steps.values() if key in other.needs]
            step.done = any(step.folder.glob(str(step.output))) or (bool(users) and all(user.done for user in users))


@dataclass
class _Run:
    """A row of a table on one recipe with one seed: its folders and commands."""

    table: TableDefinition
    row: TableRow
    recipe_name: str
    recipe: Recipe
    seed: int | None
    root: Path
    more: Sequence[str]
    data_roots: Mapping[str, str]

    def trainings(self) -> Iterator[tuple[str, Step]]:
        """The training runs, one after the other."""
        for position, training in enumerate(self.row.trainings):
            folder = self._trained(position)
            assert self.row.model is not None
            model, table = self.table.models[self.row.model], self.table
            cost = training_cost(
                steps=table.steps,
                prompts_per_step=table.prompts_per_step,
                group_size=model.rft["model.group_size"] if training == RFT else None,
                parameters=model.parameters,
                prompt_tokens=table.prompt_tokens,
                completion_tokens=table.completion_tokens,
            )
            words: list[str | Later] = ["rft", "fit", *self._files(training), *self._options(position)]
            words += [*self._more(fit=True), "--run_dir", str(folder), "--ckpt_path", Later("begun", folder)]
            needs = (str(self._trained(position - 1)),) if position else ()
            yield str(folder), Step(self._heading(), words, folder, cost, needs)

    def evaluation(self, name: str) -> Iterator[tuple[str, Step]]:
        """An evaluation, after the one that makes its presence map."""
        evaluation, presence_map, needs = self.recipe.evaluations[name], [], self._trained_needs()
        if evaluation.presence_map is not None:
            assert self.recipe.presence is not None
            of_base = evaluation.presence_map == "base"
            presence = self._folder(untrained=of_base) / "evaluation" / "presence"
            yield str(presence), self._evaluate(self.recipe.presence, [], presence, untrained=of_base)
            # Not presence_map.json: that says nothing of what was asked, if no answer was yes.
            presence_map = ["--data.presence_map", str(presence / "predictions.jsonl")]
            needs += (str(presence),)
        folder = self._folder() / "evaluation" / name
        step = self._evaluate(evaluation, presence_map, folder)
        step.needs = needs
        yield str(folder), step

    def _evaluate(
        self, evaluation: Evaluation, presence_map: list[str], folder: Path, *, untrained: bool = False
    ) -> Step:
        trainings = () if untrained else self.row.trainings
        tokens = self.table.answer_tokens if evaluation.answer_tokens is None else evaluation.answer_tokens
        words: list[str | Later] = ["rft", "evaluate", *self._files(trainings[-1] if trainings else None, evaluation)]
        words += self._options(len(trainings) - 1)
        if self.row.model is not None:
            words += ["--model.max_completion_length", str(tokens)]
        if evaluation.query_mode is not None:
            words += ["--data.query_mode", evaluation.query_mode]
        words += [*presence_map, *_flags(evaluation.overrides), *self._more(), "--split", evaluation.split]
        if trainings:
            words += ["--ckpt_path", Later("last", self._trained(len(trainings) - 1))]
        words += ["--output_dir", str(folder)]
        cost = evaluation_cost(
            questions=evaluation.questions_of(self.row.model),
            parameters=self._parameters(),
            prompt_tokens=self.table.prompt_tokens,
            completion_tokens=tokens,
        )
        needs = () if untrained else self._trained_needs()
        return Step(self._heading(), words, folder, cost, needs)

    def _files(self, training: str | None, evaluation: Evaluation | None = None) -> list[str]:
        """The recipe, what an evaluation changes of it, and over both what is trained: they may be of two classes."""
        files = [self.recipe.fit or self.recipe.file] if evaluation is None else [self.recipe.file, *evaluation.files]
        files += self.table.training[training] if training is not None else []
        if self.row.model is None:
            files += self.table.systems[self.row.method].files
        return [word for file in files for word in ("-c", config_file(file))]

    def _more(self, *, fit: bool = False) -> list[str]:
        """The further words of a command."""
        root = self.data_roots.get(f"{self.recipe_name}.fit" if fit and self.recipe.fit else self.recipe_name)
        return [*self.more, *(["--data.root", root] if root is not None else [])]

    def _options(self, position: int) -> list[str | Later]:
        """What tells a run from the others of its recipe; `position` of the training, -1 for none."""
        if self.row.model is None:
            return [*_flags(self.table.systems[self.row.method].overrides)]
        model = self.table.models[self.row.model]
        policy = model.policy if position < 1 else Later("policy", self._trained(position - 1))
        if position < 0:
            return ["--model.policy", policy]
        shots = [] if self.row.shots is None else ["--data.shots", str(self.row.shots)]
        settings = _flags(model.rft) if self.row.trainings[position] == RFT else []
        return [*shots, "--seed_everything", str(self.seed), "--model.policy", policy, *settings]

    def _trained(self, position: int) -> Path:
        """Folder of a training run: the first of two is that of the SFT row."""
        last = position == len(self.row.trainings) - 1
        return self._folder(method=None if last else SFT, table=self.recipe.fit_table)

    def _trained_needs(self) -> tuple[str, ...]:
        return (str(self._trained(len(self.row.trainings) - 1)),) if self.row.trainings else ()

    def _folder(self, *, method: str | None = None, table: str | None = None, untrained: bool = False) -> Path:
        row, folder = self.row, self.root / (table or self.table.name)
        if len(self.table.recipes) > 1:
            folder /= _slug(self.recipe_name)
        folder /= _slug(row.model) if row.model is not None else "systems"
        if untrained:
            return folder / "zero_shot"
        shots = "" if row.shots is None else f"_{row.shots}shot"
        folder /= _slug((method or row.method).replace("-", " ").lower()) + shots
        return folder if self.seed is None else folder / f"seed{self.seed}"

    def _heading(self) -> str:
        return f"{self.row}: {self.recipe_name}" if len(self.table.recipes) > 1 else str(self.row)

    def _parameters(self) -> float | None:
        if self.row.model is None:
            return self.table.systems[self.row.method].parameters
        return self.table.models[self.row.model].parameters


def config_file(name: str) -> str:
    """The path of a file: ``configs/NAME`` where that exists, else that of the package, or a user's own.

    Raises:
        ConfigConflictError: there is none.
    """
    for path in (Path("configs", name), configs_root() / name, Path(name)):
        if path.is_file():
            return str(path)
    raise ConfigConflictError(
        f"There is no configuration file {name}; it was looked for in configs/, in {configs_root()} and as it is "
        "written. Name files in the definition of a table as they lie below configs/."
    )


def _flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(_text, value))}]" if isinstance(value, list) else str(value)


def _slug(name: str) -> str:
    """A name as a folder."""
    return re.sub(r"[^\w.-]+", "_", name)


__all__ = ["Choice", "Later", "Plan", "Step", "config_file"]
