"""Write runs as one self-contained HTML page: table, learning curves, and each run with its figures."""

import base64
import importlib.metadata
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import escape

from capsexp.compare.chart import chart
from capsexp.compare.columns import Column, as_override, distinct_keys
from capsexp.compare.comparison import Comparison, row_label
from capsexp.compare.curves import COLOURS, Curve, colour, learning_curves, mean_over_seeds
from capsexp.compare.heat_map import folds_table, heat_map
from capsexp.compare.intervals import Interval
from capsexp.compare.layout import single_line
from capsexp.compare.means import Row, Spread
from capsexp.compare.measures import COSTS, cost_cells
from capsexp.compare.runs import Run
from capsexp.compare.tables import (
    ABSENT,
    cell_text,
    common_folder,
    format_metric,
    is_numeric,
    shown_columns,
)
from capsexp.compare.templates import render
from capsexp.compare.unfinished import resume_command
from capsexp.errors import Notes, is_number
from capsexp.files import read_regular
from capsexp.outputs import write_output
from capsexp.text import printable_lines
from capsexp.training.progress import clock

PNG = b"\x89PNG\r\n\x1a\n"
SMALL_WIDTH = 400  # pixels; narrower figures are enlarged
LARGEST_PAGE = 10_000_000  # bytes
SPARE_BYTES = 300_000  # of what has no budget: styles, scripts, the legend
PANEL_BYTES, TABLE_BYTES, DETAILS_BYTES = 2_000_000, 4_200_000, 2_800_000  # figures get what is left
CELL_BYTES, TEXT_BYTES, SECTION_BYTES, FIGURE_BYTES = 90, 70, 700, 1000  # of the HTML around them
LONGEST_FACT = 10_000  # characters
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


class Budget:
    """Bytes of a part of the page.

    Args:
        size: the most that fit.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.used = 0
        self.left_out = 0

    @property
    def left(self) -> int:
        """Bytes that still fit; none after something did not, so that what is shown comes first in order."""
        return 0 if self.left_out else self._size - self.used

    def take(self, size: int) -> bool:
        """Return whether something of this size fits, and count it."""
        if size > self.left:
            self.left_out += 1
            return False
        self.used += size
        return True


def write(file: Path, comparison: Comparison, tags: Sequence[str], notes: Notes) -> int:
    """Write the page; return its size in bytes.

    Args:
        file: the page.
        comparison: the table; each row is a run.
        tags: of metrics.jsonl, to draw learning curves of.
        notes: collects unknown tags, what the page leaves out, and warnings about files.

    Raises:
        UserError: the file cannot be written.
    """
    curves = learning_curves(mean_over_seeds(comparison, notes), tags, notes)
    content = page(comparison, curves, tags, notes).encode()
    write_output(file, content)
    return len(content)


def page(comparison: Comparison, curves: Sequence[Curve], tags: Sequence[str], notes: Notes) -> str:
    """Return the page as HTML, of at most `LARGEST_PAGE` bytes; it says what it leaves out."""
    count = len(comparison.rows)
    folder = common_folder(row.runs[0].path for row in comparison.rows)
    legend = [
        LegendEntry(index + 1, colour(index), f"{single_line(curve.label)} ({len(curve.runs)})")
        for index, curve in enumerate(curves)
    ]
    entries = {run.path: entry for entry, curve in zip(legend, curves, strict=True) for run in curve.runs}
    panels, table, details = Budget(PANEL_BYTES), Budget(TABLE_BYTES), Budget(DETAILS_BYTES)
    charts = [panel for panel in _panels(curves, tags) if panels.take(len(panel["chart"]))]
    runs = list(_table_rows(comparison, entries, folder, table))
    sections = list(_sections(comparison, runs, folder, details))
    figures = Budget(LARGEST_PAGE - SPARE_BYTES - panels.used - table.used - details.used)
    for section, row in zip(sections, comparison.rows, strict=False):
        section["figures"] = list(_figures(row.runs[0], figures, notes))
    parts = {"panels": panels, "rows of the table": table, "details of runs": details, "figures": figures}
    left_out = ", ".join(f"{part.left_out} {name}" for name, part in parts.items() if part.left_out)
    if left_out:
        notes.warning(f"the page leaves out {left_out}, to stay below {LARGEST_PAGE / 1e6:.0f} MB")
    now = time.strftime("%Y-%m-%d %H:%M %Z")
    text = render(
        "report.html",
        title=f"{count} run{'s' * (count != 1)} in {Path.cwd().name if folder == Path() else folder}",
        written=f"Written {now} by capsexp {importlib.metadata.version('capsexp')}",
        left_out=[line for line in notes.warnings if line.startswith(("the page leaves out", "the first "))],
        heads=[_head(column, comparison) for column in shown_columns(comparison)],
        runs=runs,
        sections=sections,
        heat=heat_map(comparison, notes),
        folds=folds_table(comparison, notes),
        curves=legend,
        coloured=len(COLOURS),
        panels=charts,
        opened=count <= MAX_OPEN,
        absent=ABSENT,
        zip=zip,
    )
    return printable_lines(text)


def _panels(curves: Sequence[Curve], tags: Sequence[str]) -> Iterator[dict[str, str]]:
    for tag in tags:
        if any(curve.points[tag] for curve in curves):
            yield {"tag": tag, "chart": chart(curves, tag)}


def _table_rows(
    comparison: Comparison, entries: Mapping[Path, LegendEntry], folder: Path, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Yield the first rows of the table, as many as fit."""
    for index, row in enumerate(comparison.rows):
        cells = [_cell(row, column, folder) for column in shown_columns(comparison)]
        size = sum(2 * _size(cell.text) for cell in cells) + CELL_BYTES * len(cells)
        if budget.take(size):
            run = row.runs[0]
            curve = entries.get(run.path)
            yield {
                "anchor": f"run-{index}",
                "curve": curve,
                "status": run.status,
                "cells": cells,
                "open": False,
            }


def _sections(
    comparison: Comparison, runs: Sequence[dict[str, Any]], folder: Path, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Yield the details of the runs in the table, of as many as fit; their rows link to them."""
    for entry, row in zip(runs, comparison.rows, strict=False):
        section = _section(row, comparison.columns, folder)
        texts = [*section["settings"], *(fact.value for fact in section["facts"]), section["label"]]
        if budget.take(sum(map(_size, texts)) + TEXT_BYTES * len(texts) + SECTION_BYTES):
            entry["open"] = True
            yield {**section, "anchor": entry["anchor"]}


def _size(text: str) -> int:
    """Return the bytes of a text in HTML."""
    return len(escape(printable_lines(text)).encode())


def _head(column: Column, comparison: Comparison) -> Head:
    order = "descending" if comparison.descending else "ascending"
    return Head(
        column.name,
        column.title,
        is_numeric(column, comparison),
        sorted=order if column == comparison.order else None,
        first="descending" if column.higher_is_better else "ascending",
    )


def _section(row: Row, columns: Sequence[Column], folder: Path) -> dict[str, Any]:
    (run,) = row.runs
    settings = (f"{key}={as_override(run.settings[key])}" for key in distinct_keys([run]))
    return {
        "name": os.path.relpath(run.path, folder),
        "label": single_line(row_label(row, columns)),
        "status": run.status,
        "facts": [fact for fact in _facts(run) if fact.value],
        "settings": [setting[:LONGEST_FACT] for setting in settings],
    }


def _cell(row: Row, column: Column, folder: Path) -> Cell:
    text = cell_text(row, column, folder)
    if column.name not in row.cells:
        return Cell(text, column.is_metric)
    value = row.cells[column.name]
    value = value.mean if isinstance(value, Spread | Interval) else value
    if is_number(value):
        return Cell(text, True, None if math.isnan(value) else value, "number")
    return Cell(text, False, text, "text")


def _facts(run: Run) -> Iterator[Fact]:
    """Yield the facts about a run, without its settings. A value may be missing."""
    yield Fact("error", run.error[:LONGEST_FACT], is_code=True)
    yield Fact("command", run.command[:LONGEST_FACT], is_code=True)
    yield Fact("directory", str(run.path))
    yield Fact("resume with", resume_command(run), is_code=True)
    if run.started is not None:
        yield Fact("started", time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(run.started)))
    if run.seconds is not None:
        yield Fact("time", clock(run.seconds))
    if run.step is not None:
        yield Fact("steps", f"{run.step} of {ABSENT if run.total is None else run.total}")
    for column in COSTS:
        value = cost_cells(run).get(column.name)
        yield Fact(column.title, None if value is None else format_metric(value, column))
    for name, accuracy in (("validation", run.best), ("test", run.test)):
        if accuracy is not None:
            yield Fact(name, f"{accuracy:.4f}")
    yield Fact("capsexp", run.version)


def _figures(run: Run, budget: Budget, notes: Notes) -> Iterator[FigureFile]:
    """Yield the figures of a run, as many as fit."""
    for file in sorted(run.path.glob("figures/*.png")):
        try:
            fits = budget.take(os.path.getsize(file) * 4 // 3 + FIGURE_BYTES)
            content = read_regular(file, limit=LARGEST_PAGE) if fits else None
        except OSError:
            content = b""
        if content is None:
            continue
        if not content.startswith(PNG):
            notes.warning(f"{file} is not shown: not a PNG file")
            continue
        width = int.from_bytes(content[16:20])  # a PNG file starts with the chunk that holds its size
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        yield FigureFile(file.stem, source, is_small=width < SMALL_WIDTH)
