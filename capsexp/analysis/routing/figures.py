"""Figures of `study=routing`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from capsexp.analysis.findings import displayable
from capsexp.ops.receptive_fields import Grid

LOGITS_OF_THE_PAPER = {2: 0.007, 5: 1e-5}
"""Mean |change of a logit| by pass: Sabour et al. 2017, figure A.1, after 500 epochs of MNIST."""


class Shown(NamedTuple):
    """A picture, and what the class capsules do with it in each of their T iterations."""

    number: int
    label: int
    prediction: int
    picture: Float[Tensor, "C H W"]
    distances: Float[Tensor, "T I J"]
    coupling: Float[Tensor, "T I J"]
    excess: Float[Tensor, "T P J"]
    """See `capsexp.analysis.routing.trace.excess`."""


def histograms(one: Shown, classes: Sequence[str], *, bins: int, near: float, squared: bool) -> Any:
    """Rows of iterations; on the left all distances, on the right the small ones."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    rows = len(one.distances)
    figure = Figure(figsize=(15, 1.5 * rows + 1.2), layout="constrained")
    plots = figure.subplots(rows, 2, squeeze=False, sharex="col", sharey="col")
    for column, reach in enumerate((one.distances.max().item(), near)):
        tops = []
        for row, plot in enumerate(plots[:, column]):
            highest = _side_by_side(plot, one.distances[row], one.coupling[row], reach, bins)
            tops.append(highest)
            plot.set_ylabel(f"iteration {row + 1}")
            plot.set_xticks([place + 0.5 for place in range(len(classes))], classes, fontsize=8)
            if not highest:
                plot.text(0.5, 0.5, f"no vote is nearer than {reach}", transform=plot.transAxes, ha="center")
        if column == 0:
            plot.set_yscale("log")
            plot.yaxis.set_minor_formatter(NullFormatter())
        plot.set_ylim(0 if column else 0.1, 1.5 * max(*tops, 1))
        plot.set_xlabel(f"class capsule; in each, from left to right, 0 … {reach:.3g}")
    kind = "squared distance" if squared else "distance"
    figure.suptitle(
        f"test picture {_named(one, classes)}: {kind} of the votes from each class's mean, by assignment"
    )
    return figure


def _side_by_side(
    plot: Any, distances: Float[Tensor, "I J"], weights: Float[Tensor, "I J"], reach: float, bins: int
) -> float:
    """The histograms of all classes in one plot: many plots would take matplotlib long. The highest bar."""
    edges = torch.linspace(0, reach, bins + 1)
    highest = 0.0
    for place, (far, weight) in enumerate(zip(distances.T, weights.T, strict=True)):
        counts, _ = torch.histogram(far.float().contiguous(), edges, weight=weight.float().contiguous())
        across = place + 0.05 + 0.9 * edges / reach
        plot.stairs(counts.numpy(), across.numpy(), fill=True, color=f"C{place % 10}")
        plot.axvline(place, color="0.8", linewidth=0.5)
        highest = max(highest, counts.max().item())
    return highest


def parents(one: Shown, grid: Grid, classes: Sequence[str]) -> Any:
    """Rows of iterations, columns of classes: red where a class gets more than an even share, blue less."""
    from matplotlib.figure import Figure

    rows, _, columns = one.excess.shape
    figure = Figure(figsize=(1.3 * columns + 1, 1.3 * rows + 1), layout="constrained")
    plot = figure.add_subplot()
    reach = one.excess.abs().max().item() or 1.0
    # Two images in all: matplotlib would take long over one for each cell.
    cells = _on_the_picture(one.excess, grid, one.picture).flatten(0, 1)
    picture = F.pad(one.picture, [grid.step] * 4, value=0.5).expand(rows * columns, -1, -1, -1)
    down, across = picture.shape[2:]
    sheet = {"nrow": columns, "padding": 0}
    extent = (0, columns * across, rows * down, 0)
    plot.imshow(displayable(make_grid(picture, **sheet)), cmap="gray", vmin=0, vmax=1, extent=extent)
    values = make_grid(cells.unsqueeze(1), **sheet)[0]
    # Where nothing is gained or lost, the picture shows.
    alpha = 0.8 * (values.abs() / reach).sqrt()
    shown = plot.imshow(
        values.numpy(), cmap="bwr", vmin=-reach, vmax=reach, extent=extent, alpha=alpha.numpy()
    )
    plot.set(xlabel="class capsule", ylabel="iteration")
    plot.set_xticks([(column + 0.5) * across for column in range(columns)], classes, fontsize=8)
    plot.set_yticks([(row + 0.5) * down for row in range(rows)], [str(row + 1) for row in range(rows)])
    plot.tick_params(length=0)
    figure.suptitle(
        f"test picture {_named(one, classes)}: what each class gets\n"
        "of the active children in a place, beyond an even share",
        fontsize=10,
    )
    figure.colorbar(shown, ax=plot, shrink=0.8)
    return figure


def _on_the_picture(
    excess: Float[Tensor, "T P J"], grid: Grid, picture: Float[Tensor, "C H W"]
) -> Float[Tensor, "T J h w"]:
    """Each place about the centre of what it sees and as wide as the way to the next one, in half pixels.

    Centres lie on pixels or between two. The picture has a margin of one such way on every side.
    """
    values = excess.transpose(1, 2).unflatten(2, (grid.rows, grid.columns)).float()
    values = values.repeat_interleave(2 * grid.step, 2).repeat_interleave(2 * grid.step, 3)
    canvas = values.new_zeros(*values.shape[:2], *(2 * (side + 2 * grid.step) for side in picture.shape[1:]))
    top, left = (round(2 * first + 1 + grid.step) for first in grid.first)
    canvas[:, :, top : top + values.shape[2], left : left + values.shape[3]] = values
    return canvas


def entropies(told: Mapping[str, Mapping[str, Any]]) -> Any:
    """A line for each layer, by iteration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    plot = figure.add_subplot()
    for name, one in told.items():
        iterations, own = range(1, len(one["entropy"]) + 1), one["iterations"]
        (line,) = plot.plot(iterations, one["entropy"], ".-", label=name)
        plot.plot(own, one["entropy"][own - 1], "o", markersize=9, color=line.get_color())
    plot.set(xlabel="iteration (large: the last one of the network)", ylabel="entropy / its maximum")
    plot.set_ylim(0, 1.05)
    plot.set_xticks(range(1, max(len(one["entropy"]) for one in told.values()) + 1))
    plot.legend()
    plot.set_title("coupling of a child, over its parents")
    return figure


def changes(told: Mapping[str, Mapping[str, Any]]) -> Any:
    """How much the couplings, and the logits of a routing by agreement, change in each iteration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    plot = figure.add_subplot()
    labels = {
        "coupling_change": "|change of the coupling|",
        "logit_change": "|added to the logit|",
        "agreement_change": "|added, less what was added before|",
    }
    for name, one in told.items():
        for key, label in labels.items():
            if one.get(key):
                plot.plot(range(2, len(one[key]) + 2), one[key], ".-", label=f"{name}: {label}")
    if any("logit_change" in one for one in told.values()):
        passes, values = zip(*LOGITS_OF_THE_PAPER.items(), strict=True)
        plot.plot(passes, values, "kx", markersize=9, label="Sabour et al. 2017, figure A.1")
    plot.set_yscale("log")
    plot.set_xticks(range(2, max(len(one["entropy"]) for one in told.values()) + 1))
    plot.set(xlabel="iteration", ylabel="mean over children, parents and pictures")
    if plot.has_data():
        plot.legend(fontsize=8)
    return figure


def _named(one: Shown, classes: Sequence[str]) -> str:
    wrong = "" if one.label == one.prediction else f", taken for {classes[one.prediction]}"
    return f"{one.number}, {classes[one.label]}{wrong}"
