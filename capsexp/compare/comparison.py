"""Runs side by side: rows, means over seeds, order."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsexp.compare import history
from capsexp.compare.columns import (
    EPOCHS,
    ERROR,
    FIGURES,
    GROUPS,
    PAPER,
    RUN,
    STATUS,
    TOTAL,
    Column,
    distinct_keys,
    figure_columns,
    frozen,
    resolve,
    setting_columns,
    short_titles,
    text,
)
from capsexp.compare.runs import Run, counted, is_number
from capsexp.errors import Notes, UserError, nearest

LOST = ("failed", "died")


@dataclass(frozen=True)
class Spread:
    """A figure over several runs, or a paper's."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for a single run."""
    n: int | None
    """Runs that have the figure; None for a paper's."""


@dataclass(frozen=True)
class Row:
    """A run, or several that are alike but for the settings that they are grouped by."""

    runs: tuple[Run, ...]
    cells: Mapping[str, Any]
    """By the column's name; what a run does not have is not in it."""


@dataclass(frozen=True)
class Comparison:
    """A table of runs."""

    columns: list[Column]
    rows: list[Row]
    order: Column
    """What the rows are sorted by."""
    descending: bool
    grouped_by: tuple[str, ...]
    """Settings that each row is a mean over; empty if each row is a run."""


def compare(
    runs: Sequence[Run],
    notes: Notes,
    *,
    show: Sequence[str] = (),
    group_by: Sequence[str] = (),
    sort_by: str = FIGURES[0].title,
    descending: bool | None = None,
    hide_failed: bool = False,
) -> Comparison:
    """Tell runs apart by the settings that differ, and put their figures beside them.

    Args:
        runs: the runs.
        notes: gets what is wrong with the wishes below, and with files.
        show: tags of metrics.jsonl whose last values become columns.
        group_by: settings or config groups to form means over, such as seed.
        sort_by: a setting, a config group, a figure or a tag.
        descending: the order; None: figures best first, settings from small to large.
        hide_failed: leave out runs that failed or died.
    """
    runs = [run for run in runs if not (hide_failed and run.status in LOST)]
    told = _last_values(runs, {"--show": show, "--sort-by": [sort_by] if "/" in sort_by else []}, notes)
    averaged = _resolved(group_by, runs, notes)
    settings = setting_columns(runs, without=averaged)
    columns = [
        *settings,
        *figure_columns(runs),
        *(Column(tag, tag, is_figure=True) for tag in told),
        STATUS,
        RUN,
    ]
    order = _order(sort_by, columns, averaged, runs, notes)
    if order not in columns:
        columns.insert(len(settings), order)
    rows = [Row((run,), _cells(run, told)) for run in runs]
    if averaged:
        rows = _grouped(rows, columns)
    descending = order.higher_is_better if descending is None else descending
    return Comparison(columns, _sorted(rows, order, descending), order, descending, tuple(averaged))


def beside_paper(runs: Sequence[Run], *, recipes: Sequence[str]) -> Comparison:
    """Our test errors beside a paper's: a row for each recipe, named by it; means over the seeds.

    Args:
        runs: the runs.
        recipes: their experiments, in the order of the rows; settings that differ within one make more rows.
    """
    apart = [[run for run in runs if run.choices.get("experiment") == name] for name in recipes]
    within = {one.name: one for some in apart for one in setting_columns(some, without=("seed",))}
    figures = [column for column in figure_columns(runs) if column not in (FIGURES[0], FIGURES[1])]
    columns = [Column("experiment", "recipe"), *within.values(), *figures, STATUS, RUN]
    rows = _grouped([Row((run,), _cells(run, {})) for some in apart for run in some], columns)
    return Comparison(columns, rows, RUN, descending=False, grouped_by=("seed",))


def spread(values: Sequence[int | float]) -> Spread:
    """Mean and sample standard deviation."""
    add = math.fsum if all(map(math.isfinite, values)) else sum  # fsum raises on infinities of both signs
    mean = add(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    variance = add((value - mean) * (value - mean) for value in values) / (len(values) - 1)
    return Spread(mean, math.sqrt(variance), len(values))


def told_apart(row: Row, columns: Iterable[Column]) -> str:
    """The row's settings: `iterations=3, seed=0`; empty if none differ."""
    settings = [column for column in columns if column.is_setting and column.name in row.cells]
    return ", ".join(f"{column.title}={text(row.cells[column.name])}" for column in settings)


def _last_values(
    runs: Sequence[Run], wishes: Mapping[str, Sequence[str]], notes: Notes
) -> dict[str, dict[Path, float]]:
    """Of each tag that is wished for, the last value of every run that has it; no tag that none has."""
    figures = {column.name for column in (*FIGURES, ERROR, PAPER)}
    asked = {tag: option for option, tags in wishes.items() for tag in tags if tag not in figures}
    last = {run.path: history.last_values(run.path, asked, notes) for run in runs} if asked else {}
    told = {tag: {path: values[tag] for path, values in last.items() if tag in values} for tag in asked}
    for tag in [tag for tag in told if runs and not told[tag]]:
        known = sorted({known for run in runs for known in history.tags(run.path)})
        notes.error(f"{asked[tag]}: no run has the figure {tag!r}{nearest(tag, known)}")
    return {tag: values for tag, values in told.items() if values}


def _resolved(group_by: Iterable[str], runs: Sequence[Run], notes: Notes) -> list[str]:
    """Full names of what means are formed over."""
    names = []
    keys = distinct_keys(runs)
    for name in group_by if runs else ():
        try:
            names.append(resolve(name, [*GROUPS, *keys]))
        except UserError as error:
            notes.error(f"--group-by: {error}")
    return names


def _order(
    name: str, columns: Sequence[Column], averaged: Sequence[str], runs: Sequence[Run], notes: Notes
) -> Column:
    """The column to sort by, in the table or to be added to it; if there is none, the best validation."""
    for column in columns:
        if name in (column.name, column.title):
            return column
    if not runs or "/" in name:  # already told
        return FIGURES[0]
    keys = distinct_keys(runs)
    try:
        key = resolve(name, [*GROUPS, *keys, *(column.title for column in columns if column.is_figure)])
        if {key, key.partition(".")[0]} & {*averaged}:
            raise UserError(f"{key}: the rows are means over it")
    except UserError as error:
        notes.error(f"--sort-by: {error}")
        return FIGURES[0]
    return next((one for one in columns if one.name == key), Column(key, short_titles(keys).get(key, key)))


def _cells(run: Run, told: Mapping[str, Mapping[Path, float]]) -> dict[str, Any]:
    error = None if run.test is None else 100 - 100 * run.test
    paper = None if run.paper is None else Spread(run.paper.error, run.paper.sd, None)
    columns = (*FIGURES, ERROR, PAPER, TOTAL, EPOCHS)
    values = (run.best, run.test, run.step, run.seconds, error, paper, run.total, run.epochs)
    figures = {column.name: value for column, value in zip(columns, values, strict=True) if value is not None}
    tags = {tag: values[run.path] for tag, values in told.items() if run.path in values}
    place = {STATUS.name: run.status, RUN.name: str(run.path)}
    return {**run.choices, **run.settings, **figures, **tags, **place}


def _grouped(rows: Iterable[Row], columns: Sequence[Column]) -> list[Row]:
    settings = [column.name for column in columns if column.is_setting]
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        told_by = frozenset((name, frozen(row.cells[name])) for name in settings if name in row.cells)
        groups.setdefault(told_by, []).append(row)
    return [_mean(group, settings, columns) for group in groups.values()]


def _mean(rows: Sequence[Row], settings: Iterable[str], columns: Iterable[Column]) -> Row:
    runs = tuple(run for row in rows for run in row.runs)
    cells = {name: rows[0].cells[name] for name in settings if name in rows[0].cells}
    for column in columns:
        values = [row.cells[column.name] for row in rows if column.name in row.cells]
        if column == PAPER and len({*values}) == 1:
            cells[column.name] = values[0]
        elif column.is_figure and column != PAPER and values:
            cells[column.name] = spread(values)
    cells[STATUS.name] = counted([run.status for run in runs])
    cells[RUN.name] = [str(run.path) for run in runs]
    return Row(runs, cells)


def _sorted(rows: Iterable[Row], column: Column, descending: bool) -> list[Row]:
    """Rows that lack the value, or whose figure is not a number, come last in either order."""
    valued = [(_sortable(row, column), row) for row in rows]
    there = sorted((pair for pair in valued if pair[0]), key=lambda pair: pair[0], reverse=descending)
    return [row for _, row in there] + [row for value, row in valued if not value]


def _sortable(row: Row, column: Column) -> tuple[int, Any] | tuple[()]:
    """Numbers before words, words by the alphabet; empty for what has no place."""
    value = row.cells.get(column.name)
    if isinstance(value, Spread):
        value = value.mean
    if is_number(value):
        return () if math.isnan(value) else (0, value)
    return (1, text(value)) if column.name in row.cells else ()
