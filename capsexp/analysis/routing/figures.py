"""Figures of `study=routing`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from capsexp.analysis.findings import as_matplotlib
from capsexp.ops.receptive_fields import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOGITS_OF_THE_PAPER = {2: 0.007, 5: 1e-5}
"""Mean |change of a logit| by iteration: Sabour et al. 2017, figure A.1, after 500 epochs of MNIST."""


class Example(NamedTuple):
    """An image, and its routing to the class capsules in each of T iterations."""

    number: int
    label: int
    prediction: int
    image: Float[Tensor, "C H W"]
    distances: Float[Tensor, "T I J"]
    coupling: Float[Tensor, "T I J"]
    excess: Float[Tensor, "T P J"]
    """See `capsexp.analysis.routing.trace.excess`."""


def histograms(
    example: Example, classes: Sequence[str], *, bins: int, near: float, squared: bool
) -> "Figure":
    """Return histograms of vote distances in rows of iterations; on the right the small ones only."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    rows = len(example.distances)
    figure = Figure(figsize=(15, 1.5 * rows + 1.2), layout="constrained")
    plots = figure.subplots(rows, 2, squeeze=False, sharex="col", sharey="col")
    for column, reach in enumerate((example.distances.max().item(), near)):
        tops = []
        for row, plot in enumerate(plots[:, column]):
            highest = _class_histograms(plot, example.distances[row], example.coupling[row], reach, bins)
            tops.append(highest)
            plot.set_ylabel(f"iteration {row + 1}")
            plot.set_xticks([place + 0.5 for place in range(len(classes))], classes, fontsize=8)
            if not highest:
                plot.text(0.5, 0.5, f"no distance below {reach}", transform=plot.transAxes, ha="center")
        if column == 0:
            plot.set_yscale("log")
            plot.yaxis.set_minor_formatter(NullFormatter())
        plot.set_ylim(0 if column else 0.1, 1.5 * max(*tops, 1))
        plot.set_xlabel(f"class capsule; for each, distances from 0 to {reach:.3g}")
    kind = "squared distance" if squared else "distance"
    figure.suptitle(
        f"test image {_title(example, classes)}: {kind} of the votes from each class's mean, by coupling"
    )
    return figure


def _class_histograms(
    plot: "Axes", distances: Float[Tensor, "I J"], weights: Float[Tensor, "I J"], reach: float, bins: int
) -> float:
    """Draw the histograms of all classes in one plot, which is faster than many. Return the highest bar."""
    edges = torch.linspace(0, reach, bins + 1)
    highest = 0.0
    for place, (distance, weight) in enumerate(zip(distances.T, weights.T, strict=True)):
        counts, _ = torch.histogram(distance.float().contiguous(), edges, weight=weight.float().contiguous())
        across = place + 0.05 + 0.9 * edges / reach
        plot.stairs(counts.numpy(), across.numpy(), fill=True, color=f"C{place % 10}")
        plot.axvline(place, color="0.8", linewidth=0.5)
        highest = max(highest, counts.max().item())
    return highest


def parents(example: Example, grid: Grid, classes: Sequence[str]) -> "Figure":
    """Return maps of `excess` in rows of iterations and columns of classes, drawn over the image.

    Red: a class gets more than an even share of the children at a position. Blue: less.
    """
    from matplotlib.figure import Figure

    rows, _, columns = example.excess.shape
    figure = Figure(figsize=(1.3 * columns + 1, 1.3 * rows + 1), layout="constrained")
    plot = figure.add_subplot()
    # Two large images: matplotlib would be slow with one for each cell.
    padded = F.pad(example.image, [grid.step] * 4, value=0.5)
    height, width = padded.shape[1:]
    extent = (0, columns * width, rows * height, 0)
    images = _sheet(padded.expand(rows * columns, -1, -1, -1), columns)
    plot.imshow(as_matplotlib(images), cmap="gray", vmin=0, vmax=1, extent=extent)
    values = _sheet(_excess_maps(example.excess, grid, example.image).flatten(0, 1).unsqueeze(1), columns)[0]
    largest = example.excess.abs().max().item() or 1.0
    alpha = 0.8 * (values.abs() / largest).sqrt()  # transparent at an even share
    overlay = plot.imshow(
        values.numpy(), cmap="bwr", vmin=-largest, vmax=largest, extent=extent, alpha=alpha.numpy()
    )
    plot.set(xlabel="class capsule", ylabel="iteration")
    plot.set_xticks([(column + 0.5) * width for column in range(columns)], classes, fontsize=8)
    plot.set_yticks([(row + 0.5) * height for row in range(rows)], [str(row + 1) for row in range(rows)])
    plot.tick_params(length=0)
    figure.suptitle(
        f"test image {_title(example, classes)}: each class's share\n"
        "of the active children at a position, minus an even share",
        fontsize=10,
    )
    figure.colorbar(overlay, ax=plot, shrink=0.8)
    return figure


def _sheet(images: Float[Tensor, "N C H W"], columns: int) -> Float[Tensor, "D h w"]:
    return make_grid(images, nrow=columns, padding=0)


def _excess_maps(
    excess: Float[Tensor, "T P J"], grid: Grid, image: Float[Tensor, "C H W"]
) -> Float[Tensor, "T J h w"]:
    """Draw each position as a square of the grid's step, around the center of its receptive field.

    The maps have half a pixel of the image as their pixel, because centers lie on pixels or between two. They
    have a margin of one step on every side.
    """
    values = excess.transpose(1, 2).unflatten(2, (grid.rows, grid.columns)).float()
    values = values.repeat_interleave(2 * grid.step, 2).repeat_interleave(2 * grid.step, 3)
    maps = values.new_zeros(*values.shape[:2], *(2 * (side + 2 * grid.step) for side in image.shape[1:]))
    top, left = (round(2 * first + 1 + grid.step) for first in grid.first)
    maps[:, :, top : top + values.shape[2], left : left + values.shape[3]] = values
    return maps


def entropies(layers: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Return a plot of the coupling's entropy by iteration, a line for each layer.

    Args:
        layers: by name, the layer's own number of `iterations` and the values of `trace_metrics`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    plot = figure.add_subplot()
    for name, layer in layers.items():
        entropy, own = layer["entropy"], layer["iterations"]
        (line,) = plot.plot(range(1, len(entropy) + 1), entropy, ".-", label=name)
        plot.plot(own, entropy[own - 1], "o", markersize=9, color=line.get_color())
    plot.set(xlabel="iteration (large dot: the network's last one)", ylabel="entropy / its maximum")
    plot.set_ylim(0, 1.05)
    plot.set_xticks(range(1, _longest(layers) + 1))
    plot.legend()
    plot.set_title("entropy of a child's coupling over its parents")
    return figure


def changes(layers: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Return a plot of the change of couplings, and of the logits of a routing by agreement, by iteration.

    Args:
        layers: see `entropies`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    plot = figure.add_subplot()
    labels = {
        "coupling_change": "|change of the coupling|",
        "logit_change": "|change of the logit|",
        "agreement_change": "|change of the logit minus the previous change|",
    }
    for name, layer in layers.items():
        for key, label in labels.items():
            if layer.get(key):
                plot.plot(range(2, len(layer[key]) + 2), layer[key], ".-", label=f"{name}: {label}")
    if any("logit_change" in layer for layer in layers.values()):
        iterations, values = zip(*LOGITS_OF_THE_PAPER.items(), strict=True)
        plot.plot(iterations, values, "kx", markersize=9, label="Sabour et al. 2017, figure A.1")
    plot.set_yscale("log")
    plot.set_xticks(range(2, _longest(layers) + 1))
    plot.set(xlabel="iteration", ylabel="mean over children, parents and images")
    if plot.has_data():
        plot.legend(fontsize=8)
    return figure


def _longest(layers: Mapping[str, Mapping[str, Any]]) -> int:
    return max(len(layer["entropy"]) for layer in layers.values())


def _title(example: Example, classes: Sequence[str]) -> str:
    label, prediction = classes[example.label], classes[example.prediction]
    predicted = "" if example.label == example.prediction else f", predicted {prediction}"
    return f"{example.number}, label {label}{predicted}"
