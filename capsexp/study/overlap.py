"""Two overlapping digits and their reconstructions in two colors, also of digits that are not there."""

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.utils import make_grid

from capsexp.analysis.findings import Findings, as_matplotlib
from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Batch, Output
from capsexp.data.pairs import OverlaidPairs
from capsexp.errors import UserError, refuse
from capsexp.ops.labels import all_correct, fraction_correct, multi_hot, predicted_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPERS_OVERLAP = 0.8
COLORS = {"R": "black", "R:P": "tab:red", "*R": "tab:blue"}
"""Of a column's title. R: decoded from the labels; R:P: from the prediction; *R: the second is absent."""


class Column(NamedTuple):
    """An image of two digits, and the reconstructions of two classes."""

    mark: str
    decoded: list[int]
    labels: list[int]
    image: Float[Tensor, "1 H W"]
    reconstructions: Float[Tensor, "2 1 H W"]


class DecodedBatch(NamedTuple):
    """A batch of images of two digits, and its reconstructions, by mark."""

    batch: Batch
    predictions: Int[Tensor, "B 2"]
    has_absent: Bool[Tensor, " B"]
    """Whether there is a class that is neither label nor prediction."""
    classes: dict[str, Int[Tensor, "B 2"]]
    reconstructions: dict[str, Float[Tensor, "B 2 1 H W"]]


class Overlap:
    """Figure 5 of Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 6, and its numbers.

    Differs from it in: the images are not hand-picked, but the first pairs of the test split; misclassified
    ones are decoded from their labels as well as from the prediction.

    Args:
        correct: images with both digits correct, decoded from these.
        wrong: images with a wrong digit, each decoded from its labels and from the prediction.
        absent: images with both digits correct, decoded from the first and from a digit that is neither in
            the image nor predicted.

    Raises:
        ValueError: a number below 0, or nothing to show.
    """

    def __init__(self, *, correct: int, wrong: int, absent: int) -> None:
        if min(correct, wrong, absent) < 0 or correct + wrong + absent == 0:
            refuse(
                f"correct, wrong and absent must be >= 0 and not all 0, got {correct}, {wrong} and {absent}"
            )
        self.correct, self.wrong, self.absent = correct, wrong, absent

    def __call__(self, run: TrainedRun) -> Findings:
        """Return the figure, and numbers over all images.

        `error` of images (a digit is wrong) and `digit_error` of digits. Of the reconstructions from the
        labels, `squared_error` per pixel and the mean pixel, `ink_present`; `ink_absent` is that of a digit
        that is not in the image. How much the two digits overlap: see `OverlaidPairs.overlap`.
        """
        decoder, split = run.decoder(), run.dataset.read("test")
        pairs = run.in_batches(split)
        if not isinstance(pairs, OverlaidPairs):
            raise UserError(
                f"this study needs pairs of digits, as dataset=multimnist has; this is {run.dataset.name}"
            )
        generator = torch.Generator().manual_seed(0)
        sums: dict[str, int | float] = defaultdict(int)
        columns: dict[str, list[Column]] = {mark: [] for mark in ("R", "*R", "R:P")}
        for batch, output in run.outputs(split):
            decoded = _decode(batch, output, decoder, generator)
            for name, value in _sums(decoded).items():
                sums[name] += value
            self._collect(columns, decoded)
        shown = [column for kind in columns.values() for column in kind]
        if not shown:
            raise UserError("there is no image of the kinds that study.correct, wrong and absent ask for")
        numbers = {
            "pictures": int(sums["pictures"]),
            "test_pairs": split.size * pairs.partners,
            **{name: sums[name] / sums["pictures"] for name in ("error", "digit_error", "squared_error")},
            "ink_present": sums["ink_present"] / sums["pictures"],
            "ink_absent": sums["ink_absent"] / sums["have_absent"] if sums["have_absent"] else None,
            **{f"overlap_{name}": value for name, value in pairs.overlap().items()},
            "overlap_paper": PAPERS_OVERLAP,
            "shown": [[column.mark, column.decoded, column.labels] for column in shown],
        }
        return Findings(numbers, {"overlap": _figure(shown)})

    def _collect(self, columns: dict[str, list[Column]], decoded: DecodedBatch) -> None:
        """Add the first images of each kind in the batch, until there are enough."""
        correct = all_correct(decoded.predictions, decoded.batch.labels).tolist()
        for place, (is_correct, has_absent) in enumerate(
            zip(correct, decoded.has_absent.tolist(), strict=True)
        ):
            if not is_correct and len(columns["R:P"]) < 2 * self.wrong:
                columns["R:P"] += [_column("R", decoded, place), _column("R:P", decoded, place)]
            elif is_correct and len(columns["R"]) < self.correct:
                columns["R"].append(_column("R", decoded, place))
            elif is_correct and has_absent and len(columns["*R"]) < self.absent:
                columns["*R"].append(_column("*R", decoded, place))


def _decode(
    batch: Batch, output: Output, decoder: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator
) -> DecodedBatch:
    predictions = predicted_labels(output.scores, batch.labels)
    absent, has_absent = absent_class(
        torch.cat([batch.labels, predictions], dim=1), len(output.scores.T), generator
    )
    with_absent = torch.stack([batch.labels[:, 0], absent], dim=1)
    classes = {"R": batch.labels, "R:P": predictions, "*R": with_absent}
    poses = output.layers["class_caps"].poses
    reconstructions = {mark: decoder(poses, pair).float() for mark, pair in classes.items()}
    return DecodedBatch(batch, predictions, has_absent, classes, reconstructions)


def absent_class(
    taken: Int[Tensor, "B N"], classes: int, generator: torch.Generator
) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """Draw a class that is not taken, uniformly; also return whether there is one."""
    is_taken = multi_hot(taken, classes).bool()
    draws = torch.rand(is_taken.shape, generator=generator).to(taken.device)
    return draws.masked_fill(is_taken, -1).argmax(1), ~is_taken.all(1)


def _sums(decoded: DecodedBatch) -> dict[str, int | float]:
    labels, from_labels = decoded.batch.labels, decoded.reconstructions["R"]
    from_absent = decoded.reconstructions["*R"][decoded.has_absent, 1]
    return {
        "pictures": len(labels),
        "have_absent": len(from_absent),
        "error": (~all_correct(decoded.predictions, labels)).sum().item(),
        "digit_error": (1 - fraction_correct(decoded.predictions, labels)).sum().item(),
        "squared_error": (from_labels - decoded.batch.pixels).square().flatten(1).mean(1).sum().item(),
        "ink_present": from_labels.flatten(1).mean(1).sum().item(),
        "ink_absent": from_absent.flatten(1).mean(1).sum().item(),
    }


def _column(mark: str, decoded: DecodedBatch, place: int) -> Column:
    classes, labels = decoded.classes[mark][place].tolist(), decoded.batch.labels[place].tolist()
    image, reconstructions = decoded.batch.images[place].cpu(), decoded.reconstructions[mark][place].cpu()
    return Column(mark, classes, labels, image, reconstructions)


def _figure(columns: list[Column]) -> "Figure":
    from matplotlib.figure import Figure

    height, width = columns[0].image.shape[1:]
    inputs = [column.image.expand(3, -1, -1) for column in columns]
    # The two reconstructions are the red and the green channel.
    decoded = [torch.cat([*column.reconstructions, torch.zeros_like(column.image)]) for column in columns]
    figure = Figure(figsize=(max(5, 0.95 * len(columns)), 2.6), layout="constrained")
    plot = figure.add_subplot()
    grid = make_grid(torch.stack(inputs + decoded), nrow=len(columns), padding=1, pad_value=0.5)
    plot.imshow(as_matplotlib(grid))
    titles = [f"{column.mark}:{tuple(column.decoded)}\nL:{tuple(column.labels)}" for column in columns]
    plot.set_xticks([(place + 0.5) * (width + 1) for place in range(len(columns))], titles)
    plot.set_yticks([0.5 * (height + 1), 1.5 * (height + 1)], ["input", "decoded"])
    plot.xaxis.tick_top()
    plot.tick_params(length=0, labelsize=7)
    for column, title in zip(columns, plot.get_xticklabels(), strict=True):
        title.set_color(COLORS[column.mark])
    legend = "L: labels. R: decoded, red and green. P: the wrong prediction. *: the second digit is absent"
    figure.supxlabel(legend, fontsize=7)
    return figure
