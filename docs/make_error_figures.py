"""Draw the test images that a finished run gets wrong.

    python docs/make_error_figures.py RUN -o FILE.png

Each image has its label and the predicted one below it. Where images come in groups, as the toys of
smallNORB, one image stands for each group that is often wrong. Pairs of digits have two reconstructions
beside them, in red and green: from the labels and from the prediction. Right pairs follow, reconstructed
from their labels, and from the first label with the digit that was rejected with the highest score. The
weights are those that the run tested.
"""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from tile_sheet import Tile, draw
from torch import Tensor

import capsexp
from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Batch, Output
from capsexp.config.saved import load_saved_config
from capsexp.data.image_ops import displayable
from capsexp.data.split import Groups
from capsexp.errors import UserError, print_error
from capsexp.ops.labels import all_correct, multi_hot, predicted_labels
from capsexp.outputs import require_figure_file, write_output
from capsexp.training.metrics import pool_crops

COMMAND = "python docs/make_error_figures.py"
MOST_IMAGES = 100
MOST_WRONG_PAIRS, MOST_RIGHT_PAIRS = 18, 9
SHORT_NAME = 2
"""Letters of names of classes that fit into one line, `3 → 5`."""
Draw = Callable[[Tensor, Tensor], Float[Tensor, "B T C H W"]]


class Tested(NamedTuple):
    """A batch of test images, and what the network says about them."""

    batch: Batch
    output: Output
    """Of the first crop."""
    predicted: Int[Tensor, " B *T"]
    wrong: list[int]
    """Places of the wrong images in the batch."""
    right: list[int]


class Wrong(NamedTuple):
    """An image that is taken for another class."""

    pixels: Float[Tensor, "C H W"]
    label: int
    predicted: int
    index: int
    """Position in the split."""


def load(path: Path) -> TrainedRun:
    """Load a run with the weights that it tested."""
    weights = load_saved_config(path)["trainer"]["test"]
    return capsexp.load(path, weights="last" if weights == "none" else weights)


def tested(run: TrainedRun) -> Iterator[Tested]:
    """Yield the test split; the classes of an image are those of all its crops together, as in the test."""
    for views in run.evaluation_batches("test").views():
        with torch.no_grad():
            outputs = [run.model(view.images, view.labels) for view in views]
        first, batch = outputs[0], views[0]
        scores = first.scores if len(views) == 1 else pool_crops([out.probabilities for out in outputs])
        predicted = predicted_labels(scores, batch.labels)
        is_right = all_correct(predicted, batch.labels)
        wrong, right = (~is_right).nonzero()[:, 0].tolist(), is_right.nonzero()[:, 0].tolist()
        yield Tested(batch, first, predicted, wrong, right)


def sheet(run: TrainedRun) -> bytes:
    """Return the figure of a run, as PNG.

    Raises:
        UserError: no test image is wrong.
    """
    if run.dataset.labels_per_image > 1:
        tiles, wrong, images, kind = pair_tiles(run)
    else:
        mistakes, images = mistakes_of(run)
        wrong, groups, kind = len(mistakes), run.dataset.groups("test"), "images"
        of_each = image_tiles(mistakes, run.classes)
        tiles = of_each if groups is None else group_tiles(mistakes, groups, run.classes, images)
    if wrong == 0:
        raise UserError(f"{run.path}: no test image is wrong")
    title = f"{wrong:,} of {images:,} test {kind} wrong ({100 * wrong / images:.2f} %); label → prediction"
    file = io.BytesIO()
    draw(tiles, title).save(file, format="PNG", optimize=True)
    return file.getvalue()


def mistakes_of(run: TrainedRun) -> tuple[list[Wrong], int]:
    """Return the wrong images in the order of the split, and the number of all images."""
    found, images = [], 0
    for batch, _, predicted, wrong, _ in tested(run):
        images += len(batch.labels)
        for place in wrong:
            numbers = (int(values[place]) for values in (batch.labels, predicted, batch.indices))
            found.append(Wrong(batch.pixels[place], *numbers))
    return found, images


def image_tiles(mistakes: Sequence[Wrong], classes: Sequence[str]) -> list[Tile]:
    """Return tiles of wrong images by their class; of more than `MOST_IMAGES` an even sample."""
    ordered = sorted(mistakes, key=lambda mistake: (mistake.label, mistake.predicted))
    count = min(MOST_IMAGES, len(ordered))
    chosen = [ordered[place * len(ordered) // count] for place in range(count)]
    return [Tile(as_bytes(one.pixels), _names(classes[one.label], classes[one.predicted])) for one in chosen]


def _names(label: str, predicted: str) -> tuple[str, ...]:
    if max(len(label), len(predicted)) <= SHORT_NAME:
        return (f"{label} → {predicted}",)
    return label, f"→ {predicted}"


def group_tiles(mistakes: Sequence[Wrong], groups: Groups, classes: Sequence[str], images: int) -> list[Tile]:
    """Return a tile for each group whose error is above that of all images, the highest first.

    Its image is one of those taken for the most frequent wrong class: the middle one of the split. Below it
    are the name of the group, its error, the class and its share of the wrong images.
    """
    by_group: dict[int, list[Wrong]] = {}
    for mistake in mistakes:
        by_group.setdefault(int(groups.of[mistake.index]), []).append(mistake)
    sizes = groups.of.bincount(minlength=len(groups.names)).tolist()
    shares = {group: len(wrong) / sizes[group] for group, wrong in by_group.items()}
    often = [group for group, share in shares.items() if share >= len(mistakes) / images]
    tiles = []
    for group in sorted(often, key=lambda group: -shares[group]):
        wrong = by_group[group]
        ((predicted, count),) = Counter(one.predicted for one in wrong).most_common(1)
        same = [one for one in wrong if one.predicted == predicted]
        first = f"{groups.names[group]}: {100 * shares[group]:.1f} %"
        lines = (first, f"→ {classes[predicted]}", f"in {100 * count / len(wrong):.0f} % of these")
        tiles.append(Tile(as_bytes(same[len(same) // 2].pixels), lines))
    return tiles


def pair_tiles(run: TrainedRun) -> tuple[list[Tile], int, int, str]:
    """Return tiles of wrong pairs and then of right ones, and the numbers of wrong pairs and of all."""
    decoder = getattr(run.model, "decoder", None)
    wrong_tiles: list[Tile] = []
    right_tiles: list[Tile] = []
    wrong = images = 0
    for one in tested(run):
        images, wrong = images + len(one.batch.labels), wrong + len(one.wrong)
        for place in one.wrong[: MOST_WRONG_PAIRS - len(wrong_tiles)]:
            wrong_tiles.append(_pair(one, place, one.predicted[place], decoder, run.classes, ""))
        if decoder is not None:
            for place in one.right[: MOST_RIGHT_PAIRS - len(right_tiles)]:
                labels = one.batch.labels[place]
                absent = _rejected(one.output.scores[place], labels, one.predicted[place])
                pair = torch.stack([labels[0], absent])
                right_tiles.append(_pair(one, place, pair, decoder, run.classes, " (rejected)"))
    return [*wrong_tiles, *right_tiles], wrong, images, "pairs"


def _rejected(scores: Float[Tensor, " J"], labels: Tensor, predicted: Tensor) -> Int[Tensor, ""]:
    """Return the class with the highest score of those that are neither labels nor predicted."""
    taken = multi_hot(torch.cat([labels, predicted])[None], len(scores))[0].bool()
    return scores.masked_fill(taken, -torch.inf).argmax()


def _pair(
    one: Tested,
    place: int,
    others: Int[Tensor, " T"],
    decoder: Draw | None,
    classes: Sequence[str],
    mark: str,
) -> Tile:
    """Return the tile of a pair: the image, then the reconstructions of its labels and of other classes."""
    labels = one.batch.labels[place]
    parts = [as_bytes(one.batch.images[place])]
    if decoder is not None:
        poses = one.output.layers["class_caps"].poses[place : place + 1]
        with torch.no_grad():
            decoded = [decoder(poses, pair[None])[0, :, 0] for pair in (labels, others)]  # [T, H, W]
        # The first reconstruction is the red channel, the second the green one.
        parts += [as_bytes(torch.cat([images, torch.zeros_like(images[:1])])) for images in decoded]
    names = (", ".join(classes[int(number)] for number in pair) for pair in (labels, others))
    return Tile(np.concatenate(parts, axis=1), (" → ".join(names) + mark,))


def as_bytes(image: Float[Tensor, "C H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image in [0, 1] as bytes in three channels; of stereo the first camera."""
    shown = displayable(image.detach().cpu()).clamp(0, 1).expand(3, -1, -1)
    return (255 * shown).round().byte().movedim(0, 2).numpy()


def main(texts: Sequence[str]) -> int:
    """Draw the figure of the run on the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python docs/make_error_figures.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("-o", dest="file", type=Path, required=True, metavar="FILE.png", help="the figure")
    arguments: Any = parser.parse_args(texts)
    try:
        require_figure_file(arguments.file, option="-o")
        write_output(arguments.file, sheet(load(arguments.run)))
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
