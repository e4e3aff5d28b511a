"""Draw the figure of the front page: digits, their reconstructions, and what one dimension of a pose changes.

    python docs/make_front_figure.py RUN FILE.png

RUN is the directory of a run whose network has a decoder.
"""

import io
import sys
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import capsexp

IMAGES = 1000
"""Test images to choose from: the first of each class that is classified right is shown."""
REACH = 0.25
"""Added to one dimension of the pose, as in figure 4 of Sabour et al. 2017."""
CLASSES = (2, 4, 8)
"""Classes for which the dimension that changes the image most is shown."""


def draw(run: Any) -> Figure:
    """Draw the figure for a trained run."""
    split = run.dataset.read("test")
    prepared = run.dataset.preprocess.test(split.images[:IMAGES])
    labels = split.labels[:IMAGES]
    with torch.no_grad():
        output = run.model(prepared.images, labels)
        poses = output.layers["class_caps"].poses
        right = output.scores.argmax(1) == labels
        shown = [int((right & (labels == label)).nonzero()[0, 0]) for label in range(len(run.classes))]
        rows = [("image", prepared.pixels[shown]), ("decoded", output.reconstruction[shown])]
        for label in CLASSES:
            dimension, decoded = _most_changed(run.model.decoder, poses[shown[label]], label, len(shown))
            rows.append((f"{run.classes[label]}: pose {dimension}", decoded))
    return _figure(rows)


def _most_changed(decoder: Any, pose: Tensor, label: int, columns: int) -> tuple[int, Tensor]:
    """Return the dimension of a class's pose that changes the image most, and the decoded images."""
    classes, size = pose.shape
    changed = pose.expand(size, columns, classes, size).clone()  # [D, N, J, D]
    for dimension in range(size):
        changed[dimension, :, label, dimension] += torch.linspace(-REACH, REACH, columns)
    flat = changed.flatten(0, 1)
    decoded = decoder(flat, torch.full((len(flat),), label)).unflatten(0, (size, columns))
    change = (decoded[:, -1] - decoded[:, 0]).abs().flatten(1).mean(1)
    dimension = int(change.argmax())
    return dimension, decoded[dimension]


def _figure(rows: Sequence[tuple[str, Tensor]]) -> Figure:
    columns = len(rows[0][1])
    figure = Figure(figsize=(0.8 * columns + 1.2, 0.8 * len(rows) + 0.75), facecolor="white")
    left, top, gap = 1.2 / figure.get_figwidth(), 1 - 0.1 / figure.get_figheight(), 0.25
    size = [0.8 / figure.get_figwidth(), 0.8 / figure.get_figheight()]
    for row, (name, images) in enumerate(rows):
        below = row >= 2
        bottom = top - (row + 1) * size[1] - below * gap / figure.get_figheight()
        figure.text(left - 0.01, bottom + size[1] / 2, name, ha="right", va="center", fontsize=13)
        for column, image in enumerate(images):
            plot = figure.add_axes((left + column * size[0], bottom, size[0] * 0.94, size[1] * 0.94))
            plot.imshow(image[0].clamp(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
            plot.set_xticks([])
            plot.set_yticks([])
            for edge in plot.spines.values():
                edge.set_color("0.8")
    text = {"va": "bottom", "fontsize": 13, "y": 0.08 / figure.get_figheight()}
    figure.text(left, s=f"{-REACH}", ha="left", **text)
    figure.text((1 + left) / 2, s="added to one number of the pose", ha="center", **text)
    figure.text(0.995, s=f"+{REACH}", ha="right", **text)
    return figure


def main() -> None:
    """Draw the figure of the run named on the command line."""
    run, file = sys.argv[1:]
    drawn = io.BytesIO()
    draw(capsexp.load(run)).savefig(drawn, dpi=110)
    Image.open(drawn).convert("L").save(file, optimize=True)  # gray: a third of the size


if __name__ == "__main__":
    main()
