"""Learning curves: one for each setting, averaged over its seeds."""

import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from capsexp.compare import history
from capsexp.compare.comparison import Comparison, compare, row_label
from capsexp.compare.layout import single_line
from capsexp.compare.means import Row, spread
from capsexp.compare.runs import Run
from capsexp.errors import Notes
from capsexp.outputs import write_output
from capsexp.text import show_as_typed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TAGS = ("validation/accuracy", "train/loss")
TIME_TAGS = ("validation/error", "train/error")
"""Errors in %, 100 minus the accuracy of the same name."""
XAxis = Literal["step", "seconds"]
X_LABELS = {"step": "step", "seconds": "seconds of training"}
# Distinct on light and dark backgrounds, and for most color-blind readers.
COLOURS = ("#2f6fde", "#d9730d", "#1f9d63", "#cf3f5b", "#8250df", "#0f9bb0", "#c2409b", "#8a6a45")
OTHER_COLOUR = "#9aa0a6"
MAX_POINTS = 200  # a panel cannot show more
MAX_LINES = 120  # in all panels together
MIN_CURVES = 8  # however many panels there are
MAX_RUNS = 100  # that one curve is the mean of
LARGEST = 1e100
"""Values beyond it are left out, like those that are not finite: a panel cannot show them."""


class Point(NamedTuple):
    """Mean over the runs that have a value at a step."""

    x: float
    """Step, or seconds of training."""
    mean: float
    sd: float
    """0 for a single run."""


@dataclass(frozen=True)
class Curve:
    """The learning curves of one setting.

    Args:
        label: the differing settings, `iterations=3`.
        runs: the runs that are averaged.
        points: by tag.
    """

    label: str
    runs: tuple[Run, ...]
    points: dict[str, list[Point]]


def learning_curves(
    comparison: Comparison,
    tags: Sequence[str],
    notes: Notes,
    *,
    option: str = "--metric",
    x_axis: XAxis = "step",
) -> list[Curve]:
    """Return a curve for each of the first rows that have values, in the order of the rows.

    Args:
        comparison: the rows.
        tags: of metrics.jsonl.
        notes: collects unknown tags and warnings about files.
        option: the command-line option that names the tags, for messages.
        x_axis: `step`, or `seconds` of training; runs without timing.jsonl then have no points.
    """
    rows = [row for row in comparison.rows if any(map(_has_metrics, row.runs))]
    drawn = rows[: max(MIN_CURVES, MAX_LINES // max(1, len(tags)))]
    if len(drawn) < len(rows):
        notes.warning(f"the first {len(drawn)} of {len(rows)} curves are drawn, in the order of the table")
    curves = [_learning_curve(row, comparison, tags, notes, x_axis) for row in drawn]
    for tag in tags:
        if curves and not any(curve.points[tag] for curve in curves):
            runs = [run for curve in curves for run in curve.runs]
            message = history.unknown_tag(tag, runs)
            if tuple(tags) in (TAGS, TIME_TAGS):  # the user has not typed them
                notes.warning(message)
            else:
                notes.error(f"{option}: {message}")
    return [curve for curve in curves if any(curve.points.values())]


def mean_over_seeds(comparison: Comparison, notes: Notes) -> Comparison:
    """Average the rows over their seeds, in the same order; runs that enter no mean get their own rows.

    Args:
        comparison: the table; one with means stays averaged over what it is.
        notes: collects the runs that are left out because they repeat a seed.
    """
    runs = [run for row in comparison.rows for run in row.runs]
    if not comparison.grouped_by:
        if not any("seed" in run.settings for run in runs):
            return comparison
        position = {run.path: index for index, run in enumerate(runs)}
        comparison = compare(runs, notes, group_by=["seed"])
        rows = sorted(comparison.rows, key=lambda row: min(position[run.path] for run in row.runs))
        comparison = replace(comparison, rows=rows)
    return replace(comparison, rows=[part for row in comparison.rows for part in _divided(row)])


def _divided(row: Row) -> list[Row]:
    """Divide a row into the finished runs, whose curves are averaged, and each of the others."""
    if len(row.runs) == 1:
        return [row]
    unfinished = [replace(row, runs=(run,), counted=()) for run in row.runs if run.status != "finished"]
    return [replace(row, runs=row.counted), *unfinished] if row.counted else unfinished


def colour(index: int) -> str:
    """Return the color of a curve: the first few have their own, all others share a gray."""
    return COLOURS[index] if index < len(COLOURS) else OTHER_COLOUR


def draw(curves: Sequence[Curve], tags: Sequence[str], file: Path, *, x_axis: XAxis = "step") -> None:
    """Write a figure with a panel for each tag, and the labels of the curves below."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    # matplotlib leaves labels that begin with an underscore out of a legend.
    labels = [f" {single_line(curve.label)}" for curve in curves[: len(COLOURS)]]
    if len(curves) > len(COLOURS):
        labels.append(f"{len(curves) - len(COLOURS)} others")
    columns = 1 if max(map(len, labels)) > 40 else 2
    height = 3.8 + 0.24 * math.ceil(len(labels) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(max(5.2 * len(tags), 6.4), height), layout=layout)
    for axes, tag in zip(figure.subplots(1, len(tags), squeeze=False)[0], tags, strict=True):
        for index, curve in reversed(list(enumerate(curves))):  # the first curve is drawn on top
            _draw_curve(axes, curve.points[tag], colour(index), is_other=index >= len(COLOURS))
        axes.set(xlabel=X_LABELS[x_axis], ylabel=f"{tag}, %" if tag.endswith("/error") else tag)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    lines = [Line2D([], [], color=colour(index), label=label) for index, label in enumerate(labels)]
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
    show_as_typed(figure)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks some scripts
        figure.savefig(content, format=file.suffix.removeprefix("."), dpi=130)
    write_output(file, content.getvalue())


def _draw_curve(axes: "Axes", points: Sequence[Point], colour: str, *, is_other: bool) -> None:
    steps, means = [point.x for point in points], [point.mean for point in points]
    marker = "o" if len(points) == 1 else None
    axes.plot(steps, means, color=colour, linewidth=0.8 if is_other else 1.6, marker=marker)
    if not is_other and any(point.sd for point in points):
        low, high = ([point.mean + sign * point.sd for point in points] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _learning_curve(
    row: Row, comparison: Comparison, tags: Sequence[str], notes: Notes, x_axis: XAxis
) -> Curve:
    if len(row.runs) > MAX_RUNS:
        notes.warning(f"a curve is the mean of at most {MAX_RUNS} runs; one setting has {len(row.runs)}")
        row = replace(row, runs=row.runs[:MAX_RUNS])
    values = [history.all_values(run.path, tags, notes) for run in row.runs]
    clocks = [history.seconds_by_step(run.path, notes) for run in row.runs] if x_axis == "seconds" else None
    points = {tag: downsample(_means([series[tag] for series in values], clocks)) for tag in tags}
    return Curve(_label(row, comparison), row.runs, points)


def _has_metrics(run: Run) -> bool:
    try:
        return os.path.getsize(run.path / "metrics.jsonl") > 0
    except OSError:
        return False


def _label(row: Row, comparison: Comparison) -> str:
    name = row.runs[0].path.name
    label = row_label(row, comparison.columns) or (f"{len(row.runs)} runs" if len(row.runs) > 1 else name)
    if comparison.grouped_by and not row.counted:
        label += f", {row.runs[0].status}" + f" ({name})" * (name not in label)
    return label


def _means(
    all_series: Sequence[history.Series], clocks: Sequence[history.Series] | None = None
) -> list[Point]:
    """Average step by step over the runs that have the step. Values that cannot be drawn are left out.

    Args:
        all_series: values by step of each run.
        clocks: seconds by step of each run; None to place the points at their steps.
    """
    by_step: dict[int, list[tuple[float, float]]] = {}
    for number, series in enumerate(all_series):
        for step, value in series.items():
            x = step if clocks is None else history.seconds_at(step, clocks[number])
            if abs(value) < LARGEST and x is not None:  # not for NaN
                by_step.setdefault(step, []).append((float(x), value))
    points = []
    for step in sorted(by_step):
        places, values = zip(*by_step[step], strict=True)
        mean = spread(values)
        points.append(Point(spread(places).mean, mean.mean, mean.sd or 0.0))
    return points


def downsample(points: Sequence[Point]) -> list[Point]:
    """Return at most `MAX_POINTS` points, each the mean of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        Point(*(math.fsum(values) / len(chunk) for values in zip(*chunk, strict=True))) for chunk in chunks
    ]
