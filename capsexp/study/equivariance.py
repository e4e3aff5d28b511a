"""Whether the pose of a class capsule changes as its image is moved."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import InterpolationMode, rotate

from capsexp.analysis.findings import Findings
from capsexp.analysis.trained_run import TrainedRun
from capsexp.data.preprocess import RESIZE_CHUNK
from capsexp.data.split import Split
from capsexp.errors import UserError, refuse, require_in, require_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TALLEST = 64
"""Dimensions of a pose for which the heat map grows; beyond, its rows get thinner and have no numbers."""

Move = Callable[[UInt8[Tensor, "N C H W"], int | float], UInt8[Tensor, "N C H W"]]


class ClassPoses(NamedTuple):
    """Poses and predictions for all images."""

    poses: Float[Tensor, "N D"]
    """Of the capsule of each image's label."""
    labels: Tensor
    correct: Bool[Tensor, " N"]


class Equivariance:
    """The class capsule's pose before and after known shifts and rotations of the input.

    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), and Hinton et al., "Matrix capsules with EM
    routing" (ICLR 2018), claim that poses change with the viewpoint, but do not measure it. Our definition: a
    pose is equivariant if a linear map predicts from its change by how much the image was moved.

    Stored images are moved, before any crop and standardisation. The area that moves in is black, or more of
    the image if there is a crop. Only images that are classified correctly unmoved count: the pose of a class
    that is not in the image means nothing.

    Args:
        shifts: in pixels, down and to the right; 0 is dropped.
        rotations: in degrees, counterclockwise around the center, bilinear; 0 is dropped.
        seed: of the halves: maps are fitted to one half of the images and evaluated on the other.

    Raises:
        ValueError: no shift and no rotation.
    """

    def __init__(self, *, shifts: Sequence[int], rotations: Sequence[int | float], seed: int) -> None:
        self.moves: dict[str, tuple[Move, list[int | float]]] = {
            "down": (_down, [by for by in shifts if by]),
            "right": (_right, [by for by in shifts if by]),
            "rotation": (rotated, [by for by in rotations if by]),
        }
        self.moves = {name: move for name, move in self.moves.items() if move[1]}
        if not self.moves:
            refuse("shifts and rotations must not both be empty or 0")
        for by in rotations:
            require_in("[-360, 360]", rotations=by)
        require_seed(seed=seed)
        self.seed = seed

    def __call__(self, run: TrainedRun) -> Findings:
        """Return accuracy, change and R² for each kind of move; as scalars the R² of one map per class."""
        run.require_single_label()
        split = run.dataset.read("test")
        split = split.take(run.sampled(split.size))
        self._check_shifts(split)
        unmoved = _class_poses(run, split, "unmoved")
        if unmoved.correct.sum() < 2:
            raise UserError("fewer than 2 images are classified correctly: there are no poses to follow")
        numbers: dict[str, Any] = {
            "pictures": split.size,
            "accuracy": unmoved.correct.double().mean().item(),
            "moves": {},
        }
        changes = {}
        for name, (move, amounts) in self.moves.items():
            accuracies, differences = [], []
            for by in amounts:
                moved = _class_poses(run, split._replace(images=move(split.images, by)), f"{name} {by:+g}")
                accuracies.append(moved.correct.double().mean().item())
                differences.append((moved.poses - unmoved.poses)[unmoved.correct])
            change = torch.stack(differences, 1).double()  # [N, M, D]
            metrics = self._metrics(change, unmoved, amounts)
            metrics |= {"by": amounts, "accuracy": accuracies, **_slopes(run, name, change, amounts)}
            numbers["moves"][name], changes[name] = metrics, change.mean(0)
            numbers[f"r2/{name}"] = metrics["r2"]["each_class"]
        figures = {
            "equivariance": _figure(numbers["moves"], numbers["accuracy"]),
            "equivariance-poses": _pose_figure(changes, numbers["moves"]),
        }
        return Findings(numbers, figures)

    def _check_shifts(self, split: Split) -> None:
        height, width = split.images.shape[2:]
        for name in self.moves.keys() - {"rotation"}:
            farthest = max(self.moves[name][1], key=abs)
            if abs(farthest) >= min(height, width):
                raise UserError(f"study.shifts: must be < the image's {height}x{width}, got {farthest}")

    def _metrics(
        self, change: Float[Tensor, "N M D"], unmoved: ClassPoses, amounts: Sequence[int | float]
    ) -> dict[str, Any]:
        labels = unmoved.labels[unmoved.correct]
        size = unmoved.poses[unmoved.correct].double().norm(dim=1)
        order = torch.randperm(len(change), generator=torch.Generator().manual_seed(self.seed))
        fitted = torch.zeros(len(change), dtype=torch.bool)
        fitted[order[: len(change) // 2]] = True
        by = torch.tensor(amounts, dtype=torch.float64).expand(len(change), -1).unsqueeze(2)  # [N, M, 1]
        single_group = torch.zeros_like(labels)
        smallest = torch.finfo(size.dtype).tiny
        return {
            "relative_change": (change.norm(dim=2) / size.clamp_min(smallest)[:, None]).mean(0).tolist(),
            "r2": {
                "one_map": held_out_r2(change, by, single_group, fitted),
                "each_class": held_out_r2(change, by, labels, fitted),
            },
            "explained": {
                "one_map": held_out_r2(by, change, single_group, fitted),
                "each_class": held_out_r2(by, change, labels, fitted),
            },
        }


def held_out_r2(
    inputs: Float[Tensor, "N M P"],
    outputs: Float[Tensor, "N M Q"],
    groups: Tensor,
    fitted: Bool[Tensor, " N"],
) -> float | None:
    """Return R² of linear least squares with a constant, with one fit per group.

    Args:
        inputs: P numbers for each of N images and M moves.
        outputs: Q numbers to predict from them.
        groups: of each image.
        fitted: images to fit to; R² is over the others.

    Returns:
        1 is perfect, 0 no better than the mean of the outputs, below 0 worse. None if no group has both more
        rows to fit to than coefficients and other rows to evaluate on.
    """
    truths, errors = [], []
    for group in groups.unique():
        in_group = groups == group
        train, test = in_group & fitted, in_group & ~fitted
        if train.sum() * inputs.shape[1] <= inputs.shape[2] + 1 or not test.any():
            continue
        weights = torch.linalg.lstsq(
            _with_constant(inputs[train]), outputs[train].flatten(0, 1), driver="gelsd"
        )
        truths.append(outputs[test].flatten(0, 1))
        errors.append(truths[-1] - _with_constant(inputs[test]) @ weights.solution)
    if not truths:
        return None
    truth = torch.cat(truths)
    total = (truth - truth.mean(0)).square().sum()
    return (1 - torch.cat(errors).square().sum() / total).item() if total else None


def _with_constant(inputs: Float[Tensor, "N M P"]) -> Float[Tensor, "R P1"]:
    return F.pad(inputs.flatten(0, 1), [0, 1], value=1.0)


def _class_poses(run: TrainedRun, split: Split, description: str) -> ClassPoses:
    poses, correct = [], []
    for batch, output in run.outputs(split, description=description):
        top = [*output.layers.values()][-1:]
        if not top:
            raise UserError("this network has no capsules, so there are no poses to follow")
        rows = torch.arange(len(batch.labels), device=batch.labels.device)
        poses.append(top[0].poses[rows, batch.labels].cpu())
        correct.append((output.scores.argmax(1) == batch.labels).cpu())
    return ClassPoses(torch.cat(poses), split.labels, torch.cat(correct))


def _slopes(
    run: TrainedRun, name: str, change: Float[Tensor, "N M D"], amounts: Sequence[int | float]
) -> dict[str, Any]:
    """Return how fast the two coordinates of a pose follow a shift; 1 is the rate of coordinate addition."""
    layer = getattr(run.model, "class_caps", None)
    elements = getattr(layer, "coordinate_elements", None)
    if layer is None or elements is None or name == "rotation":
        return {}
    by = torch.tensor(amounts, dtype=torch.float64)
    slopes = (change.mean(0) * by[:, None]).sum(0) / by.square().sum() / layer.coordinate_scale
    return {"slope_of_row": slopes[elements[0]].item(), "slope_of_column": slopes[elements[1]].item()}


def _down(images: UInt8[Tensor, "N C H W"], by: int | float) -> UInt8[Tensor, "N C H W"]:
    return F.pad(images, [0, 0, int(by), -int(by)])


def _right(images: UInt8[Tensor, "N C H W"], by: int | float) -> UInt8[Tensor, "N C H W"]:
    return F.pad(images, [int(by), -int(by), 0, 0])


def rotated(images: UInt8[Tensor, "N C H W"], by: int | float) -> UInt8[Tensor, "N C H W"]:
    """Rotate images by degrees, counterclockwise around the center."""
    chunks = images.split(RESIZE_CHUNK)
    return torch.cat([rotate(chunk, float(by), InterpolationMode.BILINEAR) for chunk in chunks])


def _figure(moves: Mapping[str, Mapping[str, Any]], accuracy: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(moves) + 1, 5.5), layout="constrained")
    plots = figure.subplots(2, len(moves), squeeze=False, sharex="col", sharey="row")
    for column, (name, metrics) in enumerate(moves.items()):
        by = sorted([*metrics["by"], 0])
        for row, (key, unmoved) in enumerate((("accuracy", accuracy), ("relative_change", 0.0))):
            value = dict(zip(metrics["by"], metrics[key], strict=True)) | {0: unmoved}
            plots[row][column].plot(by, [value[amount] for amount in by], ".-", color=f"C{row}")
            plots[row][column].grid(alpha=0.3)
        r2, explained = metrics["r2"]["each_class"], metrics["explained"]["each_class"]
        title = f"R²: move from pose {_number(r2)}, pose from move {_number(explained)}"
        if "slope_of_row" in metrics:
            title += (
                f"\nslope of row {metrics['slope_of_row']:.2f}, of column {metrics['slope_of_column']:.2f}"
            )
        plots[0][column].set_title(title, fontsize=9)
        plots[1][column].set_xlabel(_axis_label(name))
    highest = max(value for metrics in moves.values() for value in metrics["relative_change"])
    plots[0][0].set(ylabel="accuracy", ylim=(0, 1.02))
    plots[1][0].set_ylim(0, 1.1 * highest or 1)
    plots[1][0].set_ylabel("|change of the pose| / |pose|")
    return figure


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _axis_label(move: str) -> str:
    return "rotation, degrees" if move == "rotation" else f"{move}, pixels"


def _pose_figure(
    changes: Mapping[str, Float[Tensor, "M D"]], moves: Mapping[str, Mapping[str, Any]]
) -> "Figure":
    """Return a heat map per kind of move: the mean change of each dimension of the pose, on one scale."""
    from matplotlib.figure import Figure

    size = next(iter(changes.values())).shape[1]
    rows, height = range(size if size <= TALLEST else 0), 0.22 * min(size, TALLEST) + 1.5
    figure = Figure(figsize=(3.5 * len(changes) + 1, height), layout="constrained")
    plots = figure.subplots(1, len(changes), squeeze=False, sharey=True)[0]
    largest = max(change.abs().max().item() for change in changes.values()) or 1.0
    for plot, (name, change) in zip(plots, changes.items(), strict=True):
        by = moves[name]["by"]
        order = sorted(range(len(by)), key=by.__getitem__)
        image = plot.imshow(change[order].T.numpy(), cmap="bwr", vmin=-largest, vmax=largest, aspect="auto")
        plot.set_xticks(range(len(by)), [f"{by[place]:+g}" for place in order], fontsize=8)
        plot.set_yticks(rows, [str(dimension) for dimension in rows], fontsize=7)
        plot.set_xlabel(_axis_label(name))
    plots[0].set_ylabel("dimension of the pose")
    figure.colorbar(image, ax=plots, label="mean change")
    return figure
