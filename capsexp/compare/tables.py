"""Write tables of runs: for a terminal, and as CSV, Markdown and JSON."""

import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.text import Text

from capsexp.compare import runs
from capsexp.compare.columns import EPOCHS, ERROR, PAPER, RUN, STATUS, TOTAL, Column, as_override
from capsexp.compare.comparison import Comparison, compare
from capsexp.compare.means import Row, Spread
from capsexp.compare.runs import Run, newest_first
from capsexp.errors import Notes, is_number
from capsexp.terminal import Table, new_console
from capsexp.training.progress import clock

ABSENT = "–"  # noqa: RUF001
MAX_WIDTH = 100_000
STATUS_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "died": "red",
    "interrupted": "yellow",
    "unknown": "yellow",
}


def as_csv(paths: Iterable[Path], notes: Notes) -> str:
    """Compare all runs at or below some directories; return the table as CSV."""
    return csv_text(compare(runs.read_all(runs.find_all(paths, notes), notes), notes))


def csv_text(comparison: Comparison) -> str:
    """Return the table as CSV: full names, metrics in full precision, missing values empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_field_names(comparison))
    writer.writerows(_csv_row(row, comparison) for row in comparison.rows)
    return file.getvalue()


def markdown(comparison: Comparison) -> str:
    """Return the table for people as Markdown: short names, rounded metrics."""
    titles, rows = _display_table(comparison)
    lines = [titles, ["---"] * len(titles), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def json_text(comparison: Comparison) -> str:
    """Return a JSON list of objects. A missing or non-finite metric is null; a missing setting has no key."""
    settings = {column.name for column in comparison.columns if not column.is_metric}
    nulls = {name: None for name in _field_names(comparison) if name not in settings}
    records = [nulls | _record(row, comparison) for row in comparison.rows]
    finite = [{name: _finite(value) for name, value in record.items()} for record in records]
    return json.dumps(finite, indent=1, ensure_ascii=False, default=str) + "\n"


def print_comparison(comparison: Comparison) -> None:
    """Print the table for people, and the folder that contains all its runs."""
    if not comparison.rows:
        return
    columns, (titles, rows) = _display_columns(comparison), _display_table(comparison)
    table = _new_table()
    for column, title in zip(columns, titles, strict=True):
        arrow = (" ↓" if comparison.descending else " ↑") if column == comparison.order else ""
        table.add_column(title + arrow, justify="right" if is_numeric(column, comparison) else "left")
    for row in rows:
        table.add_row(*map(_styled_cell, row, columns))
    print_table(table)
    folder = common_folder(run.path for row in comparison.rows for run in row.runs)
    count = sum(len(row.runs) for row in comparison.rows)
    means = f"; mean ± sample sd over {', '.join(comparison.grouped_by)}" if comparison.grouped_by else ""
    write_stdout(f"{count} run{'s' * (count != 1)} in {folder}{means}\n")


def print_runs(found: Sequence[Run]) -> None:
    """Print one line for each run, newest first; below a failed run, its error."""
    ordered = newest_first(found)
    table = _new_table()
    for title in ("status", "age", "model", "dataset", "step", "validation", "test", "run"):
        table.add_column(title, justify="right" if title in ("age", "step", "validation", "test") else "left")
    for run in ordered:
        metrics = [None if value is None else f"{value:.4f}" for value in (run.best, run.test)]
        choices = [run.choices.get("model"), run.choices.get("dataset")]
        cells = [age(run), *choices, _progress(run), *metrics, str(run.path)]
        status = Text(run.status, STATUS_COLOURS.get(run.status, ""))
        table.add_row(status, *(Text(printable_line(cell or ABSENT)) for cell in cells))
    if ordered:
        print_table(table, below=[printable_line(run.error) for run in ordered])


def print_table(table: Table, *, below: Sequence[str] = ()) -> None:
    """Print a table, each row on one line however long.

    Args:
        table: a table whose cells are single lines.
        below: a remark to print below each row; empty for none.
    """
    # rich ignores the width unless the height is set too, on terminals with few features.
    console = new_console(width=MAX_WIDTH, height=100)
    with console.capture() as captured:
        console.print(table)
    head, rule, *rows = (line.rstrip() for line in captured.get().splitlines() if line.strip())
    write_stdout(f"{head}\n{rule}\n")
    for row, remark in zip(rows, below or [""] * len(rows), strict=True):
        write_stdout(f"{row}\n" + f"    {remark}\n" * bool(remark))


def write_stdout(content: str) -> None:
    """Write to stdout and flush, so that a closed pipe raises here and not at exit."""
    sys.stdout.write(content)
    sys.stdout.flush()


def common_folder(paths: Iterable[Path]) -> Path:
    """Return the folder that contains all of these directories."""
    parents = [path.parent for path in paths]
    try:
        return Path(os.path.commonpath(parents))
    except ValueError:  # a mix of absolute and relative paths
        return Path()


def is_numeric(column: Column, comparison: Comparison) -> bool:
    """Return whether a column holds numbers, which are aligned right."""
    return column.is_metric or any(is_number(row.cells.get(column.name)) for row in comparison.rows)


def format_metric(value: int | float, column: Column) -> str:
    """Round a metric for people."""
    if not math.isfinite(value):
        return str(value)
    if column.name == "seconds":
        return clock(value)
    if column == EPOCHS:
        return f"{round(value, 2):g}"
    if column.name in ("steps", TOTAL.name):
        return f"{value:.0f}"
    if column == ERROR:
        return f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    if column == PAPER:
        return f"{value:g}"  # as printed in the paper
    return f"{value:.4f}" if column.name.endswith("accuracy") else f"{value:.4g}"


def cell_text(row: Row, column: Column, folder: Path) -> str:
    """Return a cell for people. The path of a run is relative to a folder."""
    if column.name not in row.cells:
        return ABSENT
    value: Any = row.cells[column.name]
    if column == RUN:
        return printable_line(os.path.relpath(value, folder))
    if isinstance(value, Spread):
        sd = "" if value.sd is None else f" ± {format_metric(value.sd, column)}"
        n = "" if value.n is None else f" ({value.n})"
        return f"{format_metric(value.mean, column)}{sd}{n}"
    return format_metric(value, column) if column.is_metric else printable_line(as_override(value))


def age(run: Run) -> str | None:
    """Return how long ago a run started."""
    if run.started is None:
        return None
    seconds = max(time.time() - run.started, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def printable_line(string: str) -> str:
    """Return the first line of a string, with control characters replaced by spaces."""
    first = next(iter(string.strip().splitlines()), "")
    return "".join(letter if letter.isprintable() else " " for letter in first)


def _new_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def _styled_cell(content: str, column: Column) -> Text:
    return Text(content, STATUS_COLOURS.get(content, "") if column == STATUS else "")


def _display_columns(comparison: Comparison) -> list[Column]:
    """Return the columns for people: all, but without run directories if rows are means."""
    return [column for column in comparison.columns if column != RUN or not comparison.grouped_by]


def _display_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return short titles, and rows of rounded metrics and of run directories relative to their folder."""
    columns = _display_columns(comparison)
    means = [column.is_metric and column != PAPER and bool(comparison.grouped_by) for column in columns]
    titles = [column.title + " (n)" * is_mean for column, is_mean in zip(columns, means, strict=True)]
    folder = common_folder(run.path for row in comparison.rows for run in row.runs)
    return titles, [[cell_text(row, column, folder) for column in columns] for row in comparison.rows]


def _field_names(comparison: Comparison) -> list[str]:
    """Return the fields of CSV and JSON: three for a mean, two for a paper's error, else one for a column."""
    names: list[str] = []
    for column in comparison.columns:
        suffixes = ["mean", "sd", "n"] if comparison.grouped_by else []
        suffixes = ["mean", "sd"] if column == PAPER else suffixes
        if column.is_metric and suffixes:
            names += [f"{column.name}.{suffix}" for suffix in suffixes]
        else:
            names.append(column.name)
    return names


def _record(row: Row, comparison: Comparison) -> dict[str, Any]:
    """Return the fields that a row has."""
    record: dict[str, Any] = {}
    for column in comparison.columns:
        value = row.cells.get(column.name)
        if isinstance(value, Spread):
            fields = {"mean": value.mean, "sd": value.sd, "n": value.n}
            record |= {f"{column.name}.{name}": field for name, field in fields.items() if field is not None}
        elif column.name in row.cells:
            record[column.name] = value
    return record


def _csv_row(row: Row, comparison: Comparison) -> list[str]:
    """Return the fields of a row in full precision; empty where a value is missing."""
    record = _record(row, comparison)
    if comparison.grouped_by:
        record[RUN.name] = " ".join(record[RUN.name])
    return [as_override(record[name]) if name in record else "" for name in _field_names(comparison)]


def _progress(run: Run) -> str:
    step, total = (ABSENT if count is None else str(count) for count in (run.step, run.total))
    return f"{step}/{total}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
