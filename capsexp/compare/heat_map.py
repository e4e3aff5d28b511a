"""Tables of the report beside that of the runs: errors by class and by group, and toys held out."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from capsexp.compare.comparison import Comparison, compare, row_label
from capsexp.compare.curves import mean_over_seeds
from capsexp.compare.group_errors import Errors, Part, test_errors
from capsexp.compare.layout import single_line
from capsexp.compare.means import Row
from capsexp.compare.measures import FOLD, FOLDS, runs_of_folds
from capsexp.compare.tables import cell_text
from capsexp.errors import Notes

MOST_ROWS = 40
MOST_PARTS = 60
"""Classes and groups; a wider table is not drawn."""
DARKEST = 70  # % of the colour, at an error of a half or more


class HeatCell(NamedTuple):
    """An error and how strongly its cell is coloured, in %."""

    text: str
    heat: int


class HeatRow(NamedTuple):
    """The errors of a setting."""

    label: str
    cells: tuple[HeatCell, ...]


class HeatMap(NamedTuple):
    """Errors of settings (rows) on classes and groups (columns)."""

    group: str | None
    titles: tuple[str, ...]
    rows: tuple[HeatRow, ...]


class FoldsTable(NamedTuple):
    """Validation on toys held out, a row for each setting."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def heat_map(comparison: Comparison, notes: Notes) -> HeatMap | None:
    """Return the errors of the first rows with the same classes and groups; None without any."""
    runs = [run for row in comparison.rows for run in row.runs]
    if not any((run.path / "test_errors.json").exists() for run in runs):
        return None
    means = mean_over_seeds(comparison, Notes())  # the learning curves have noted what is left out
    found = ((row, _errors(row, notes)) for row in means.rows)
    with_errors = list(islice(((row, errors) for row, errors in found if errors), MOST_ROWS))
    if not with_errors:
        return None
    first = with_errors[0][1][0]
    names = _names(first)
    if len(names) > MOST_PARTS:
        return None
    rows = [
        HeatRow(_label(row, means, len(errors)), tuple(map(_cell, _mean_errors(errors))))
        for row, errors in with_errors
        if all(_names(one) == names for one in errors)
    ]
    return HeatMap(first.group, names, tuple(rows))


def folds_table(comparison: Comparison, notes: Notes) -> FoldsTable | None:
    """Return the validation accuracies on the toys held out; None where no run holds one out."""
    runs = runs_of_folds(run for row in comparison.rows for run in row.runs)
    if len({run.settings[FOLD] for run in runs}) < 2:
        return None
    table = compare(runs, notes, folds=True)
    columns = [column for column in FOLDS if column in table.columns]
    rows = [
        (single_line(row_label(row, table.columns)), *(cell_text(row, column, Path()) for column in columns))
        for row in table.rows[:MOST_ROWS]
    ]
    return FoldsTable(("", *(column.title for column in columns)), tuple(rows)) if columns else None


def _errors(row: Row, notes: Notes) -> list[Errors]:
    found = (test_errors(run.path, run.test, notes) for run in row.runs if run.status == "finished")
    return [errors for errors in found if errors is not None]


def _parts(errors: Errors) -> tuple[Part, ...]:
    return errors.classes + errors.groups


def _names(errors: Errors) -> tuple[str, ...]:
    return tuple(part.name for part in _parts(errors))


def _mean_errors(runs: Sequence[Errors]) -> list[float | None]:
    """Return the error of each class and group in %, averaged over runs; None without images."""
    means: list[float | None] = []
    for parts in zip(*map(_parts, runs), strict=True):
        shares = [part.errors / part.images for part in parts if part.images]
        means.append(100 * sum(shares) / len(shares) if shares else None)
    return means


def _cell(error: float | None) -> HeatCell:
    if error is None:
        return HeatCell("–", 0)  # noqa: RUF001
    return HeatCell(f"{error:.1f}", round(min(DARKEST, 2 * DARKEST * error / 100)))


def _label(row: Row, comparison: Comparison, count: int) -> str:
    label = row_label(row, comparison.columns) or row.runs[0].path.name
    return single_line(f"{label} ({count})")
