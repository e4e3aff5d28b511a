"""Figures of `study=attacks`: curves over the radius of an attack, and attacked images."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import make_grid

from capsexp.analysis.findings import as_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "fgsm": "tab:blue",
    "bim": "tab:orange",
    "pgd own": "tab:green",
    "pgd difference": "tab:red",
    "worst": "black",
}
PAPER_STYLES = {"cnn": ":", "capsules": "--"}
TRANSFER_STYLES = {"run": "-", "source": ":"}
UNITS = {"input": "in units of the network's input", "pixel": "in pixels of 0 … 255"}


class Curve(NamedTuple):
    """One line of a plot over epsilon."""

    label: str
    epsilons: Sequence[int | float]
    values: Sequence[int | float]
    style: dict[str, Any]
    """Keyword arguments of matplotlib's `plot`."""


class Example(NamedTuple):
    """An image and its attacked versions, for attacks of several radii."""

    label: int
    predictions: Sequence[int]
    """For the clean image and for each attacked one."""
    pixels: Float[Tensor, "N C H W"]
    """In [0, 1], the clean image first."""


def curve_figures(numbers: Mapping[str, Any], *, units: str) -> dict[str, "Figure"]:
    """Return a figure for each kind of attack in the numbers of `capsexp.study.attacks.Attacks`."""
    labels = {
        "untargeted": "accuracy",
        "targeted": "classified as the target, mean over classes",
        "transfer": "accuracy",
    }
    papers = numbers["paper"] if isinstance(numbers["paper"], dict) else {}
    figures = {}
    for kind in [kind for kind in labels if kind in numbers]:
        curves = [
            *_paper_curves(papers.get(kind)),
            *(_transfer_curves(numbers, units) if kind == "transfer" else _curves(numbers[kind], units)),
        ]
        figures[f"attacks-{kind}"] = _plot(
            curves, xlabel=f"epsilon, {UNITS[units]}", ylabel=labels[kind], chance=numbers["chance"]
        )
    return figures


def _curves(numbers: Mapping[str, Any], units: str) -> Iterator[Curve]:
    """Yield a curve for each attack."""
    for attack, values in numbers.items():
        if isinstance(values, list):  # the other entries are not curves
            yield _curve(attack, attack, numbers["epsilons"][units], values, linestyle="-")


def _transfer_curves(numbers: Mapping[str, Any], units: str) -> Iterator[Curve]:
    """Yield the curves of attacks made on the source, on both networks, and those made on the run itself."""
    transfer, untargeted = numbers["transfer"], numbers["untargeted"]
    epsilons = transfer["epsilons"][units]
    attacks = [attack for attack in untargeted if f"{attack} on run" in transfer]
    for attack in attacks:
        for network, linestyle in TRANSFER_STYLES.items():
            label = f"{attack} on {network}"
            yield _curve(label, attack, epsilons, transfer[label], linestyle=linestyle)
    for attack in attacks:
        yield _curve(f"{attack} made on run", attack, epsilons, untargeted[attack], linestyle="--")


def _curve(
    label: str,
    attack: str,
    epsilons: Sequence[int | float],
    values: Sequence[int | float],
    *,
    linestyle: str,
) -> Curve:
    style = {"color": COLORS.get(attack), "linestyle": linestyle, "marker": "."}
    return Curve(label, epsilons, values, style)


def _paper_curves(paper: Mapping[str, Any] | None) -> Iterator[Curve]:
    """Yield the curves of a paper: its `epsilons`, and by network and attack its values."""
    if paper is None:
        return
    for network, linestyle in PAPER_STYLES.items():
        for attack, values in paper[network].items():
            style = {"color": COLORS.get(attack), "linestyle": linestyle, "linewidth": 1}
            yield Curve(f"paper, {network}: {attack}", paper["epsilons"], values, style)


def _plot(curves: Sequence[Curve], *, xlabel: str, ylabel: str, chance: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    plot = figure.add_subplot()
    plot.axhline(chance, color="grey", linewidth=0.8)
    plot.text(1.01, chance, "chance", transform=plot.get_yaxis_transform(), va="center", size=8)
    for curve in curves:
        plot.plot(curve.epsilons, curve.values, label=curve.label, **curve.style)
    plot.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.03, 1.03))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def attacked_images(
    examples: Sequence[Example],
    epsilons: Sequence[int | float],
    *,
    classes: Sequence[str],
    units: str,
    attack: str,
) -> "Figure":
    """Return a figure with a row for each example.

    A row shows the clean image, the attacked ones, and the change by the last attack around a middle gray.
    """
    from matplotlib.figure import Figure

    height, width = examples[0].pixels.shape[2:]
    margin = max(2, height // 4)  # room for the name of a class
    changes = [example.pixels[-1:].clamp(0, 1) - example.pixels[:1] for example in examples]
    largest = max(max(change.abs().max().item() for change in changes), 1e-9)
    rows = [
        torch.cat([example.pixels, 0.5 + change / (2 * largest)])
        for example, change in zip(examples, changes, strict=True)
    ]
    columns = len(rows[0])
    down, right = height + margin, width + margin  # from one image to the next
    figure = Figure(figsize=(1.25 * columns + 0.3, 1.45 * len(rows) + 0.4), layout="constrained")
    plot = figure.add_subplot()
    grid = make_grid(torch.cat(rows).clamp(0, 1), nrow=columns, padding=margin, pad_value=1)
    plot.imshow(as_matplotlib(grid[:, margin:, margin:]), cmap="gray", vmin=0, vmax=1)
    for row, example in enumerate(examples):
        for column, prediction in enumerate(example.predictions):
            place = (column * right + width / 2, row * down + height)
            color = "black" if prediction == example.label else "tab:red"
            plot.text(*place, classes[prediction], ha="center", va="top", size=8, color=color)
    heads = ["clean", *(f"{attack} {epsilon:g}" for epsilon in epsilons), "change"]
    plot.set_xticks([column * right + width / 2 for column in range(columns)], heads)
    plot.set_yticks([])
    plot.tick_params(length=0, labelsize=8, top=True, labeltop=True, bottom=False, labelbottom=False)
    plot.spines[:].set_visible(False)
    plot.set_xlabel(f"below: predicted class; epsilon {UNITS[units]}", fontsize=8)
    return figure
