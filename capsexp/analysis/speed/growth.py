"""`capsexp bench growth=FILE`: how time and memory of a step grow, fused beside plain, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from capsexp.analysis.speed.bench import NETWORK, processor, variants_of
from capsexp.analysis.speed.measure import changed, in_process
from capsexp.errors import UserError
from capsexp.files import require_figure_file

BATCHES = (8, 16, 32, 64, 128)
ITERATIONS = (1, 2, 3, 4, 5)
FACTORS = (0.5, 1.0, 1.5, 2.0)
"""Of the numbers of capsule types, and of the side of the pictures."""

Config = dict[str, Any]
Point = tuple[int | float, Config]


def growth(config: Config, file: Path, *, plugins: Sequence[str]) -> None:
    """Measure one setting after the other, print the figures and draw them.

    Args:
        config: the plain config.
        file: the picture, PNG or another format of matplotlib's.
        plugins: as for `components`.
    Raises: UserError: a routing without another implementation; a file of no known format.
    """
    if len(names := list(variants_of(config, routed=False, compiled=False))) < 2:
        raise UserError("growth: this routing has one implementation only, so there is nothing to compare")
    require_figure_file(file, option="growth")
    console = Console(soft_wrap=True)
    table = Table("along", "value", *(f"{name}, {what}" for name in names for what in ("s/step", "MiB")))
    measured: dict[str, list[tuple[int | float, dict[str, Any]]]] = {}
    for axis, points in axes(config).items():
        for value, grown in points:
            variants = variants_of(grown, routed=False, compiled=False)
            figures = {
                name: in_process("peak", {name: one}, plugins=plugins) for name, one in variants.items()
            }
            measured.setdefault(axis, []).append((value, figures))
            cells = [
                text
                for name in names
                for text in (f"{figures[name]['seconds']:.3f}", f"{figures[name]['bytes'] / 2**20:.0f}")
            ]
            table.add_row(axis, f"{value:g}", *cells)
    console.print(table)
    draw(measured, names, file)
    console.print(f"{processor()}; best of three steps, peak memory over the idle process; drawn in {file}")


def axes(config: Config) -> dict[str, list[Point]]:
    """What grows, and the configs along it."""
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
        points["side of a picture, pixels"] = [
            (new, _with_side(config, side, new)) for new in (int(size * factor) for factor in FACTORS)
        ]
    return points


def draw(
    measured: Mapping[str, Sequence[tuple[int | float, Mapping[str, Any]]]],
    names: Sequence[str],
    file: Path,
) -> None:
    """Time above memory, one column for each thing that grows; both on logarithmic scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(measured), 5.6), layout="constrained")
    plots = figure.subplots(2, len(measured), squeeze=False, sharex="col", sharey="row")
    for column, (axis, points) in enumerate(measured.items()):
        values = [value for value, _ in points]
        for name in names:
            style = {"marker": "o", "label": "fused" if name == NETWORK else name}
            plots[0][column].plot(values, [figures[name]["seconds"] for _, figures in points], **style)
            plots[1][column].plot(values, [figures[name]["bytes"] / 2**20 for _, figures in points], **style)
        plots[1][column].set_xlabel(axis)
        for row in range(2):
            plots[row][column].set_yscale("log")
            plots[row][column].grid(alpha=0.3, which="both")
    plots[0][0].set_ylabel("seconds per training step")
    plots[1][0].set_ylabel("peak memory, MiB")
    plots[0][0].legend()
    figure.savefig(file, dpi=110)


def _with_side(config: Config, key: str, size: int) -> Config:
    preprocess = {**config["dataset"]["preprocess"], key: size}
    if key == "crop" and preprocess["resize"] is not None:
        preprocess["resize"] = max(size, preprocess["resize"])
    return changed(config, "dataset", preprocess=preprocess)


def _times(count: int | list[int], factor: float) -> int | list[int]:
    return (
        [max(1, int(one * factor)) for one in count]
        if isinstance(count, list)
        else max(1, int(count * factor))
    )
