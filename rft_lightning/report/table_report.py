"""Published numbers beside measured ones: the cells of a table, and the same cells as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from statistics import mean, stdev
from typing import Any

from rft_lightning.report.table_definition import Stage, TableDefinition, TableRow
from rft_lightning.report.table_runs import SETTINGS, Line, Matched, worded

DASH = "-"
_ASKED = ("query_mode", "presence_map")


@dataclass(frozen=True)
class Cell:
    """A published number and what was measured for it; percents.

    Attributes:
        table: name of the table.
        model: name of the model; empty for comparison systems.
        method: name of the method that is measured.
        shots: None where it is no few-shot row.
        column: name of the column.
        asked: which categories were asked for: ``all``, ``gt``, ``map (base)``, ``map (tuned)``; empty where there is
            no choice, or no run.
        differs: settings that differ from those of the published runs.
        published_as: how the publication calls the method: its own name but for what stands in for it.
        published: the published number.
        flag: what is odd about it.
        seeds: runs behind the measured number.
        mean: over these.
        std: sample standard deviation over these; None for fewer than two.
        difference: mean less published.
        parse_failures: share of answers that could not be read, over all columns of the row.
    """

    table: str
    model: str
    method: str
    shots: int | None
    column: str
    asked: str
    differs: str
    published_as: str
    published: float | None
    flag: str
    seeds: int
    mean: float | None
    std: float | None
    difference: float | None
    parse_failures: float | None


def table_cells(table: TableDefinition, matched: Matched) -> list[list[Cell]]:
    """The lines of the report, each a cell per column: per row and settings; one without runs for a row without."""
    return [
        [_cell(table, row, line, column) for column in table.columns]
        for number, row in enumerate(table.rows)
        for line in matched.lines.get(number, [None])
    ]


def markdown(table: TableDefinition, matched: Matched) -> str:
    """The report in Markdown."""
    notes: dict[str, int] = {}
    columns = ["model", "method", "shots", "", "seeds", *table.columns, "parse failures"]
    lines = [
        f"# {table.title}",
        "",
        _explanation(table),
        "",
        _row(columns),
        _row(["---"] * 4 + ["---:"] * (len(columns) - 4)),
    ]
    before: tuple[Any, ...] = ()
    for cells in table_cells(table, matched):
        first = cells[0]
        row = (first.model, first.method, first.shots)
        published = any(cell.published is not None for cell in cells)
        method = first.published_as if published else first.method
        heading = [first.model, method, "" if first.shots is None else str(first.shots)]
        if published and row != before:
            numbers = [_published(cell, notes) for cell in cells]
            lines.append(_row([*heading, "published", "", *numbers, ""]))
            heading = ["", "", ""]
        lines.append(_row([*(heading if row != before else [""] * 3), *_measured(cells)]))
        if published and any(cell.difference is not None for cell in cells):
            differences = [_signed(cell.difference) for cell in cells]
            lines.append(_row(["", "", "", "difference", "", *differences, ""]))
        before = row
    lines += ["", *(f"[{number}] {text}.\n" for text, number in notes.items())]
    lines += [f"{' '.join(note.split())}\n" for note in table.notes]
    if matched.left:
        title = "Evaluations that belong to no row, are there twice or cannot be read:"
        lines += [title, "", *(f"- {folder}: {why}" for folder, why in matched.left)]
    return "\n".join(lines).rstrip() + "\n"


def csv_text(table: TableDefinition, matched: Matched) -> str:
    """The cells as CSV, one a line, numbers to four decimals."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [part.name for part in fields(Cell)], lineterminator="\n")
    writer.writeheader()
    for cell in _flat(table, matched):
        writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in cell.items()})
    return out.getvalue()


def _flat(table: TableDefinition, matched: Matched) -> Iterator[dict[str, Any]]:
    for cells in table_cells(table, matched):
        yield from map(asdict, cells)


def _cell(table: TableDefinition, row: TableRow, line: Line | None, column: str) -> Cell:
    published = table.published(row)[column]
    values = list(line.values(table, column).values()) if line is not None else []
    measured = mean(values) if values else None
    return Cell(
        table=table.name,
        model=row.model or "",
        method=row.method,
        shots=row.shots,
        column=column,
        asked=_asked(line) if line is not None else "",
        differs=_differs(table, row, line) if line is not None else "",
        published_as=row.label or row.method,
        published=None if published is None else float(published),
        flag=table.flags(row).get(column, ""),
        seeds=len(values),
        mean=measured,
        std=stdev(values) if len(values) > 1 else None,
        difference=None if measured is None or published is None else measured - published,
        parse_failures=line.failure_share if line is not None else None,
    )


def _facts(line: Line) -> dict[str, Any]:
    return dict(zip(SETTINGS, line.settings, strict=True))


def _asked(line: Line) -> str:
    facts = _facts(line)
    mode = facts["query_mode"]
    return f"map ({facts['presence_map']})" if mode == "map" else mode or ""


def _differs(table: TableDefinition, row: TableRow, line: Line) -> str:
    """Settings other than the published or planned ones; which categories are asked for is said apart."""
    usual = {**SETTINGS, **table.usual(row)}
    words = [
        f"{name} {worded(value)}" + (f", not {worded(usual[name])}" if usual[name] not in (None, ()) else "")
        for name, value in _facts(line).items()
        if name not in _ASKED and not _is_usual(value, usual[name])
    ]
    return "; ".join([*words, *([line.training] if line.training else [])])


def _is_usual(value: Any, usual: Any) -> bool:
    """Whether a setting is as expected; what is not known is not compared."""
    if isinstance(value, tuple):
        return len(value) == len(usual) and all(map(Stage.fits, value, usual))
    return value in (None, usual)


def _measured(cells: list[Cell]) -> list[str]:
    """What is measured, how many seeds are behind it, the numbers, and the failures."""
    first, counts = cells[0], sorted({cell.seeds for cell in cells if cell.seeds})
    what = "measured" if first.method == first.published_as else f"measured by {first.method}"
    what += f", {first.asked}" if first.asked else ""
    seeds = "0" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    failures = DASH if first.parse_failures is None else f"{first.parse_failures:.1f}"
    numbers = [_spread(cell) for cell in cells]
    return [what + (f" [differs: {first.differs}]" if first.differs else ""), seeds, *numbers, failures]


def _spread(cell: Cell) -> str:
    if cell.mean is None:
        return DASH
    return f"{cell.mean:.1f}" + ("" if cell.std is None else f" ± {cell.std:.1f}")


def _published(cell: Cell, notes: dict[str, int]) -> str:
    """A published number with the number of its note."""
    text = DASH if cell.published is None else f"{cell.published:.1f}"
    if not cell.flag:
        return text
    where = ", ".join(str(word) for word in (cell.model, cell.published_as) if word)
    where += "" if cell.shots is None else f", {cell.shots} shots"
    number = notes.setdefault(f"{where}, {cell.column}: {cell.flag}", len(notes) + 1)
    return f"{text} [{number}]"


def _signed(number: float | None) -> str:
    return DASH if number is None else f"{number:+.1f}"


def _row(words: list[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def _explanation(table: TableDefinition) -> str:
    text = "Percents. Measured: mean and sample standard deviation over the seeds of the training."
    if all(row.published is None for row in table.rows):
        return text
    text = f"Published: {table.source}. {text} Difference: measured less published."
    if table.settings.get("query_mode") is not None:
        asked = table.settings["query_mode"]
        asked = f"map ({table.settings.get('presence_map')})" if asked == "map" else asked
        text += f" The published protocol is {asked}."
    return text


__all__ = ["Cell", "csv_text", "markdown", "table_cells"]
