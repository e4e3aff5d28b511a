"""Columns beyond accuracies: what a network costs, intervals over toys, gaps to a baseline, folds.

Each appears only where there is something to show.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from capsexp.compare import history
from capsexp.compare.columns import GROUPS, Column, as_override, distinct_keys, full_key
from capsexp.compare.group_errors import Errors, test_errors, validation_errors
from capsexp.compare.intervals import Interval, error_interval, gap_interval
from capsexp.compare.means import Row, Spread, spread
from capsexp.compare.runs import Run
from capsexp.errors import Notes, UserError, is_integer, is_number
from capsexp.text import a_few

COSTS = (
    Column("parameters", "parameters", is_metric=True),
    Column("multiplications", "multiplications", is_metric=True),
    Column("images_per_second", "images/s", is_metric=True),
    Column("peak_memory", "peak memory", is_metric=True),
)
INTERVAL = Column("test/error_over_groups", "test error, % [95 %]", is_metric=True, is_interval=True)
FOLD = "dataset.validation_instance"
CHOSEN, BESIDE = (4, 6, 7, 8), 9
"""Training toys of smallNORB: choices are made on the mean over four. Toy 9 is shown beside it, because
networks that have not seen its car take it for an airplane."""
FOLDS = (
    Column("validation/folds_4_6_7_8", "folds 4, 6, 7, 8", is_metric=True),
    Column("validation/fold_9", "fold 9", is_metric=True),
)
BALANCED = "validation/balanced_accuracy"


def cost_columns(runs: Sequence[Run]) -> list[Column]:
    """Return the columns of costs if the runs have networks of different costs."""
    costs = {(run.parameters, run.multiplications) for run in runs if run.parameters is not None}
    return [*COSTS] if len(costs) > 1 else []


def cost_cells(run: Run) -> dict[str, int | float]:
    """Return what a run's network costs."""
    values = (run.parameters, run.multiplications, run.images_per_second, run.peak_memory)
    return {column.name: value for column, value in zip(COSTS, values, strict=True) if value is not None}


@dataclass
class Measures:
    """Computes what belongs to a row, not to a run: an interval needs all seeds of the row.

    Args:
        runs: all runs of the table.
        baselines: as typed: KEY=VALUE, or the choice of a config group, such as uniform.
        folds: whether the rows are means over the toy held out.
        notes: collects mistakes in the baselines, and warnings about files.
    """

    runs: Sequence[Run]
    baselines: Sequence[str]
    folds: bool
    notes: Notes
    _errors: dict[Any, Errors | None] = field(default_factory=dict)

    def add(self, rows: Sequence[Row], columns: Sequence[Column]) -> tuple[list[Row], list[Column]]:
        """Return the rows and columns with those measures that some row has; they follow the metrics."""
        gaps = {self._gap_column(name): self._matching(name) for name in self.baselines} if self.runs else {}
        measured = [self._cells(row, gaps) for row in rows]
        order = (INTERVAL, *gaps, *(FOLDS if self.folds else ()))
        new = [column for column in order if any(column.name in cells for cells in measured)]
        rows = [replace(row, cells={**row.cells, **cells}) for row, cells in zip(rows, measured, strict=True)]
        place = 1 + max(index for index, column in enumerate(columns) if column.is_metric)
        return rows, [*columns[:place], *new, *columns[place:]]

    def _cells(self, row: Row, gaps: Mapping[Column, Sequence[Run]]) -> dict[str, Any]:
        counted = row.counted or [run for run in row.runs if run.status == "finished"]
        cells: dict[str, Any] = {}
        if counted and (interval := self._error(counted)) is not None:
            cells[INTERVAL.name] = interval
        for column, matching in gaps.items():
            if counted and (gap := self._gap(counted, matching, column)) is not None:
                cells[column.name] = gap
        return cells | (self._fold_cells(counted) if self.folds else {})

    def _error(self, runs: Sequence[Run]) -> Interval | None:
        errors = [found for run in runs if (found := self._errors_of(run)) is not None]
        return error_interval(errors) if len(errors) == len(runs) else None

    def _errors_of(self, run: Run) -> Errors | None:
        if run.path not in self._errors:
            self._errors[run.path] = test_errors(run.path, run.test, self.notes)
        return self._errors[run.path]

    @staticmethod
    def _gap_column(name: str) -> Column:
        title = f"gap to {name}, points [95 %]"
        return Column(f"test/gap_to_{name}", title, is_metric=True, is_interval=True)

    def _matching(self, name: str) -> list[Run]:
        """Return the finished runs of a baseline; none, with the mistake noted, if there are none."""
        key, has_value, value = name.partition("=")
        if not has_value:
            found = [run for run in self.runs if name in run.choices.values()]
        else:
            try:
                key = full_key(key, [*GROUPS, *distinct_keys(self.runs)])
            except UserError as error:
                self.notes.error(f"--baseline: {error}")
                return []
            found = [run for run in self.runs if _has(run, key, value)]
        if not found:
            self.notes.error(f"--baseline: no run has {name}")
        return [run for run in found if run.status == "finished" and run.test is not None]

    def _gap(self, runs: Sequence[Run], matching: Sequence[Run], column: Column) -> Interval | None:
        """Return the difference to the runs of a baseline with the same budget; None without any."""
        baseline = [run for run in matching if _budget(run) == _budget(runs[0]) != ()]
        baseline = _closest(baseline, runs[0])
        is_baseline = {run.path for run in runs} <= {run.path for run in baseline}
        if not baseline or is_baseline or any(run.test is None for run in runs):
            return None
        if len({_without_seed(run) for run in baseline}) > 1:
            names = a_few(sorted(run.path.name for run in baseline))
            self.notes.warning(f"no {column.name} for some rows: {names} differ in more than the seed")
            return None
        own = [errors for run in runs if (errors := self._errors_of(run)) is not None]
        other = [errors for run in baseline if (errors := self._errors_of(run)) is not None]
        if len(own) == len(runs) and len(other) == len(baseline):
            paired = gap_interval(own, other)
            if paired is not None:
                return paired
        return Interval(_mean_error(runs) - _mean_error(baseline))

    def _fold_cells(self, runs: Sequence[Run]) -> dict[str, Spread]:
        """Return the class-balanced validation accuracy: the mean over four folds, and the fifth."""
        by_fold: dict[int, list[float]] = {}
        for run in runs:
            fold, value = run.settings.get(FOLD), balanced_accuracy(run, self.notes)
            if is_integer(fold) and value is not None:
                by_fold.setdefault(fold, []).append(value)
        means = [spread(by_fold[fold]).mean for fold in CHOSEN if fold in by_fold]
        cells = {FOLDS[0].name: spread(means)} if means else {}
        return cells | ({FOLDS[1].name: spread(by_fold[BESIDE])} if BESIDE in by_fold else {})


def balanced_accuracy(run: Run, notes: Notes) -> float | None:
    """Return the mean over the classes of the accuracies in a run's last validation; None if unknown."""
    last = history.last_values(run.path, [BALANCED], notes).get(BALANCED)
    if last is not None:
        return last
    errors = validation_errors(run.path, notes)
    return None if errors is None else errors.balanced_accuracy


def runs_of_folds(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that hold a toy of every class out."""
    return [run for run in runs if is_integer(run.settings.get(FOLD))]


def _has(run: Run, key: str, value: str) -> bool:
    own = run.settings[key] if key in run.settings else run.choices.get(key)
    return own is not None and as_override(own) == value


def _budget(run: Run) -> tuple[Any, ...]:
    """Return what two runs must have in common to be compared; empty if it is not known.

    Runs with `trainer.max_seconds` are compared at equal time, others at equal images.
    """
    seconds = run.settings.get("trainer.max_seconds")
    if is_number(seconds):
        return ("seconds", seconds)
    batch = run.settings.get("trainer.batch_size")
    return ("images", run.step * batch) if run.step is not None and is_number(batch) else ()


def _closest(candidates: Sequence[Run], run: Run) -> list[Run]:
    """Return the candidates with the run's images, and of these those of its network if there are any."""
    same = [other for other in candidates if _images(other) == _images(run)]
    own = [other for other in same if other.choices.get("model") == run.choices.get("model")]
    return own or same


def _images(run: Run) -> tuple[str | None, dict[str, Any]]:
    """Return the dataset of a run with all of its settings, also those of the preprocessing."""
    settings = {key: value for key, value in run.settings.items() if key.startswith("dataset.")}
    return run.choices.get("dataset"), settings


def _without_seed(run: Run) -> str:
    settings = {key: value for key, value in run.settings.items() if key != "seed"}
    return repr(sorted(settings.items()))


def _mean_error(runs: Sequence[Run]) -> float:
    return spread([100 - 100 * run.test for run in runs if run.test is not None]).mean
