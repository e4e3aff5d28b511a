"""Two overlapping digits above what the decoder makes of each, in two colours, and of digits not there."""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.utils import make_grid

from capsexp.analysis.findings import Findings, displayable
from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Batch, Output
from capsexp.data.pairs import OverlaidPairs
from capsexp.errors import UserError
from capsexp.targets import exactly, predicted, presence, share_found

PAPERS_OVERLAP = 0.8
COLOURS = {"R": "black", "R:P": "tab:red", "*R": "tab:blue"}
"""Of a column's title. R: decoded from the labels; R:P: from the prediction; *R: the second is not there."""


class Column(NamedTuple):
    """A picture of two digits, and two decoded classes."""

    mark: str
    decoded: list[int]
    labels: list[int]
    picture: Float[Tensor, "1 H W"]
    reconstructions: Float[Tensor, "2 1 H W"]


class Decoded(NamedTuple):
    """A batch of pictures of two digits, and what is decoded from it, by mark."""

    batch: Batch
    predictions: Int[Tensor, "B 2"]
    has_absent: Bool[Tensor, " B"]
    """Whether there is a class that is neither label nor prediction."""
    classes: dict[str, Int[Tensor, "B 2"]]
    pictures: dict[str, Float[Tensor, "B 2 1 H W"]]


class Overlap:
    """Figure 5 of Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 6, and its numbers.

    Differs from it in: which pictures are shown is not left to taste, but the first pairs of the test set;
    the wrong ones are decoded from their labels as well as from the prediction.

    Args:
        correct: pictures of which both digits are right, decoded from these.
        wrong: pictures of which a digit is wrong, each decoded from its labels and from the prediction.
        absent: pictures of which both digits are right, decoded from the first and from a digit that is
            neither in the picture nor predicted.

    Raises:
        ValueError: a number below 0, or nothing to show.
    """

    def __init__(self, *, correct: int, wrong: int, absent: int) -> None:
        if min(correct, wrong, absent) < 0 or correct + wrong + absent == 0:
            raise ValueError(
                f"correct, wrong and absent must be >= 0 and not all 0, got {correct}, {wrong} and {absent}"
            )
        self.correct, self.wrong, self.absent = correct, wrong, absent

    def __call__(self, subject: TrainedRun) -> Findings:
        """The figure, and what was measured on all pictures that were read.

        Errors of pictures (a digit is wrong) and of digits; of what is decoded from the labels, the squared
        error per pixel and the mean pixel (`ink_present`), which is `ink_absent` of a digit that is not
        there; how much the two digits overlap (see `OverlaidPairs.overlap`).
        """
        decoder, split = subject.decoder(), subject.components.dataset.read("test")
        pairs = subject.in_batches(split)
        if not isinstance(pairs, OverlaidPairs):
            name = subject.components.dataset.name
            raise UserError(f"this study needs pairs of digits, as dataset=multimnist has; this is {name}")
        generator = torch.Generator().manual_seed(0)
        sums: dict[str, int | float] = defaultdict(int)
        columns: dict[str, list[Column]] = {mark: [] for mark in ("R", "*R", "R:P")}
        for batch, output in subject.outputs(split):
            decoded = _decoded(batch, output, decoder, generator)
            for name, value in _sums(decoded).items():
                sums[name] += value
            self._collect(columns, decoded)
        shown = [column for kind in columns.values() for column in kind]
        if not shown:
            raise UserError("there is no picture of the kinds that study.correct, wrong and absent ask for")
        numbers = {
            "pictures": int(sums["pictures"]),
            "test_pairs": split.size * pairs.partners,
            **{name: sums[name] / sums["pictures"] for name in ("error", "digit_error", "squared_error")},
            "ink_present": sums["ink_present"] / sums["pictures"],
            "ink_absent": sums["ink_absent"] / sums["have_absent"] if sums["have_absent"] else None,
            **{f"overlap_{name}": value for name, value in pairs.overlap().items()},
            "overlap_paper": PAPERS_OVERLAP,
            "shown": [[one.mark, one.decoded, one.labels] for one in shown],
        }
        return Findings(numbers, {"overlap": _drawn(shown)})

    def _collect(self, columns: dict[str, list[Column]], decoded: Decoded) -> None:
        """Add the batch's first pictures of each kind, as far as more are wanted."""
        right = exactly(decoded.predictions, decoded.batch.labels).tolist()
        for place, (is_right, has_absent) in enumerate(zip(right, decoded.has_absent.tolist(), strict=True)):
            if not is_right and len(columns["R:P"]) < 2 * self.wrong:
                columns["R:P"] += [_column("R", decoded, place), _column("R:P", decoded, place)]
            elif is_right and len(columns["R"]) < self.correct:
                columns["R"].append(_column("R", decoded, place))
            elif is_right and has_absent and len(columns["*R"]) < self.absent:
                columns["*R"].append(_column("*R", decoded, place))


def _decoded(batch: Batch, output: Output, decoder: Any, generator: torch.Generator) -> Decoded:
    predictions = predicted(output.scores, batch.labels)
    absent, has_absent = _absent(
        torch.cat([batch.labels, predictions], dim=1), len(output.scores.T), generator
    )
    one_absent = torch.stack([batch.labels[:, 0], absent], dim=1)
    classes = {"R": batch.labels, "R:P": predictions, "*R": one_absent}
    poses = output.layers["class_caps"].poses
    pictures = {mark: decoder(poses, two).float() for mark, two in classes.items()}
    return Decoded(batch, predictions, has_absent, classes, pictures)


def _absent(
    taken: Int[Tensor, "B N"], classes: int, generator: torch.Generator
) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """A class that is not taken, drawn uniformly; and whether there is one."""
    is_taken = presence(taken, classes).bool()
    lots = torch.rand(is_taken.shape, generator=generator).to(taken.device)
    return lots.masked_fill(is_taken, -1).argmax(1), ~is_taken.all(1)


def _sums(decoded: Decoded) -> dict[str, int | float]:
    labels, from_labels = decoded.batch.labels, decoded.pictures["R"]
    from_absent = decoded.pictures["*R"][decoded.has_absent, 1]
    return {
        "pictures": len(labels),
        "have_absent": len(from_absent),
        "error": (~exactly(decoded.predictions, labels)).sum().item(),
        "digit_error": (1 - share_found(decoded.predictions, labels)).sum().item(),
        "squared_error": (from_labels - decoded.batch.pixels).square().flatten(1).mean(1).sum().item(),
        "ink_present": from_labels.flatten(1).mean(1).sum().item(),
        "ink_absent": from_absent.flatten(1).mean(1).sum().item(),
    }


def _column(mark: str, decoded: Decoded, place: int) -> Column:
    classes, labels = decoded.classes[mark][place].tolist(), decoded.batch.labels[place].tolist()
    picture, made = decoded.batch.images[place].cpu(), decoded.pictures[mark][place].cpu()
    return Column(mark, classes, labels, picture, made)


def _drawn(shown: list[Column]) -> Any:
    from matplotlib.figure import Figure

    height, width = shown[0].picture.shape[1:]
    inputs = [one.picture.expand(3, -1, -1) for one in shown]
    made = [torch.cat([*one.reconstructions, torch.zeros_like(one.picture)]) for one in shown]
    figure = Figure(figsize=(max(5, 0.95 * len(shown)), 2.6), layout="constrained")
    plot = figure.add_subplot()
    plot.imshow(displayable(make_grid(torch.stack(inputs + made), nrow=len(shown), padding=1, pad_value=0.5)))
    titles = [f"{one.mark}:{tuple(one.decoded)}\nL:{tuple(one.labels)}" for one in shown]
    plot.set_xticks([(place + 0.5) * (width + 1) for place in range(len(shown))], titles)
    plot.set_yticks([0.5 * (height + 1), 1.5 * (height + 1)], ["input", "decoded"])
    plot.xaxis.tick_top()
    plot.tick_params(length=0, labelsize=7)
    for one, title in zip(shown, plot.get_xticklabels(), strict=True):
        title.set_color(COLOURS[one.mark])
    legend = (
        "L: in the picture. R: decoded, red and green. P: the wrong prediction. *: the second is not there"
    )
    figure.supxlabel(legend, fontsize=7)
    return figure
