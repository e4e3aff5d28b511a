"""Tables of runs: for a terminal, and as CSV, Markdown and JSON."""

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
from rich.console import Console
from rich.table import Table
from rich.text import Text

from capsexp.compare import runs
from capsexp.compare.columns import EPOCHS, ERROR, PAPER, RUN, STATUS, TOTAL, Column, text
from capsexp.compare.comparison import Comparison, Row, Spread, compare
from capsexp.compare.runs import Run, is_number, newest_first
from capsexp.errors import Notes
from capsexp.training.progress import clock

ABSENT = "–"  # noqa: RUF001
WIDEST = 100_000
COLOURS = {"running": "cyan", "failed": "red", "died": "red", "interrupted": "yellow", "unknown": "yellow"}


def as_csv(paths: Iterable[Path], notes: Notes) -> str:
    """The comparison of all runs at or below some directories, as CSV, figures in full precision."""
    return csv_text(compare(runs.read_all(runs.find_all(paths, notes), notes), notes))


def csv_text(comparison: Comparison) -> str:
    """A line for each row, settings and figures under their full names; what a run lacks is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([name for name, _ in _fields(comparison)])
    writer.writerows(_words(row, comparison) for row in comparison.rows)
    return file.getvalue()


def markdown(comparison: Comparison) -> str:
    """The table for people, to be pasted into a README."""
    titles, rows = _for_people(comparison)
    lines = [titles, ["---"] * len(titles), *rows]
    escaped = [[word.replace("|", "\\|") for word in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def json_text(comparison: Comparison) -> str:
    """A list of objects. A figure that is not there or not finite is null; a setting is then left out."""
    settings = {column.name for column in comparison.columns if not column.is_figure}
    absent = {name: None for name, _ in _fields(comparison) if name not in settings}
    records = [absent | _record(row, comparison) for row in comparison.rows]
    finite = [{name: _finite(value) for name, value in record.items()} for record in records]
    return json.dumps(finite, indent=1, ensure_ascii=False, default=str) + "\n"


def print_comparison(comparison: Comparison) -> None:
    """The table for people, and the folder that all its runs share."""
    if not comparison.rows:
        return
    columns, (titles, rows) = _columns_for_people(comparison), _for_people(comparison)
    table = _new_table()
    for column, title in zip(columns, titles, strict=True):
        mark = (" ↓" if comparison.descending else " ↑") if column == comparison.order else ""
        right = column.is_figure or any(is_number(row.cells.get(column.name)) for row in comparison.rows)
        table.add_column(title + mark, justify="right" if right else "left")
    for words in rows:
        styles = [
            COLOURS.get(word, "") if column == STATUS else ""
            for word, column in zip(words, columns, strict=True)
        ]
        table.add_row(*map(Text, words, styles))
    show(table)
    shared = shared_folder(run.path for row in comparison.rows for run in row.runs)
    count = sum(len(row.runs) for row in comparison.rows)
    means = f"; mean ± sample sd over {', '.join(comparison.grouped_by)}" if comparison.grouped_by else ""
    put(f"{count} run{'s' * (count != 1)} in {shared}{means}\n")


def print_runs(found: Sequence[Run]) -> None:
    """One line for each run, the newest first; below one that failed, why."""
    ordered = newest_first(found)
    table = _new_table()
    for title in ("status", "age", "model", "dataset", "step", "validation", "test", "run"):
        table.add_column(title, justify="right" if title in ("age", "step", "validation", "test") else "left")
    for run in ordered:
        words = (age(run), run.choices.get("model"), run.choices.get("dataset"), _progress(run))
        figures = (None if value is None else f"{value:.4f}" for value in (run.best, run.test))
        shown = [Text(one_line(word or ABSENT)) for word in (*words, *figures, str(run.path))]
        table.add_row(Text(run.status, COLOURS.get(run.status, "")), *shown)
    if ordered:
        show(table, below=[one_line(run.error) for run in ordered])


def show(table: Table, *, below: Sequence[str] = ()) -> None:
    """Print a table, a line for each row however long, so that no word is broken.

    Args:
        table: with rows of one line each.
        below: a remark for each row; empty for none.
    """
    # The height too: without it a terminal that can do little is taken to be 80 wide whatever is asked for.
    console = Console(width=WIDEST, height=100, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    head, rule, *rows = (line.rstrip() for line in captured.get().splitlines() if line.strip())
    put(f"{head}\n{rule}\n")
    for row, remark in zip(rows, below or [""] * len(rows), strict=True):
        put(f"{row}\n" + f"    {remark}\n" * bool(remark))


def _new_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def put(words: str) -> None:
    """Write to stdout, now: a reader that has gone away is noticed here and not when Python ends."""
    sys.stdout.write(words)
    sys.stdout.flush()


def shared_folder(paths: Iterable[Path]) -> Path:
    """The folder that holds all of these directories."""
    parents = [path.parent for path in paths]
    try:
        return Path(os.path.commonpath(parents))
    except ValueError:  # absolute and relative ones
        return Path()


def figure(value: int | float, column: Column) -> str:
    """A figure for people."""
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
        return f"{value:g}"  # as it is printed there
    return f"{value:.4f}" if column.name.endswith("accuracy") else f"{value:.4g}"


def cell_text(row: Row, column: Column, shared: Path) -> str:
    """A cell for people; a directory is told from the one that all share."""
    if column.name not in row.cells:
        return ABSENT
    value: Any = row.cells[column.name]
    if column == RUN:
        return one_line(os.path.relpath(value, shared))
    if isinstance(value, Spread):
        sd = "" if value.sd is None else f" ± {figure(value.sd, column)}"
        n = "" if value.n is None else f" ({value.n})"
        return f"{figure(value.mean, column)}{sd}{n}"
    return figure(value, column) if column.is_figure else one_line(text(value))


def age(run: Run) -> str | None:
    """How long ago a run was started."""
    if run.started is None:
        return None
    seconds = max(time.time() - run.started, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def one_line(words: str) -> str:
    """The first line of a text, without what would move a terminal's cursor or change its colours."""
    first = next(iter(words.strip().splitlines()), "")
    return "".join(letter if letter.isprintable() else " " for letter in first)


def _columns_for_people(comparison: Comparison) -> list[Column]:
    """All but the directories of runs that a row is a mean over."""
    return [column for column in comparison.columns if column != RUN or not comparison.grouped_by]


def _for_people(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Short names, and rows of rounded figures and of directories below the one that all share."""
    columns = _columns_for_people(comparison)
    means = [column.is_figure and column != PAPER and bool(comparison.grouped_by) for column in columns]
    titles = [column.title + " (n)" * is_mean for column, is_mean in zip(columns, means, strict=True)]
    shared = shared_folder(run.path for row in comparison.rows for run in row.runs)
    return titles, [[cell_text(row, column, shared) for column in columns] for row in comparison.rows]


def _fields(comparison: Comparison) -> list[tuple[str, str]]:
    """Full and short name of each field of machine-readable forms; three for a mean, two for a paper's."""
    found = []
    for column in comparison.columns:
        parts = ["mean", "sd", "n"] if comparison.grouped_by else []
        parts = ["mean", "sd"] if column == PAPER else parts
        if column.is_figure and parts:
            found += [(f"{column.name}.{part}", f"{column.title} {part}") for part in parts]
        else:
            found.append((column.name, column.title))
    return found


def _record(row: Row, comparison: Comparison) -> dict[str, Any]:
    """The fields that a row has."""
    record: dict[str, Any] = {}
    for column in comparison.columns:
        value = row.cells.get(column.name)
        if isinstance(value, Spread):
            record |= {f"{column.name}.{part}": one for part, one in vars(value).items() if one is not None}
        elif column.name in row.cells:
            record[column.name] = value
    return record


def _words(row: Row, comparison: Comparison) -> list[str]:
    """The fields of a row in full precision; empty where there is nothing."""
    record = _record(row, comparison)
    if comparison.grouped_by:
        record[RUN.name] = " ".join(record[RUN.name])
    return [text(record[name]) if name in record else "" for name, _ in _fields(comparison)]


def _progress(run: Run) -> str:
    step, total = (ABSENT if count is None else str(count) for count in (run.step, run.total))
    return f"{step}/{total}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
