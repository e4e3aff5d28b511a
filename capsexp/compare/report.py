"""Write runs as one self-contained HTML page: table, learning curves, and each run with its figures."""

import base64
import importlib.metadata
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capsexp.compare.chart import chart
from capsexp.compare.columns import Column, as_override, distinct_keys
from capsexp.compare.comparison import Comparison, row_label
from capsexp.compare.curves import COLOURS, Curve, colour, learning_curves, mean_over_seeds
from capsexp.compare.means import Row, Spread
from capsexp.compare.runs import Run
from capsexp.compare.tables import ABSENT, cell_text, common_folder, is_numeric
from capsexp.compare.templates import render
from capsexp.errors import Notes, is_number
from capsexp.files import write_atomic
from capsexp.training.progress import clock

PNG = b"\x89PNG\r\n\x1a\n"
SMALL_WIDTH = 400  # pixels; narrower figures are enlarged
MAX_OPEN = 4  # with more runs than this, all are folded


class Head(NamedTuple):
    """The heading of a column."""

    name: str
    title: str
    is_numeric: bool
    sorted: str | None
    """`ascending` or `descending` for the column that the rows are sorted by, else None."""
    first: str
    """The order after the first click."""


class Cell(NamedTuple):
    """A cell of the table. Cells without a `value`, such as NaN, are sorted to the end."""

    text: str
    is_number: bool
    value: float | str | None = None
    kind: str | None = None
    """`number` or `text`: how `value` is sorted."""


class LegendEntry(NamedTuple):
    """A curve in the legend."""

    number: int
    colour: str
    label: str


class Fact(NamedTuple):
    """A line about a run."""

    name: str
    value: str | None
    is_code: bool = False


class FigureFile(NamedTuple):
    """A PNG file of a run, as a data URL."""

    name: str
    source: str
    is_small: bool


def write(file: Path, comparison: Comparison, tags: Sequence[str], notes: Notes) -> None:
    """Write the page atomically.

    Args:
        file: the page.
        comparison: the table; each row is a run.
        tags: of metrics.jsonl, to draw learning curves of.
        notes: collects unknown tags, and warnings about files.
    """
    curves = learning_curves(mean_over_seeds(comparison, notes), tags, notes)
    content = page(comparison, curves, tags, notes)
    write_atomic(file, lambda opened: opened.write(content.encode()))


def page(comparison: Comparison, curves: Sequence[Curve], tags: Sequence[str], notes: Notes) -> str:
    """Return the page as HTML."""
    count = len(comparison.rows)
    folder = common_folder(row.runs[0].path for row in comparison.rows)
    folder_name = Path.cwd().name if folder == Path() else folder
    now = time.strftime("%Y-%m-%d %H:%M %Z")
    legend = [
        LegendEntry(index + 1, colour(index), f"{curve.label} ({len(curve.runs)})")
        for index, curve in enumerate(curves)
    ]
    entries = {run.path: entry for entry, curve in zip(legend, curves, strict=True) for run in curve.runs}
    return render(
        "report.html",
        title=f"{count} run{'s' * (count != 1)} in {folder_name}",
        written=f"Written {now} by capsexp {importlib.metadata.version('capsexp')}",
        heads=[_head(column, comparison) for column in comparison.columns],
        runs=[
            {"anchor": f"run-{index}", "curve": entries.get(row.runs[0].path)}
            | _run_section(row, comparison.columns, folder, notes)
            for index, row in enumerate(comparison.rows)
        ],
        curves=legend,
        coloured=len(COLOURS),
        panels=[
            {"tag": tag, "chart": chart(curves, tag)}
            for tag in tags
            if any(curve.points[tag] for curve in curves)
        ],
        opened=count <= MAX_OPEN,
        absent=ABSENT,
        zip=zip,
    )


def _head(column: Column, comparison: Comparison) -> Head:
    order = "descending" if comparison.descending else "ascending"
    return Head(
        column.name,
        column.title,
        is_numeric(column, comparison),
        sorted=order if column == comparison.order else None,
        first="descending" if column.higher_is_better else "ascending",
    )


def _run_section(row: Row, columns: Sequence[Column], folder: Path, notes: Notes) -> dict[str, Any]:
    (run,) = row.runs
    return {
        "name": os.path.relpath(run.path, folder),
        "label": row_label(row, columns),
        "status": run.status,
        "cells": [_cell(row, column, folder) for column in columns],
        "facts": [fact for fact in _facts(run) if fact.value],
        "settings": [f"{key}={as_override(run.settings[key])}" for key in distinct_keys([run])],
        "figures": list(_figures(run, notes)),
    }


def _cell(row: Row, column: Column, folder: Path) -> Cell:
    text = cell_text(row, column, folder)
    if column.name not in row.cells:
        return Cell(text, column.is_metric)
    value = row.cells[column.name]
    value = value.mean if isinstance(value, Spread) else value
    if is_number(value):
        return Cell(text, True, None if math.isnan(value) else value, "number")
    return Cell(text, False, text, "text")


def _facts(run: Run) -> Iterator[Fact]:
    """Yield the facts about a run, without its settings. A value may be missing."""
    yield Fact("error", run.error, is_code=True)
    yield Fact("command", run.command, is_code=True)
    yield Fact("directory", str(run.path))
    if run.started is not None:
        yield Fact("started", time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(run.started)))
    if run.seconds is not None:
        yield Fact("time", clock(run.seconds))
    if run.step is not None:
        yield Fact("steps", f"{run.step} of {ABSENT if run.total is None else run.total}")
    for name, accuracy in (("validation", run.best), ("test", run.test)):
        if accuracy is not None:
            yield Fact(name, f"{accuracy:.4f}")
    yield Fact("capsexp", run.version)


def _figures(run: Run, notes: Notes) -> Iterator[FigureFile]:
    for file in sorted(run.path.glob("figures/*.png")):
        try:
            content = file.read_bytes()
        except OSError:
            content = b""
        if not content.startswith(PNG):
            notes.warning(f"{file} is not shown: not a PNG file")
            continue
        width = int.from_bytes(content[16:20])  # a PNG file starts with the chunk that holds its size
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        yield FigureFile(file.stem, source, is_small=width < SMALL_WIDTH)
