"""Curves over the size of an attack, and attacked pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import make_grid

from capsexp.analysis.findings import displayable

Curve = Sequence[int | float]
COLOURS = {
    "fgsm": "tab:blue",
    "bim": "tab:orange",
    "pgd own": "tab:green",
    "pgd difference": "tab:red",
    "worst": "black",
}
DASHES = {"cnn": ":", "capsules": "--"}
WHERE = {"": "-", " on run": "-", " on source": ":", " made on run": "--"}
UNITS = {"input": "in units of the network's input", "pixel": "in pixels of 0 … 255"}


class Shown(NamedTuple):
    """A picture, and what attacks of several sizes made of it."""

    label: int
    predictions: Sequence[int]
    """Of the picture and of each attacked one."""
    pixels: Float[Tensor, "N C H W"]
    """In [0, 1], the picture first."""


def figures_of_curves(numbers: Mapping[str, Any], *, units: str) -> dict[str, Any]:
    """The curves in the numbers of `capsexp.study.attacks.Attacks`."""
    told = {
        "untargeted": "accuracy",
        "targeted": "taken for the class aimed at, mean over classes",
        "transfer": "accuracy",
    }
    figures = {}
    for name in [name for name in told if name in numbers]:
        found = {key: line for key, line in numbers[name].items() if isinstance(line, list)}
        lines = {(key, ""): line for key, line in found.items()}
        if name == "transfer":
            white = numbers["untargeted"]
            split = {(key, key.partition(" on ")[0]): line for key, line in found.items()}
            lines = {(attack, key.removeprefix(attack)): line for (key, attack), line in split.items()}
            lines |= {(attack, " made on run"): white[attack] for _, attack in split}
        figures[f"attacks-{name}"] = _curves(
            lines,
            numbers[name]["epsilons"][units],
            units=units,
            told=told[name],
            chance=numbers["chance"],
            paper=numbers["paper"].get(name) if isinstance(numbers["paper"], dict) else None,
        )
    return figures


def _curves(
    lines: Mapping[tuple[str, str], Curve],
    epsilons: Curve,
    *,
    units: str,
    told: str,
    chance: float,
    paper: Mapping[str, Any] | None,
) -> Any:
    """One line for each attack, thin ones for the paper's and for chance.

    Args:
        lines: by attack, and what is added to its name.
        epsilons: where they are known.
        units: of the epsilons.
        told: what the lines show.
        chance: what guessing comes to.
        paper: its `epsilons`, and by network and attack its lines.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    plot = figure.add_subplot()
    plot.axhline(chance, color="grey", linewidth=0.8)
    plot.text(1.01, chance, "chance", transform=plot.get_yaxis_transform(), va="center", size=8)
    for network in DASHES if paper else ():
        for attack, line in (paper or {})[network].items():
            style: dict[str, Any] = {
                "color": COLOURS.get(attack),
                "linestyle": DASHES[network],
                "linewidth": 1,
            }
            plot.plot((paper or {})["epsilons"], line, **style, label=f"paper, {network}: {attack}")
    for (attack, where), line in lines.items():
        style = {"color": COLOURS.get(attack), "linestyle": WHERE[where], "marker": "."}
        plot.plot(epsilons, line, **style, label=f"{attack}{where}")
    plot.set(xlabel=f"epsilon, {UNITS[units]}", ylabel=told, ylim=(-0.03, 1.03))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def attacked_pictures(
    shown: Sequence[Shown], epsilons: Curve, *, classes: Sequence[str], units: str, attack: str
) -> Any:
    """A row for each: the picture, the attacked ones, and the last difference around a middle grey."""
    from matplotlib.figure import Figure

    height, width = shown[0].pixels.shape[2:]
    margin = max(2, height // 4)  # room for a word
    changes = [one.pixels[-1:].clamp(0, 1) - one.pixels[:1] for one in shown]
    largest = max(max(change.abs().max().item() for change in changes), 1e-9)
    rows = [
        torch.cat([one.pixels, 0.5 + change / (2 * largest)])
        for one, change in zip(shown, changes, strict=True)
    ]
    columns = len(rows[0])
    down, right = height + margin, width + margin  # from one picture to the next
    figure = Figure(figsize=(1.25 * columns + 0.3, 1.45 * len(rows) + 0.4), layout="constrained")
    plot = figure.add_subplot()
    grid = make_grid(torch.cat(rows).clamp(0, 1), nrow=columns, padding=margin, pad_value=1)
    plot.imshow(displayable(grid[:, margin:, margin:]), cmap="gray", vmin=0, vmax=1)
    for row, one in enumerate(shown):
        for column, prediction in enumerate(one.predictions):
            place = (column * right + width / 2, row * down + height)
            colour = "black" if prediction == one.label else "tab:red"
            plot.text(*place, classes[prediction], ha="center", va="top", size=8, color=colour)
    heads = ["as it is", *(f"{attack} {epsilon:g}" for epsilon in epsilons), "change"]
    plot.set_xticks([column * right + width / 2 for column in range(columns)], heads)
    plot.set_yticks([])
    plot.tick_params(length=0, labelsize=8, top=True, labeltop=True, bottom=False, labelbottom=False)
    plot.spines[:].set_visible(False)
    plot.set_xlabel(f"beneath: what the network takes it for; epsilon {UNITS[units]}", fontsize=8)
    return figure
