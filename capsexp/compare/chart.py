"""Learning curves as SVG for an HTML page. The page's style sheet sets the colours for light and dark."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from capsexp.compare.curves import COLOURS, Curve, Point, colour
from capsexp.compare.templates import render

# Small, so that the labels stay readable when a phone shrinks the chart.
WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 10, 42


class Axis(NamedTuple):
    """A linear map from values to coordinates."""

    low: int | float
    high: int | float
    start: int | float
    end: int | float

    def position(self, value: int | float) -> float:
        """Return the coordinate of a value."""
        fraction = (value - self.low) / (self.high - self.low)
        return self.start + fraction * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return four to ten round values."""
        size = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        size *= max(factor for factor in (1, 2, 2.5, 5) if factor * size <= (self.high - self.low) / 4)
        first, last = math.ceil(self.low / size), math.floor(self.high / size)
        return [float(f"{number * size:.6g}") for number in range(first, last + 1)]


class Tick(NamedTuple):
    """A labelled value on an axis."""

    label: str
    position: float


class SvgCurve(NamedTuple):
    """A curve as chart.svg draws it."""

    number: int
    """From 1, as in the legend."""
    colour: str
    is_other: bool
    """Whether the curve is beyond those with their own colors."""
    title: str
    line: str
    """SVG path of the means."""
    band: str | None
    """SVG path of mean ± standard deviation; None without a spread."""


def chart(curves: Sequence[Curve], tag: str) -> str:
    """Draw one panel: each curve with the band of its standard deviation, and a title on hover."""
    points = [point for curve in curves for point in curve.points[tag]]
    x_axis = _axis((point.x for point in points), LEFT, WIDTH - RIGHT, margin=0.0)
    values = [point.mean + sign * point.sd for point in points for sign in (-1, 1)]
    y_axis = _axis(values, HEIGHT - BOTTOM, TOP, margin=0.03)
    drawn = [
        _svg_curve(index, curve, tag, x_axis, y_axis)
        for index, curve in enumerate(curves)
        if curve.points[tag]
    ]
    return render(
        "chart.svg",
        tag=tag,
        count=len(curves),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=HEIGHT - BOTTOM,
        x_ticks=_ticks(x_axis),
        y_ticks=_ticks(y_axis),
        curves=reversed(drawn),  # the first curve is drawn on top
    )


def _axis(values: Iterable[float], start: int, end: int, *, margin: float) -> Axis:
    values = list(values)
    low, high = min(values), max(values)
    magnitude = max(abs(low), abs(high))
    if high - low <= 1e-12 * magnitude + 1e-300:  # no ticks fit between them
        half = max(0.5, magnitude / 1000)
        low, high = low - half, high + half
    padding = margin * (high - low)
    return Axis(low - padding, high + padding, start, end)


def _ticks(axis: Axis) -> list[Tick]:
    return [Tick(f"{value:g}", axis.position(value)) for value in axis.ticks()]


def _svg_curve(index: int, curve: Curve, tag: str, x_axis: Axis, y_axis: Axis) -> SvgCurve:
    points = curve.points[tag]
    last = points[-1]
    value = f"{last.mean:.4g} at step {last.x:.0f}, {len(curve.runs)} run(s)"
    return SvgCurve(
        number=index + 1,
        colour=colour(index),
        is_other=index >= len(COLOURS),
        title=f"{index + 1}: {curve.label}; {value}",
        line=_svg_path([(point.x, point.mean) for point in points], x_axis, y_axis),
        band=_band(points, x_axis, y_axis) if any(point.sd for point in points) else None,
    )


def _band(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    above = [(point.x, point.mean + point.sd) for point in points]
    below = [(point.x, point.mean - point.sd) for point in reversed(points)]
    return _svg_path(above + below, x_axis, y_axis) + "Z"


def _svg_path(points: Iterable[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    pairs = [f"{x_axis.position(x):.1f},{y_axis.position(y):.1f}" for x, y in points]
    # A line of length zero with round caps draws a single point as a dot.
    return "M" + "L".join(pairs if len(pairs) > 1 else pairs * 2)
