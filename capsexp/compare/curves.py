"""Learning curves: one for each setting, the mean over its seeds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from capsexp.compare import history
from capsexp.compare.comparison import Comparison, Row, compare, spread, told_apart
from capsexp.compare.runs import Run
from capsexp.errors import Notes, nearest
from capsexp.files import write_atomic

TAGS = ("validation/accuracy", "train/loss")
# Told apart in daylight, in the dark and by most of the colour-blind.
COLOURS = ("#2f6fde", "#d9730d", "#1f9d63", "#cf3f5b", "#8250df", "#0f9bb0", "#c2409b", "#8a6a45")
OTHER = "#9aa0a6"
POINTS = 200  # more cannot be told apart


class Point(NamedTuple):
    """Mean over the runs that have a step."""

    step: float
    mean: float
    sd: float
    """0 for a single run."""


@dataclass(frozen=True)
class Curve:
    """The runs of one setting.

    Args:
        label: what sets them apart, `iterations=3`.
        runs: the runs.
        points: by tag.
    """

    label: str
    runs: tuple[Run, ...]
    points: dict[str, list[Point]]


def curves(
    comparison: Comparison, tags: Sequence[str], notes: Notes, *, option: str = "--metric"
) -> list[Curve]:
    """A curve for each row that has any, in the order of the rows."""
    found = [_curve(row, comparison, tags, notes) for row in comparison.rows]
    for tag in tags:
        if found and not any(curve.points[tag] for curve in found):
            known = {known for curve in found for run in curve.runs for known in history.tags(run.path)}
            notes.error(f"{option}: no run has the figure {tag!r}{nearest(tag, known)}")
    return [curve for curve in found if any(curve.points.values())]


def by_setting(comparison: Comparison) -> Comparison:
    """The same runs, each row the mean over its seeds; rows that are means already stay as they are."""
    runs = [run for row in comparison.rows for run in row.runs]
    if comparison.grouped_by or not any("seed" in run.settings for run in runs):
        return comparison
    place = {run.path: number for number, run in enumerate(runs)}
    grouped = compare(runs, Notes(), group_by=["seed"])
    rows = sorted(grouped.rows, key=lambda row: min(place[run.path] for run in row.runs))
    return replace(grouped, rows=rows)


def colour(place: int) -> str:
    """Of the curve at this place: the first have colours of their own, all others the same grey."""
    return COLOURS[place] if place < len(COLOURS) else OTHER


def draw(curves: Sequence[Curve], tags: Sequence[str], file: Path) -> None:
    """A panel for each tag, beneath them the curves' labels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    labels = [curve.label for curve in curves[: len(COLOURS)]]
    if len(curves) > len(COLOURS):
        labels.append(f"{len(curves) - len(COLOURS)} others")
    columns = 1 if max(map(len, labels)) > 40 else 2
    height = 3.8 + 0.24 * math.ceil(len(labels) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(max(5.2 * len(tags), 6.4), height), layout=layout)
    for plot, tag in zip(figure.subplots(1, len(tags), squeeze=False)[0], tags, strict=True):
        for place, curve in reversed(list(enumerate(curves))):  # the first lie on top
            _draw_one(plot, curve.points[tag], colour(place), in_front=place < len(COLOURS))
        plot.set(xlabel="step", ylabel=tag)
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    lines = [Line2D([], [], color=colour(place), label=label) for place, label in enumerate(labels)]
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
    form = file.suffix.removeprefix(".")
    write_atomic(file, lambda opened: figure.savefig(opened, format=form, dpi=130))


def _draw_one(plot: Any, points: Sequence[Point], colour: str, *, in_front: bool) -> None:
    steps, means = [point.step for point in points], [point.mean for point in points]
    marker = "o" if len(points) == 1 else None
    plot.plot(steps, means, color=colour, linewidth=1.6 if in_front else 0.8, marker=marker)
    if in_front and any(point.sd for point in points):
        low, high = ([point.mean + sign * point.sd for point in points] for sign in (-1, 1))
        plot.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _curve(row: Row, comparison: Comparison, tags: Sequence[str], notes: Notes) -> Curve:
    found = [history.series(run.path, tags, notes) for run in row.runs]
    points = {tag: thinned(_means([one[tag] for one in found])) for tag in tags}
    name = f"{len(row.runs)} runs" if len(row.runs) > 1 else row.runs[0].path.name
    return Curve(told_apart(row, comparison.columns) or name, row.runs, points)


def _means(found: Iterable[history.Series]) -> list[Point]:
    """Step by step over the runs that have the step; what is no number is left out."""
    by_step: dict[int, list[float]] = {}
    for one in found:
        for step, value in one.items():
            if math.isfinite(value):
                by_step.setdefault(step, []).append(value)
    spreads = {step: spread(by_step[step]) for step in sorted(by_step)}
    return [Point(float(step), one.mean, one.sd or 0.0) for step, one in spreads.items()]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `POINTS` points, each the mean of neighbours."""
    size = math.ceil(len(points) / POINTS) or 1
    pieces = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        Point(*(math.fsum(values) / len(piece) for values in zip(*piece, strict=True))) for piece in pieces
    ]
