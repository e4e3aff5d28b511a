"""One self-contained page about runs: table, learning curves, and each run with its pictures."""

import base64
import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from capsexp.compare.chart import chart
from capsexp.compare.columns import RUN, STATUS, Column, distinct_keys, text
from capsexp.compare.comparison import Comparison, Row, Spread, told_apart
from capsexp.compare.curves import COLOURS, Curve, by_setting, colour, curves
from capsexp.compare.markup import Html, element, joined
from capsexp.compare.runs import Run, is_number
from capsexp.compare.tables import ABSENT, cell_text, shared_folder
from capsexp.errors import Notes
from capsexp.files import write_atomic
from capsexp.training.progress import clock

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = 400  # pixels, below which a picture is enlarged
FEW = 4  # runs that are shown opened


def write(file: Path, comparison: Comparison, tags: Sequence[str], notes: Notes) -> None:
    """Write the page, whole or not at all.

    Args:
        file: where to.
        comparison: the table; each row a run.
        tags: of metrics.jsonl, whose curves are drawn.
        notes: gets what is wrong with files and tags.
    """
    drawn = curves(by_setting(comparison), tags, notes)
    content = page(comparison, drawn, tags, notes)
    write_atomic(file, lambda opened: opened.write(content.encode()))


def page(comparison: Comparison, drawn: Sequence[Curve], tags: Sequence[str], notes: Notes) -> str:
    """The page as HTML."""
    runs = [row.runs[0] for row in comparison.rows]
    shared = shared_folder(run.path for run in runs)
    curve_of = {run.path: place for place, curve in enumerate(drawn) for run in curve.runs}
    folder = Path.cwd().name if shared == Path() else shared
    now = time.strftime("%Y-%m-%d %H:%M %Z")
    template = Template(Path(__file__).with_name("report.html").read_text())
    return template.substitute(
        title=joined(f"{len(runs)} run{'s' * (len(runs) != 1)} in {folder}"),
        written=joined(f"Written {now} by capsexp {importlib.metadata.version('capsexp')}"),
        table=_table(comparison, shared, curve_of),
        curves=_curves(drawn, tags),
        runs=joined(
            *(_run(place, row, comparison, shared, notes) for place, row in enumerate(comparison.rows))
        ),
    )


def _table(comparison: Comparison, shared: Path, curve_of: Mapping[Path, int]) -> Html:
    heads = [_head(Column("curve", "curve"), None, is_numeric=False)] if curve_of else []
    for column in comparison.columns:
        order = (
            ("descending" if comparison.descending else "ascending") if column == comparison.order else None
        )
        heads.append(_head(column, order, is_numeric=_is_numeric(column, comparison)))
    rows = []
    for number, row in enumerate(comparison.rows):
        place = curve_of.get(row.runs[0].path)
        cells = [_curve_cell(place)] if curve_of else []
        cells += [_cell(row, column, shared, number) for column in comparison.columns]
        rows.append(element("tr", *cells, data_curve=None if place is None else place + 1))
    return element("table", element("thead", element("tr", *heads)), element("tbody", joined(*rows)))


def _head(column: Column, order: str | None, *, is_numeric: bool) -> Html:
    first = "descending" if column.higher_is_better else "ascending"
    button = element("button", column.title, type="button", title=column.name)
    kind = "number" if is_numeric else None
    return element("th", button, scope="col", class_=kind, aria_sort=order, data_first=first)


def _curve_cell(place: int | None) -> Html:
    if place is None:
        return element("td", ABSENT)
    return element("td", _swatch(place, ""), data_value=place + 1, data_kind="number")


def _cell(row: Row, column: Column, shared: Path, number: int) -> Html:
    words = cell_text(row, column, shared)
    if column.name not in row.cells:
        return element("td", words, class_="number" if column.is_figure else None)
    value = row.cells[column.name]
    value = value.mean if isinstance(value, Spread) else value
    shown: str = words
    if column == RUN:
        shown = element("a", words, href=f"#run-{number}")
    elif column == STATUS:
        shown = _status(row.runs[0])
    if is_number(value):
        exact = None if value != value else value  # what is no number is sorted to the end
        return element("td", shown, class_="number", data_value=exact, data_kind="number")
    return element("td", shown, data_value=words, data_kind="text")


def _is_numeric(column: Column, comparison: Comparison) -> bool:
    return column.is_figure or any(is_number(row.cells.get(column.name)) for row in comparison.rows)


def _swatch(place: int, label: str) -> Html:
    words = f"{place + 1} {label}".strip()
    return element("span", words, class_="swatch", style=f"--curve: {colour(place)}")


def _status(run: Run) -> Html:
    return element("span", run.status, class_=f"status {run.status}")


def _curves(drawn: Sequence[Curve], tags: Sequence[str]) -> Html:
    if not drawn:
        return Html()
    panels = [
        element("figure", element("figcaption", tag), chart(drawn, tag), class_="sheet")
        for tag in tags
        if any(curve.points[tag] for curve in drawn)
    ]
    names = [
        element(
            "li", _swatch(place, f"{curve.label} ({len(curve.runs)})"), data_curve=place + 1, tabindex="0"
        )
        for place, curve in enumerate(drawn)
    ]
    told = "Means over the seeds (how many is in brackets), with a band of ± one sample standard deviation."
    if len(drawn) > len(COLOURS):
        told += f" The first {len(COLOURS)} are in colour; a name or a row lights up any other."
    return element(
        "section",
        element("h2", "Learning curves"),
        element("p", told, class_="soft"),
        element("div", *panels, class_="panels"),
        element("ol", *names, class_="legend"),
    )


def _run(number: int, row: Row, comparison: Comparison, shared: Path, notes: Notes) -> Html:
    (run,) = row.runs
    name = element("strong", os.path.relpath(run.path, shared))
    told = element("span", told_apart(row, comparison.columns), class_="soft")
    about = element(
        "div", _facts(run), _settings(run), _pictures(run, notes), class_="about", id=f"run-{number}"
    )
    is_open = "" if len(comparison.rows) <= FEW else None
    return element(
        "details", element("summary", name, told, _status(run)), about, class_="run sheet", open=is_open
    )


def _facts(run: Run) -> Html:
    """What the run's files say, without its settings."""
    started = None if run.started is None else time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(run.started))
    figures = {"validation": run.best, "test": run.test}
    facts: dict[str, Any] = {
        "error": run.error and element("pre", run.error),
        "command": run.command and element("pre", run.command),
        "directory": str(run.path),
        "started": started,
        "time": None if run.seconds is None else clock(run.seconds),
        "steps": None if run.step is None else f"{run.step} of {ABSENT if run.total is None else run.total}",
        **{name: None if value is None else f"{value:.4f}" for name, value in figures.items()},
        "capsexp": run.version,
    }
    pairs = (element("dt", name) + element("dd", value) for name, value in facts.items() if value)
    return element("dl", *map(Html, pairs))


def _settings(run: Run) -> Html:
    lines = [
        element("li", element("code", f"{key}={text(run.settings[key])}")) for key in distinct_keys([run])
    ]
    if not lines:
        return element("p", "The settings cannot be read.", class_="soft")
    summary = element("summary", f"{len(lines)} settings")
    return element("details", summary, element("ul", *lines, class_="settings"))


def _pictures(run: Run, notes: Notes) -> Html:
    return element(
        "div", *(_picture(file, notes) for file in sorted(run.path.glob("figures/*.png"))), class_="pictures"
    )


def _picture(file: Path, notes: Notes) -> Html:
    try:
        content = file.read_bytes()
    except OSError as error:
        content = str(error).encode()
    if not content.startswith(PNG):
        notes.warning(f"{file} cannot be shown: it is no PNG file")
        return Html()
    width = int.from_bytes(content[16:20])  # the first chunk of a PNG file begins with it
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    size = "small" if width < SMALL else None
    return element(
        "figure", element("img", src=source, alt=file.stem, class_=size), element("figcaption", file.stem)
    )
