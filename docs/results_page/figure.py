"""The figure of docs/results.md: error on validation images against seconds of training."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from capsexp.compare.curves import colour
from capsexp.files import write_atomic
from results_page.groups import Group, groups
from results_page.store import Data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2
"""Panels side by side; one panel takes the whole width."""
TICKS = (1, 2, 3, 5, 7)
"""Numbers on an axis, times powers of ten."""


def panels(data: Data) -> dict[str, list[Group]]:
    """Return the groups that have a curve, by dataset."""
    found: dict[str, list[Group]] = {}
    for group in groups(data):
        if any(run["curve"] for run in group.records):
            found.setdefault(group.first["dataset"], []).append(group)
    return found


def draw(data: Data, file: Path) -> None:
    """Draw a panel for each dataset, with a line for each run; a group of runs has one colour."""
    from matplotlib.figure import Figure

    found = panels(data)
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(7.5, 4.0 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (dataset, same) in zip(places, found.items(), strict=False):
        _draw_panel(axes, dataset, same)
    for axes in places[len(found) :]:
        axes.set_axis_off()
    write_atomic(file, lambda opened: figure.savefig(opened, format="png", dpi=130))


def _draw_panel(axes: "Axes", dataset: str, same: Sequence[Group]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for place, group in enumerate(same):
        label = _label(group, same)
        for run in group.records:
            # An error of 0 has no place on a logarithmic axis.
            points = [(seconds, error) for _, seconds, error in run["curve"] if seconds > 0 and error > 0]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour(place), label=label, linewidth=1.4)
                label = None
    axes.set(xscale="log", yscale="log", title=dataset)
    axes.set(xlabel="seconds of training", ylabel="validation error, %")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=TICKS))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16))


def _label(group: Group, same: Sequence[Group]) -> str:
    """Return the recipe; with the numbers of the runs where another line of the panel has the same one."""
    name = group.first["recipe"]
    if sum(other.first["recipe"] == name for other in same) == 1:
        return name
    return f"{name}, run {', '.join(map(str, group.numbers))}"
