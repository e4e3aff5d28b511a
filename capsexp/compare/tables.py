"""Write tables of runs: for a terminal, and as CSV, Markdown and JSON."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from capsexp.compare.columns import EPOCHS, ERROR, PAPER, RUN, STATUS, TOTAL, Column, as_override
from capsexp.compare.comparison import Comparison, compare
from capsexp.compare.intervals import Interval
from capsexp.compare.layout import print_table, single_line, write_stdout
from capsexp.compare.means import Row, Spread
from capsexp.compare.runs import Run, newest_first, read_below
from capsexp.compare.unfinished import unfinished_lines
from capsexp.errors import Notes, is_number
from capsexp.text import printable
from capsexp.training.progress import clock

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")  # noqa: RUF001
_MARKDOWN = re.compile(r"[\\|`*<]|\](?=\()")
MAX_SETTINGS = 40
"""Columns of settings in tables for people; CSV and JSON have all."""
INTERVALS = (
    "[95 %]: bootstrap over the groups of test images, such as toys; gaps are at equal images, or at equal "
    "trainer.max_seconds"
)
COUNTS = ("parameters", "multiplications")
ABSENT = "–"  # noqa: RUF001


def as_csv(paths: Iterable[Path], notes: Notes) -> str:
    """Compare all runs at or below some directories; return the table as CSV."""
    return csv_text(compare(read_below(paths, notes), notes))


def csv_text(comparison: Comparison) -> str:
    """Return the table as CSV: full names, metrics in full precision, missing values empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_csv_cell, _field_names(comparison)))
    writer.writerows(_csv_row(row, comparison) for row in comparison.rows)
    return file.getvalue()


def markdown(comparison: Comparison) -> str:
    """Return the table for people as Markdown: short names, rounded metrics."""
    titles, rows = _display_table(comparison)
    escaped = [[_MARKDOWN.sub(r"\\\g<0>", cell) for cell in line] for line in (titles, *rows)]
    lines = [escaped[0], ["---"] * len(titles), *escaped[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def json_text(comparison: Comparison) -> str:
    """Return a JSON list of objects. A missing or non-finite metric is null; a missing setting has no key."""
    settings = {column.name for column in comparison.columns if not column.is_metric}
    nulls = {name: None for name in _field_names(comparison) if name not in settings}
    records = [nulls | _record(row, comparison) for row in comparison.rows]
    finite = [{name: _finite(value) for name, value in record.items()} for record in records]
    content = json.dumps(finite, indent=1, ensure_ascii=False, default=str)
    return "".join(f"{_with_escapes(line)}\n" for line in content.split("\n"))


def _with_escapes(line: str) -> str:
    """Return a line of JSON in which what a terminal obeys is escaped."""
    if line.isprintable():
        return line
    return "".join(json.dumps(letter)[1:-1] if printable(letter) != letter else letter for letter in line)


def print_comparison(comparison: Comparison) -> None:
    """Print the table for people, and the folder that contains all its runs."""
    if not comparison.rows:
        return
    columns, (titles, rows) = shown_columns(comparison), _display_table(comparison)
    arrows = [
        (" ↓" if comparison.descending else " ↑") if column == comparison.order else "" for column in columns
    ]
    print_table(
        [title + arrow for title, arrow in zip(titles, arrows, strict=True)],
        rows,
        right=[is_numeric(column, comparison) for column in columns],
        status=columns.index(STATUS),
    )
    folder = printable(common_folder(run.path for row in comparison.rows for run in row.runs))
    count = sum(len(row.runs) for row in comparison.rows)
    means = f"; mean ± sample sd over {', '.join(comparison.grouped_by)}" if comparison.grouped_by else ""
    hidden = len(comparison.columns) - len(columns) - bool(comparison.grouped_by)
    more = f"; --csv shows {hidden} more settings that differ" * (hidden > 0)
    write_stdout(f"{count} run{'s' * (count != 1)} in {folder}{printable(means)}{more}\n")
    if any(column.is_interval for column in columns):
        write_stdout(f"{INTERVALS}\n")
    for line in unfinished_lines(run for row in comparison.rows for run in row.runs):
        write_stdout(f"{single_line(line)}\n")


def print_runs(found: Sequence[Run]) -> None:
    """Print one line for each run, newest first; below a failed run, its error."""
    ordered = newest_first(found)
    titles = ("status", "age", "model", "dataset", "step", "validation", "test", "run")
    rows = []
    for run in ordered:
        metrics = [None if value is None else f"{value:.4f}" for value in (run.best, run.test)]
        choices = [run.choices.get("model"), run.choices.get("dataset")]
        cells = [run.status, age(run), *choices, _progress(run), *metrics, str(run.path)]
        rows.append([single_line(cell or ABSENT) for cell in cells])
    right = [title in ("age", "step", "validation", "test") for title in titles]
    if rows:
        print_table(titles, rows, right=right, status=0, below=[_first_line(run.error) for run in ordered])


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
    if column.name in ("steps", TOTAL.name, "images_per_second"):
        return f"{value:.0f}"
    if column.name == "parameters":
        return f"{value:,.0f}"
    if column.name == "multiplications":
        return f"{value / 1e6:.3g}M"
    if column.name == "peak_memory":
        return f"{value / 2**20:.0f} MiB"
    if column.is_interval:
        return f"{value:.2f}"
    if column == ERROR:
        return f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    if column == PAPER:
        return f"{value:g}"  # as printed in the paper
    is_share = column.name.endswith("accuracy") or column.name.startswith("validation/fold")
    return f"{value:.4f}" if is_share else f"{value:.4g}"


def cell_text(row: Row, column: Column, folder: Path) -> str:
    """Return a cell for people. The path of a run is relative to a folder."""
    if column.name not in row.cells:
        return ABSENT
    value: Any = row.cells[column.name]
    if column == RUN:
        return single_line(os.path.relpath(value, folder))
    if isinstance(value, Interval):
        return _interval_text(value, column)
    if isinstance(value, Spread) and column.name in COUNTS and not value.sd:
        return format_metric(value.mean, column)
    if isinstance(value, Spread):
        sd = "" if value.sd is None else f" ± {format_metric(value.sd, column)}"
        n = "" if value.n is None else f" ({value.n})"
        return f"{format_metric(value.mean, column)}{sd}{n}"
    return format_metric(value, column) if column.is_metric else single_line(as_override(value))


def _interval_text(value: Interval, column: Column) -> str:
    mean = format_metric(value.mean, column)
    if value.low is None or value.high is None:
        return mean
    return f"{mean} [{format_metric(value.low, column)}, {format_metric(value.high, column)}]"


def age(run: Run) -> str | None:
    """Return how long ago a run started."""
    if run.started is None:
        return None
    seconds = max(time.time() - run.started, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def shown_columns(comparison: Comparison) -> list[Column]:
    """Return the columns for people: the first settings, and no run directories if rows are means."""
    settings = [column for column in comparison.columns if column.is_setting]
    hidden = {*settings[MAX_SETTINGS:]} - {comparison.order} | {*([RUN] if comparison.grouped_by else [])}
    return [column for column in comparison.columns if column not in hidden]


def _display_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return short titles, and rows of rounded metrics and of run directories relative to their folder."""
    columns = shown_columns(comparison)
    without_n = (PAPER.name, *COUNTS)
    means = [
        bool(comparison.grouped_by)
        and column.is_metric
        and not column.is_interval
        and column.name not in without_n
        for column in columns
    ]
    titles = [single_line(column.title) + " (n)" * mean for column, mean in zip(columns, means, strict=True)]
    folder = common_folder(run.path for row in comparison.rows for run in row.runs)
    return titles, [[cell_text(row, column, folder) for column in columns] for row in comparison.rows]


def _field_names(comparison: Comparison) -> list[str]:
    """Return the fields of CSV and JSON: three for a mean or interval, two for a paper's error, else one."""
    names: list[str] = []
    for column in comparison.columns:
        suffixes = ["mean", "sd", "n"] if comparison.grouped_by else []
        suffixes = ["mean", "sd"] if column == PAPER else suffixes
        suffixes = ["mean", "low", "high"] if column.is_interval else suffixes
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
        if isinstance(value, Spread | Interval):
            fields = dataclasses.asdict(value)
            record |= {f"{column.name}.{name}": field for name, field in fields.items() if field is not None}
        elif column.name in row.cells:
            record[column.name] = value
    return record


def _csv_row(row: Row, comparison: Comparison) -> list[str]:
    """Return the fields of a row in full precision; empty where a value is missing."""
    record = _record(row, comparison)
    if comparison.grouped_by:
        record[RUN.name] = " ".join(record[RUN.name])
    names = _field_names(comparison)
    return [_csv_cell(as_override(record[name])) if name in record else "" for name in names]


def _csv_cell(content: str) -> str:
    """Return a text that no spreadsheet takes for a formula: names come from anywhere."""
    try:
        float(content)
    except ValueError:
        return "'" * content.lstrip().startswith(_FORMULA) + printable(content)
    return content


def _first_line(content: str) -> str:
    return single_line(content.strip().partition("\n")[0])


def _progress(run: Run) -> str:
    step, total = (ABSENT if count is None else str(count) for count in (run.step, run.total))
    return f"{step}/{total}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
