"""Average the runs of one setting over their seeds.

Only finished runs enter a mean, and of runs that repeat each other only the newest. A run whose settings are
not known has a row of its own; so have runs that lack a setting which the others have.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capsexp.compare.columns import (
    PAPER,
    RUN,
    STATUS,
    Column,
    distinct_keys,
    hashable,
)
from capsexp.compare.runs import Run, count_statuses, newest_first
from capsexp.errors import Notes
from capsexp.text import a_few

KNOWN = Column("settings", "settings")
"""Which settings of a row are not known; shown if there is such a row."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a metric over several runs, or as a paper gives them."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for a single run."""
    n: int | None
    """Number of runs that have the metric; None for a paper's."""


@dataclass(frozen=True)
class Row:
    """A run, or several runs that differ only in the settings that are averaged over."""

    runs: tuple[Run, ...]
    cells: Mapping[str, Any]
    """By column name; missing values have no entry."""
    counted: tuple[Run, ...] = ()
    """The runs that enter the means: finished, and of repetitions only the newest."""


def spread(values: Sequence[int | float]) -> Spread:
    """Return mean and sample standard deviation."""
    mean = _total(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    variance = _total([(value - mean) * (value - mean) for value in values]) / (len(values) - 1)
    return Spread(mean, math.sqrt(variance), len(values))


def grouped(
    rows: Sequence[Row], columns: Sequence[Column], averaged: Sequence[str], notes: Notes
) -> tuple[list[Row], list[Column]]:
    """Return a row of means for each setting, and the columns, with one more if a row lacks settings.

    Args:
        rows: the rows; each is a run.
        columns: of the table.
        averaged: the settings and config groups to average over.
        notes: collects the runs that enter no mean because they repeat another run.
    """
    settings = [column.name for column in columns if column.is_setting]
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        shown = frozenset((name, hashable(row.cells[name])) for name in settings if name in row.cells)
        groups.setdefault(shown, []).append(row)
    parts = [part for group in groups.values() for part in _parts(group, averaged)]
    means = [_mean_row(part, remark, settings, columns, averaged) for part, remark in parts]
    _warn_of_repetitions(means, averaged, notes)
    if any(KNOWN.name in row.cells for row in means):
        columns = [*columns[: len(settings)], KNOWN, *columns[len(settings) :]]
    return means, list(columns)


def _parts(rows: Sequence[Row], averaged: Sequence[str]) -> list[tuple[list[Row], str]]:
    """Divide rows of equal shown settings by which settings they have; say which ones each part lacks.

    A run of an earlier version may lack a setting that later ones have: its value then is not known.
    """
    known = [row.runs[0].settings.keys() for row in rows]
    if known[0] and all(keys == known[0] for keys in known):
        return [(list(rows), "")]
    keys = [key for key in distinct_keys(row.runs[0] for row in rows) if not _is_averaged(key, averaged)]
    parts: dict[Hashable, tuple[list[Row], str]] = {}
    for row in rows:
        (run,) = row.runs
        missing = tuple(key for key in keys if key not in run.settings)
        if not run.settings:
            parts[run.path] = ([row], f"unknown: {run.path.name}")
        elif missing:
            parts.setdefault((missing, run.version), ([], f"without {a_few(missing)}"))[0].append(row)
        else:
            parts.setdefault((), ([], ""))[0].append(row)
    return list(parts.values())


def _mean_row(
    rows: Sequence[Row],
    remark: str,
    settings: Iterable[str],
    columns: Iterable[Column],
    averaged: Sequence[str],
) -> Row:
    runs = tuple(run for row in rows for run in row.runs)
    counted = _counted(runs, averaged)
    paths = {run.path for run in counted}
    cells = {name: rows[0].cells[name] for name in settings if name in rows[0].cells}
    cells |= {KNOWN.name: remark} if remark else {}
    for column in columns:
        having = [row for row in rows if column.name in row.cells]
        values = [row.cells[column.name] for row in having if row.runs[0].path in paths]
        if column == PAPER and len({row.cells[column.name] for row in having}) == 1:
            cells[column.name] = having[0].cells[column.name]
        elif column.is_metric and column != PAPER and values:
            cells[column.name] = spread(values)
    cells[STATUS.name] = count_statuses([run.status for run in runs])
    cells[RUN.name] = [str(run.path) for run in runs]
    return Row(runs, cells, counted)


def _counted(runs: Sequence[Run], averaged: Sequence[str]) -> tuple[Run, ...]:
    """Return the finished runs; of those with equal seeds, which repeat each other, only the newest."""
    newest: dict[Hashable, Run] = {}
    finished = [run for run in runs if run.status == "finished"]
    if len(finished) < 2:
        return tuple(finished)
    for run in newest_first(finished):
        values = {**run.choices, **run.settings}
        seed = {key: value for key, value in values.items() if _is_averaged(key, averaged)}
        newest.setdefault(hashable(seed), run)
    chosen = {run.path for run in newest.values()}
    return tuple(run for run in runs if run.path in chosen)


def _warn_of_repetitions(rows: Iterable[Row], averaged: Sequence[str], notes: Notes) -> None:
    finished = ((run, row) for row in rows for run in row.runs if run.status == "finished")
    repeated = [str(run.path) for run, row in finished if run not in row.counted]
    if repeated:
        over = ", ".join(averaged)
        rule = f"of runs with equal {over} only the newest finished one enters a mean"
        notes.warning(f"{rule}; left out: {a_few(repeated)}")


def _is_averaged(key: str, averaged: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in averaged)


def _total(values: Sequence[int | float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # the sum is too large, or has infinities of both signs
        return float(sum(values))
