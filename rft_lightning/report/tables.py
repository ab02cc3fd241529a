"""`rft table`: the runs that fill a published table, what was measured beside what is published, and two figures."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rft_lightning.errors import ConfigConflictError
from rft_lightning.placing import write_whole
from rft_lightning.report.table_cost import PEAK_FLOPS, UTILISATION
from rft_lightning.report.table_files import is_table, load_table
from rft_lightning.report.table_plan import Choice, Plan
from rft_lightning.report.table_report import csv_text, markdown
from rft_lightning.report.table_runs import find_runs, match_runs
from rft_lightning.report.table_script import script

# Options of each form of the command with what they are when not given; those of another form are refused.
_PLAN = {
    "runs": "runs/paper", "models": None, "methods": None, "shots": None, "evaluations": None, "seeds": None,
    "options": "", "root": None, "peak_flops": PEAK_FLOPS, "utilisation": UTILISATION,
}  # fmt: skip
_REPORT = {"csv": None}
_FIGURE = {"samples": 4}


def run_table(words: Sequence[str]) -> None:
    """Parse the command line after `table` and do what it says.

    Raises:
        RFTError: an argument, a definition or an evaluation cannot be used.
    """
    # Options may stand between the words.
    given = table_parser().parse_intermixed_args(list(words))
    if given.figure is not None:
        _draw(given)
        return
    if not given.words:
        raise ConfigConflictError(
            "Name a table: its number (rft table 3 --plan), or a file that defines one. `rft table --help` says more."
        )
    table, folders = load_table(given.words[0]), given.words[1:]
    if given.plan:
        if folders:
            raise ConfigConflictError(
                f"--plan takes no evaluations, found {', '.join(folders)}. Leave out one of both."
            )
        _refuse(given, "--plan", {**_REPORT, **_FIGURE})
        _plan(given, table)
        return
    if not folders:
        raise ConfigConflictError(
            f"Name folders of evaluations to report on (rft table {given.words[0]} runs), or give --plan."
        )
    _refuse(given, "a report", {**_PLAN, **_FIGURE})
    matched = match_runs(table, *find_runs(folders))
    _write(given.output, markdown(table, matched), shown=True)
    _write(given.csv, csv_text(table, matched))


def table_parser() -> argparse.ArgumentParser:
    """The arguments of the command. By hand: lists without brackets, and three forms of one command."""
    parser = argparse.ArgumentParser(
        prog="rft table",
        allow_abbrev=False,
        usage="rft table N|FILE --plan [options]\n       rft table N|FILE RUNS... [--output FILE] [--csv FILE]\n"
        "       rft table --figure 4|5 BEFORE AFTER [--samples N] [--output FILE]",
        description="The published tables 2 to 8: the runs that fill one as a shell script (--plan), what was measured "
        "beside what is published (RUNS), and the answers of two evaluations side by side (--figure).",
    )
    parser.add_argument(
        "words", type=str, nargs="*", help="Number or file of a table, and folders in or below which evaluations lie."
    )
    parser.add_argument("--plan", action="store_true", help="Print the runs with their cost, as a shell script.")
    parser.add_argument("--runs", type=str, default=_PLAN["runs"], help="With --plan: folder of all runs.")
    for name, kind in (("models", str), ("methods", str), ("shots", int), ("evaluations", str), ("seeds", int)):
        parser.add_argument(f"--{name}", type=kind, nargs="+", help=f"With --plan: only these {name}.")
    parser.add_argument("--options", type=str, default="", help="With --plan: words to add to every command.")
    parser.add_argument(
        "--root",
        type=str,
        nargs="+",
        action="extend",
        help="With --plan: RECIPE=FOLDER, the --data.root of the commands of one recipe; RECIPE.fit=FOLDER of its "
        "trainings, where those are on other data.",
    )
    parser.add_argument(
        "--peak_flops", type=float, default=PEAK_FLOPS, help="With --plan: operations per second of a device."
    )
    parser.add_argument(
        "--utilisation", type=float, default=UTILISATION, help="With --plan: the share of them that is reached."
    )
    parser.add_argument(
        "--output", type=str, help="File to write to: the script, the report in Markdown, or a picture."
    )
    parser.add_argument("--csv", type=str, help="File to write the report to as CSV.")
    parser.add_argument("--figure", type=int, help="Draw answers as in Figure 4 (classification) or 5 (grounding).")
    parser.add_argument("--samples", type=int, default=_FIGURE["samples"], help="With --figure: how many questions.")
    return parser


def _plan(given: Any, table: Any) -> None:
    if not given.peak_flops > 0 or not 0 < given.utilisation <= 1:
        raise ConfigConflictError(
            f"Expected --peak_flops > 0 and 0 < --utilisation <= 1, found {given.peak_flops} and {given.utilisation}."
        )
    choice = Choice(**{name: getattr(given, name) for name in ("models", "methods", "shots", "evaluations", "seeds")})
    try:
        more = shlex.split(given.options)
    except ValueError as error:
        raise ConfigConflictError(
            f"--options: expected words as in a shell, found {given.options!r} ({error}). Close the quote."
        ) from error
    plan = Plan(table, Path(given.runs), choice, more, _roots(given.root or []))
    _write(given.output, script(plan, peak_flops=given.peak_flops, utilisation=given.utilisation), shown=True)


def _roots(words: Sequence[str]) -> dict[str, str]:
    """Recipe -> folder."""
    roots: dict[str, str] = {}
    for word in words:
        recipe, _, folder = word.partition("=")
        if not recipe or not folder:
            raise ConfigConflictError(f"--root: expected RECIPE=FOLDER, found {word!r}.")
        if recipe in roots:
            raise ConfigConflictError(f"--root: found {roots[recipe]} and {folder} for {recipe}; leave one out.")
        roots[recipe] = folder
    return roots


def _draw(given: Any) -> None:
    from rft_lightning.report.answer_figure import answer_figure

    _refuse(given, "--figure", {**_PLAN, **_REPORT, "plan": False})
    if tables := [word for word in given.words if is_table(word) and not Path(word).is_dir()]:
        raise ConfigConflictError(
            f"--figure takes no table number, found {tables[0]}; it draws the answers of two folders of evaluations: "
            f"rft table --figure {given.figure} BEFORE AFTER."
        )
    if len(given.words) != 2:
        raise ConfigConflictError(
            f"--figure takes two folders of evaluations, before and after; found {' '.join(given.words) or 'none'}."
        )
    file = Path(given.output or f"figure{given.figure}.png")
    if file.suffix.lower() != ".png":
        raise ConfigConflictError(f"--output: a figure is written as PNG, found {file}. Name a file that ends in .png.")
    picture = answer_figure(given.figure, *given.words, samples=given.samples)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, format="PNG")
    except OSError as error:
        raise ConfigConflictError(f"{file} cannot be written ({error}). Name another file with --output.") from error
    print(f"The answers side by side are in {file}")


def _refuse(given: Any, form: str, others: dict[str, Any]) -> None:
    """Options that change nothing are a mistake."""
    if wrong := [f"--{name}" for name, default in others.items() if getattr(given, name) != default]:
        raise ConfigConflictError(f"{', '.join(wrong)} changes nothing of {form}; leave it out.")


def _write(file: str | None, text: str, *, shown: bool = False) -> None:
    if shown:
        sys.stdout.write(text)
    if file is None:
        return
    try:
        write_whole(Path(file), text)
    except (OSError, ValueError) as error:  # ValueError: "." and "/" have no name
        raise ConfigConflictError(f"{file} cannot be written ({error}). Name another file.") from error


__all__ = ["run_table", "table_parser"]
