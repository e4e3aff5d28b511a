"""What each dimension of a class capsule's pose stands for: decoded with a little more or less of it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import make_grid

from capsexp.analysis.findings import Findings, displayable
from capsexp.analysis.trained_run import TrainedRun
from capsexp.errors import UserError


class Perturbations:
    """One row of pictures for each dimension: figure 4 of Sabour et al., "Dynamic routing" (NIPS 2017).

    Differs from it in: nothing. The pose is that of a class's first test picture that is classified right.

    Args:
        classes: their indices; None is all of them.
        reach, step: the dimension gets -reach, -reach + step ... reach more.

    Raises:
        ValueError: no positive step within the reach.
    """

    def __init__(self, *, classes: Sequence[int] | None, reach: int | float, step: int | float) -> None:
        if not 0 < step <= reach:
            raise ValueError(f"step must be > 0 and <= reach, got step {step} and reach {reach}")
        self.classes = classes
        count = round(reach / step)
        self.deltas = torch.arange(-count, count + 1) * step

    def __call__(self, subject: TrainedRun) -> Findings:
        """A figure for each class; the mean change of a pixel by each dimension at the ends of the reach."""
        subject.require_single_label()
        decoder = subject.decoder()
        wanted = range(len(subject.classes)) if self.classes is None else self.classes
        if unknown := [label for label in wanted if not 0 <= label < len(subject.classes)]:
            raise UserError(f"study.classes: must be 0 … {len(subject.classes) - 1}, got {unknown[0]}")
        poses = _first_right(subject, set(wanted))
        if missing := [label for label in wanted if label not in poses]:
            raise UserError(
                f"no picture of class {missing[0]} is classified right: there is nothing to perturb"
            )
        numbers: dict[str, Any] = {"deltas": self.deltas.tolist()}
        figures = {}
        for label in wanted:
            rows = self._decoded(poses[label], label, len(subject.classes), decoder)
            middle, ends = rows[:, len(self.deltas) // 2 :][:, :1], rows[:, [0, -1]]
            changes = (ends - middle).abs().flatten(1).mean(1)
            numbers[f"change_by_dimension/{label}"] = changes.tolist()
            figures[f"perturbations-{label}"] = _drawn(rows, self.deltas.tolist(), subject.classes[label])
        return Findings(numbers, figures)

    def _decoded(
        self, pose: Float[Tensor, " D"], label: int, classes: int, decoder: Any
    ) -> Float[Tensor, "D N C H W"]:
        size, count = len(pose), len(self.deltas)
        changed = pose.repeat(size, count, 1)  # [D, N, D]
        for dimension in range(size):
            changed[dimension, :, dimension] += self.deltas.to(pose)
        poses = pose.new_zeros(size * count, classes, size)
        poses[:, label] = changed.flatten(0, 1)
        with torch.no_grad():
            pictures = decoder(poses, torch.full((size * count,), label, device=pose.device))
        return pictures.unflatten(0, (size, count)).cpu()


def _first_right(subject: TrainedRun, wanted: set[int]) -> dict[int, Tensor]:
    """The pose of the first picture of each class that is classified right."""
    found: dict[int, Tensor] = {}
    for batch, output in subject.outputs():
        poses = output.layers["class_caps"].poses
        right = batch.labels == output.scores.argmax(1)
        for label in wanted - found.keys():
            if (places := (right & (batch.labels == label)).nonzero()).numel():
                found[label] = poses[places[0, 0], label]
        if wanted == found.keys():
            break
    return found


def _drawn(rows: Float[Tensor, "D N C H W"], deltas: Sequence[float], name: str) -> Any:
    from matplotlib.figure import Figure

    size, count, _, height, width = rows.shape
    figure = Figure(figsize=(0.6 * count + 0.8, 0.6 * size + 0.8), layout="constrained")
    plot = figure.add_subplot()
    # One picture of all: matplotlib needs a tenth of a second for each plot.
    grid = make_grid(rows.flatten(0, 1), nrow=count, padding=1, pad_value=0.5)
    plot.imshow(displayable(grid), cmap="gray", vmin=0, vmax=1)
    across = [(place + 0.5) * (width + 1) for place in range(count)]
    down = [(dimension + 0.5) * (height + 1) for dimension in range(size)]
    plot.set_xticks(across, [f"{one:+.2f}" for one in deltas])
    plot.set_yticks(down, [str(dimension) for dimension in range(size)])
    plot.tick_params(length=0, labelsize=7)
    plot.set(title=f"class {name}", xlabel="added to one dimension of the pose", ylabel="dimension")
    return figure
