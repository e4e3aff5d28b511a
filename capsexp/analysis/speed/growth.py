"""`capsexp bench growth=FILE`: how time and memory of a step grow, fused and reference, as a figure."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capsexp.analysis.speed.bench import NETWORK, processor, variants_of
from capsexp.analysis.speed.measure import in_process
from capsexp.analysis.speed.variants import changed
from capsexp.errors import UserError
from capsexp.outputs import require_figure_file, write_output
from capsexp.terminal import Table, new_console

BATCHES = (8, 16, 32, 64, 128)
ITERATIONS = (1, 2, 3, 4, 5)
FACTORS = (0.5, 1.0, 1.5, 2.0)
"""Of the numbers of capsule types, and of the height and width of the images."""

Config = dict[str, Any]
Point = tuple[int | float, Config]
Measurements = Mapping[str, Mapping[str, Any]]
"""`seconds` and `bytes`, by network."""


def growth(config: Config, file: Path, *, plugins: Sequence[str]) -> None:
    """Measure one setting after the other, print a table and draw it.

    Args:
        config: the plain config.
        file: the figure to write, PNG or another format of matplotlib.
        plugins: see `capsexp.config.build.build_components`.

    Raises:
        UserError: a routing without another implementation; a file of unknown format.
    """
    names = list(variants_of(config, routed=False, compiled=False))
    if len(names) < 2:
        raise UserError("growth: this routing has one implementation only, so there is nothing to compare")
    require_figure_file(file, option="growth")
    console = new_console(soft_wrap=True)
    table = Table("axis", "value", *(f"{name}, {unit}" for name in names for unit in ("s/step", "MiB")))
    measured: dict[str, list[tuple[int | float, Measurements]]] = {}
    for axis, points in axes(config).items():
        for value, grown in points:
            measurements = {
                name: in_process("peak", {name: variant}, plugins=plugins)
                for name, variant in variants_of(grown, routed=False, compiled=False).items()
            }
            measured.setdefault(axis, []).append((value, measurements))
            table.add_row(axis, f"{value:g}", *_cells(measurements))
    console.print(table)
    draw(measured, names, file)
    console.print(
        f"{processor()}; time: best of three steps; memory: peak above the idle process; figure: {file}"
    )


def _cells(measurements: Measurements) -> list[str]:
    cells = []
    for measurement in measurements.values():
        cells += [f"{measurement['seconds']:.3f}", f"{measurement['bytes'] / 2**20:.0f}"]
    return cells


def axes(config: Config) -> dict[str, list[Point]]:
    """Return what grows, and for each the values and their configs."""
    model, dataset = config["model"], config["dataset"]
    side = "crop" if dataset["preprocess"]["crop"] else "resize"
    types = [key for key in ("primary_types", "conv_types") if key in model]
    points: dict[str, list[Point]] = {
        "batch": [(size, changed(config, "trainer", batch_size=size)) for size in BATCHES],
        "iterations": [(count, changed(config, "routing", iterations=count)) for count in ITERATIONS],
        "capsule types, relative": [
            (factor, changed(config, "model", **{key: _times(model[key], factor) for key in types}))
            for factor in FACTORS
        ],
    }
    if (size := dataset["preprocess"][side]) is not None:
        points["image side, pixels"] = [
            (new, _with_side(config, side, new)) for new in (int(size * factor) for factor in FACTORS)
        ]
    return points


def draw(
    measured: Mapping[str, Sequence[tuple[int | float, Measurements]]],
    names: Sequence[str],
    file: Path,
) -> None:
    """Draw time above memory on logarithmic scales, one column per axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(measured), 5.6), layout="constrained")
    plots = figure.subplots(2, len(measured), squeeze=False, sharex="col", sharey="row")
    for column, (axis, points) in enumerate(measured.items()):
        values = [value for value, _ in points]
        for name in names:
            style = {"marker": "o", "label": "fused" if name == NETWORK else name}
            plots[0][column].plot(values, [by_name[name]["seconds"] for _, by_name in points], **style)
            plots[1][column].plot(values, [by_name[name]["bytes"] / 2**20 for _, by_name in points], **style)
        plots[1][column].set_xlabel(axis)
        for row in range(2):
            plots[row][column].set_yscale("log")
            plots[row][column].grid(alpha=0.3, which="both")
    plots[0][0].set_ylabel("seconds per training step")
    plots[1][0].set_ylabel("peak memory, MiB")
    plots[0][0].legend()
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix.removeprefix("."), dpi=110)
    write_output(file, content.getvalue())


def _with_side(config: Config, key: str, size: int) -> Config:
    preprocess = {**config["dataset"]["preprocess"], key: size}
    if key == "crop" and preprocess["resize"] is not None:
        preprocess["resize"] = max(size, preprocess["resize"])
    return changed(config, "dataset", preprocess=preprocess)


def _times(count: int | list[int], factor: float) -> int | list[int]:
    if isinstance(count, list):
        return [max(1, int(number * factor)) for number in count]
    return max(1, int(count * factor))
