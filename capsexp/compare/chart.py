"""Learning curves as SVG inside an HTML page, which gives them their colours for light and dark."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from capsexp.compare.curves import COLOURS, Curve, Point, colour
from capsexp.compare.markup import Html, element, joined

# Small, so that its letters can still be read where a phone shrinks it.
WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 10, 42


class Axis(NamedTuple):
    """From values to places in the picture."""

    low: int | float
    high: int | float
    start: int | float
    end: int | float

    def place(self, value: int | float) -> float:
        """Where a value lies."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four to nine round values."""
        size = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        size *= max(factor for factor in (1, 2, 2.5, 5) if factor * size <= (self.high - self.low) / 4)
        first, last = math.ceil(self.low / size), math.floor(self.high / size)
        return [float(f"{number * size:.6g}") for number in range(first, last + 1)]


def chart(curves: Sequence[Curve], tag: str) -> Html:
    """One panel: each curve with the band of its standard deviation, and its name for a mouse to find."""
    points = [point for curve in curves for point in curve.points[tag]]
    across = _axis((point.step for point in points), LEFT, WIDTH - RIGHT, margin=0.0)
    values = [point.mean + sign * point.sd for point in points for sign in (-1, 1)]
    up = _axis(values, HEIGHT - BOTTOM, TOP, margin=0.03)
    drawn = [_curve(curve, tag, place, across, up) for place, curve in enumerate(curves)]
    return element(
        "svg",
        *_grid(across, up, tag),
        *reversed(drawn),  # the first lie on top
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{tag} by step, {len(curves)} curves",
    )


def _axis(values: Iterable[float], start: int, end: int, *, margin: float) -> Axis:
    values = list(values)
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    spare = margin * (high - low)
    return Axis(low - spare, high + spare, start, end)


def _grid(across: Axis, up: Axis, tag: str) -> list[Html]:
    base = HEIGHT - BOTTOM
    lines = [
        joined(
            element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_round(y), y2=_round(y)),
            element("text", f"{value:g}", x=LEFT - 7, y=_round(y + 4), text_anchor="end"),
        )
        for value, y in ((value, up.place(value)) for value in up.ticks())
    ]
    lines += [
        element("text", f"{value:g}", x=_round(across.place(value)), y=base + 17, text_anchor="middle")
        for value in across.ticks()
    ]
    title = element("text", "step", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle")
    return [element("g", *lines, title, class_="grid", aria_hidden="true")]


def _curve(curve: Curve, tag: str, place: int, across: Axis, up: Axis) -> Html:
    points = curve.points[tag]
    if not points:
        return Html()
    line = _path([(point.step, point.mean) for point in points], across, up)
    last = points[-1]
    told = f"{place + 1}: {curve.label}; {last.mean:.4g} at step {last.step:.0f}, {len(curve.runs)} run(s)"
    return element(
        "g",
        element("title", told),
        *([element("path", class_="band", d=_band(points, across, up))] if any(p.sd for p in points) else []),
        element("path", class_="line", d=line),
        element("path", class_="reach", d=line),  # wide and unseen: a mouse need not be exact
        class_="curve" if place < len(COLOURS) else "curve other",
        data_curve=place + 1,
        style=f"--curve: {colour(place)}",
    )


def _band(points: Sequence[Point], across: Axis, up: Axis) -> str:
    above = [(point.step, point.mean + point.sd) for point in points]
    below = [(point.step, point.mean - point.sd) for point in reversed(points)]
    return _path(above + below, across, up) + "Z"


def _path(points: Iterable[tuple[float, float]], across: Axis, up: Axis) -> str:
    places = [f"{_round(across.place(x))},{_round(up.place(y))}" for x, y in points]
    # A single point is drawn as a dot by the round cap of a line without length.
    return "M" + "L".join(places if len(places) > 1 else places * 2)


def _round(place: float) -> str:
    return f"{place:.1f}"
