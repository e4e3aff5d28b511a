"""Compare runs: build rows, average over seeds, sort."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsexp.compare import history
from capsexp.compare.columns import (
    EPOCHS,
    ERROR,
    GROUPS,
    METRICS,
    PAPER,
    RUN,
    STATUS,
    TOTAL,
    Column,
    as_override,
    distinct_keys,
    full_key,
    metric_columns,
    setting_columns,
    short_titles,
)
from capsexp.compare.intervals import Interval
from capsexp.compare.means import Row, Spread, grouped
from capsexp.compare.measures import FOLD, Measures, cost_cells, cost_columns, runs_of_folds
from capsexp.compare.runs import Run
from capsexp.errors import Notes, UserError, is_number

UNSUCCESSFUL = ("failed", "died")


@dataclass(frozen=True)
class Comparison:
    """A table of runs."""

    columns: list[Column]
    rows: list[Row]
    order: Column
    """The column that the rows are sorted by."""
    descending: bool
    grouped_by: tuple[str, ...]
    """The settings that each row averages over; empty if each row is a run."""


def compare(
    runs: Sequence[Run],
    notes: Notes,
    *,
    show: Sequence[str] = (),
    group_by: Sequence[str] = (),
    sort_by: str = METRICS[0].title,
    descending: bool | None = None,
    hide_failed: bool = False,
    baselines: Sequence[str] = (),
    folds: bool = False,
) -> Comparison:
    """Build a table of the settings that differ between runs, and of their metrics.

    Args:
        runs: the runs.
        notes: collects errors in the arguments below, and warnings about files.
        show: tags of metrics.jsonl whose last values become columns.
        group_by: settings or config groups to average over, such as seed.
        sort_by: a setting, a config group, a metric or a tag.
        descending: the order; None sorts metrics best first and settings from small to large.
        hide_failed: leave out runs that failed or died.
        baselines: rows to show the gap to; see `Measures`.
        folds: average over the toys held out and the seeds; leave out runs that hold none out.
    """
    runs = [run for run in runs if not (hide_failed and run.status in UNSUCCESSFUL)]
    if folds:
        runs, group_by = _folds(runs, notes), [*group_by, FOLD, "seed"]
    tags = {"--show": show, "--sort-by": [sort_by] if "/" in sort_by else []}
    last_values = _last_values(runs, tags, notes)
    averaged = _full_keys(group_by, runs, notes)
    settings = setting_columns(runs, without=averaged)
    tag_columns = [Column(tag, tag, is_metric=True) for tag in last_values]
    columns = [*settings, *metric_columns(runs), *cost_columns(runs), *tag_columns, STATUS, RUN]
    order = _order(sort_by, columns, averaged, runs, notes)
    if order not in columns:
        columns.insert(len(settings), order)
    rows = [Row((run,), _cells(run, last_values)) for run in runs]
    if averaged:
        rows, columns = grouped(rows, columns, averaged, notes)
    rows, columns = Measures(runs, baselines, folds, notes).add(rows, columns)
    descending = order.higher_is_better if descending is None else descending
    return Comparison(columns, _sorted(rows, order, descending), order, descending, tuple(averaged))


def _folds(runs: Sequence[Run], notes: Notes) -> list[Run]:
    found = runs_of_folds(runs)
    if runs and not found:
        notes.error(f"--folds: no run has a toy held out, {FOLD}=4")
    return found


def beside_paper(runs: Sequence[Run], notes: Notes, *, recipes: Sequence[str]) -> Comparison:
    """Build a table of our test errors beside the papers'. Each recipe is a row, averaged over seeds.

    Args:
        runs: the runs.
        notes: collects the runs that enter no mean because they repeat a seed.
        recipes: names of experiments, in the order of the rows. A recipe whose runs differ in a setting
            other than the seed gets a row for each value.
    """
    by_recipe = [[run for run in runs if run.choices.get("experiment") == name] for name in recipes]
    settings = {
        column.name: column for group in by_recipe for column in setting_columns(group, without=("seed",))
    }
    metrics = [column for column in metric_columns(runs) if column not in (METRICS[0], METRICS[1])]
    columns = [Column("experiment", "recipe"), *settings.values(), *metrics, STATUS, RUN]
    rows = [Row((run,), _cells(run, {})) for group in by_recipe for run in group]
    rows, columns = grouped(rows, columns, ["seed"], notes)
    return Comparison(columns, rows, RUN, descending=False, grouped_by=("seed",))


def row_label(row: Row, columns: Iterable[Column]) -> str:
    """Return the row's differing settings, `iterations=3, seed=0`; empty if none differ."""
    settings = [column for column in columns if column.is_setting and column.name in row.cells]
    return ", ".join(f"{column.title}={as_override(row.cells[column.name])}" for column in settings)


def _last_values(
    runs: Sequence[Run], tags_of: Mapping[str, Sequence[str]], notes: Notes
) -> dict[str, dict[Path, float]]:
    """Return the last values of tags by run. A tag that no run has is left out and noted as an error.

    Args:
        runs: the runs.
        tags_of: tags by the command-line option that names them.
        notes: collects the errors.
    """
    metrics = {column.name for column in (*METRICS, ERROR, PAPER)}
    options = {tag: option for option, tags in tags_of.items() for tag in tags if tag not in metrics}
    by_run = {run.path: history.last_values(run.path, options, notes) for run in runs} if options else {}
    by_tag = {tag: {path: values[tag] for path, values in by_run.items() if tag in values} for tag in options}
    for tag, option in options.items():
        if runs and not by_tag[tag]:
            notes.error(f"{option}: {history.unknown_tag(tag, runs)}")
    return {tag: values for tag, values in by_tag.items() if values}


def _full_keys(group_by: Iterable[str], runs: Sequence[Run], notes: Notes) -> list[str]:
    """Return the full names of the settings to average over."""
    names = []
    keys = distinct_keys(runs)
    for name in group_by if runs else ():
        try:
            names.append(full_key(name, [*GROUPS, *keys]))
        except UserError as error:
            notes.error(f"--group-by: {error}")
    return names


def _order(
    name: str, columns: Sequence[Column], averaged: Sequence[str], runs: Sequence[Run], notes: Notes
) -> Column:
    """Return the column to sort by, which may be missing from the table. Default: the best validation."""
    for column in columns:
        if name in (column.name, column.title):
            return column
    if not runs or "/" in name:  # `_last_values` has noted unknown tags
        return METRICS[0]
    keys = distinct_keys(runs)
    try:
        key = full_key(name, [*GROUPS, *keys, *(column.title for column in columns if column.is_metric)])
        if {key, key.partition(".")[0]} & {*averaged}:
            raise UserError(f"the rows are means over {key}")
    except UserError as error:
        notes.error(f"--sort-by: {error}")
        return METRICS[0]
    in_table = (column for column in columns if column.name == key)
    return next(in_table, Column(key, short_titles(keys).get(key, key)))


def _cells(run: Run, last_values: Mapping[str, Mapping[Path, float]]) -> dict[str, Any]:
    error = None if run.test is None else 100 - 100 * run.test
    paper = None if run.paper is None else Spread(run.paper.error, run.paper.sd, None)
    columns = (*METRICS, ERROR, PAPER, TOTAL, EPOCHS)
    values = (run.best, run.test, run.step, run.seconds, error, paper, run.total, run.epochs)
    metrics = {column.name: value for column, value in zip(columns, values, strict=True) if value is not None}
    tags = {tag: by_run[run.path] for tag, by_run in last_values.items() if run.path in by_run}
    identity = {STATUS.name: run.status, RUN.name: str(run.path)}
    return {**run.choices, **run.settings, **metrics, **cost_cells(run), **tags, **identity}


def _sorted(rows: Iterable[Row], column: Column, descending: bool) -> list[Row]:
    """Sort rows; those with no value or NaN come last in either order."""
    keyed = [(_sort_key(row, column), row) for row in rows]
    with_value = sorted((pair for pair in keyed if pair[0]), key=lambda pair: pair[0], reverse=descending)
    return [row for _, row in with_value] + [row for key, row in keyed if not key]


def _sort_key(row: Row, column: Column) -> tuple[int, Any] | tuple[()]:
    """Return a key that sorts numbers before strings; empty for no value or NaN."""
    value = row.cells.get(column.name)
    if isinstance(value, Spread | Interval):
        value = value.mean
    if is_number(value):
        return () if math.isnan(value) else (0, value)
    return (1, as_override(value)) if column.name in row.cells else ()
