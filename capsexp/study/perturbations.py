"""What each dimension of a class capsule's pose encodes: reconstructions with that dimension changed."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import make_grid

from capsexp.analysis.findings import Findings, as_matplotlib
from capsexp.analysis.trained_run import TrainedRun
from capsexp.errors import UserError, refuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_STEPS = 1000


class Perturbations:
    """One row of reconstructions per dimension: figure 4 of Sabour et al., "Dynamic routing" (NIPS 2017).

    Differs from it in: nothing. The pose is that of the first correctly classified test image of a class.

    Args:
        classes: their indices; None for all of them.
        reach, step: -reach, -reach + step ... reach is added to the dimension.

    Raises:
        ValueError: no positive step within the reach.
    """

    def __init__(self, *, classes: Sequence[int] | None, reach: int | float, step: int | float) -> None:
        if not 0 < step <= reach:
            refuse(f"step must be > 0 and <= reach, got step {step} and reach {reach}")
        elif reach / step > MOST_STEPS:
            refuse(f"reach must be <= {MOST_STEPS} steps, got reach {reach} and step {step}")
        if classes is not None and (not classes or len(set(classes)) < len(classes) or min(classes) < 0):
            refuse(f"classes must be null or different class indices, got {classes}")
        self.classes = classes
        count = round(min(reach / step, MOST_STEPS)) if step > 0 else 0
        self.deltas = torch.arange(-count, count + 1) * step

    def __call__(self, run: TrainedRun) -> Findings:
        """Return a figure per class, and the mean change of a pixel by each dimension at both ends."""
        run.require_single_label()
        decoder = run.decoder()
        labels = range(len(run.classes)) if self.classes is None else self.classes
        if unknown := [label for label in labels if not 0 <= label < len(run.classes)]:
            raise UserError(f"study.classes: must be 0 … {len(run.classes) - 1}, got {unknown[0]}")
        poses = _first_correct_poses(run, set(labels))
        if missing := [label for label in labels if label not in poses]:
            raise UserError(
                f"no image of class {missing[0]} is classified correctly: there is no pose to perturb"
            )
        numbers: dict[str, Any] = {"deltas": self.deltas.tolist()}
        figures = {}
        for label in labels:
            rows = perturbed(poses[label], self.deltas, label, len(run.classes), decoder)
            middle, ends = rows[:, len(self.deltas) // 2 :][:, :1], rows[:, [0, -1]]
            changes = (ends - middle).abs().flatten(1).mean(1)
            numbers[f"change_by_dimension/{label}"] = changes.tolist()
            figures[f"perturbations-{label}"] = _figure(rows, self.deltas.tolist(), run.classes[label])
        return Findings(numbers, figures)


def perturbed(
    pose: Float[Tensor, " D"],
    deltas: Float[Tensor, " N"],
    label: int,
    classes: int,
    decoder: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "D N C H W"]:
    """Decode the pose of a class capsule with each delta added to each dimension.

    Args:
        pose: of the capsule.
        deltas: to add.
        label: class of the capsule.
        classes: number of classes; the other capsules have the pose 0.
        decoder: of the network.
    """
    size, count = len(pose), len(deltas)
    changed = pose.repeat(size, count, 1)  # [D, N, D]
    for dimension in range(size):
        changed[dimension, :, dimension] += deltas.to(pose)
    poses = pose.new_zeros(size * count, classes, size)
    poses[:, label] = changed.flatten(0, 1)
    with torch.no_grad():
        images = decoder(poses, torch.full((size * count,), label, device=pose.device))
    return images.unflatten(0, (size, count)).cpu()


def _first_correct_poses(run: TrainedRun, labels: set[int]) -> dict[int, Tensor]:
    """Return, by class, the pose of its first correctly classified image."""
    first: dict[int, Tensor] = {}
    for batch, output in run.outputs():
        poses = output.layers["class_caps"].poses
        correct = batch.labels == output.scores.argmax(1)
        for label in labels - first.keys():
            if (places := (correct & (batch.labels == label)).nonzero()).numel():
                first[label] = poses[places[0, 0], label]
        if labels == first.keys():
            break
    return first


def _figure(rows: Float[Tensor, "D N C H W"], deltas: Sequence[float], name: str) -> "Figure":
    from matplotlib.figure import Figure

    size, count, _, height, width = rows.shape
    figure = Figure(figsize=(0.6 * count + 0.8, 0.6 * size + 0.8), layout="constrained")
    plot = figure.add_subplot()
    # One large image: matplotlib needs a tenth of a second for each plot.
    grid = make_grid(rows.flatten(0, 1), nrow=count, padding=1, pad_value=0.5)
    plot.imshow(as_matplotlib(grid), cmap="gray", vmin=0, vmax=1)
    across = [(place + 0.5) * (width + 1) for place in range(count)]
    down = [(dimension + 0.5) * (height + 1) for dimension in range(size)]
    plot.set_xticks(across, [f"{delta:+.2f}" for delta in deltas])
    plot.set_yticks(down, [str(dimension) for dimension in range(size)])
    plot.tick_params(length=0, labelsize=7)
    plot.set(title=f"class {name}", xlabel="added to one dimension of the pose", ylabel="dimension")
    return figure
