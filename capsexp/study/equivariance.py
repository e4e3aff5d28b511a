"""Whether the pose of a class capsule moves as its picture moves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import InterpolationMode, rotate

from capsexp.analysis.findings import Findings
from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Routed
from capsexp.data.preprocess import RESIZE_CHUNK
from capsexp.data.split import Split
from capsexp.errors import UserError

Move = Callable[[UInt8[Tensor, "N C H W"], int | float], UInt8[Tensor, "N C H W"]]


class Seen(NamedTuple):
    """What the network makes of all pictures."""

    poses: Float[Tensor, "N D"]
    """Of the capsule of each picture's own class."""
    labels: Tensor
    right: Bool[Tensor, " N"]


class Equivariance:
    """The class capsule's pose before and after known shifts and rotations of the input.

    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), and Hinton et al., "Matrix capsules with EM
    routing" (ICLR 2018), claim that poses change as the viewpoint does, and measure it in no number. Ours: a
    pose is equivariant where a linear map tells from its change by how much the picture was moved.

    The pictures in memory are moved, before any crop and standardisation; what comes in is black, and further
    picture where there was a crop. Poses are those of pictures that are classified right unmoved: the capsule
    of a class that is not seen has nothing to say.

    Args:
        shifts: in pixels, down and to the right; 0 is left out.
        rotations: in degrees, anticlockwise about the middle, bilinear; 0 is left out.
        seed: of the halves: maps are fitted to one half of the pictures and judged on the other.

    Raises:
        ValueError: no shift and no rotation.
    """

    def __init__(self, *, shifts: Sequence[int], rotations: Sequence[int | float], seed: int) -> None:
        self.moves: dict[str, tuple[Move, list[int | float]]] = {
            "down": (_down, [by for by in shifts if by]),
            "right": (_right, [by for by in shifts if by]),
            "rotation": (_rotated, [by for by in rotations if by]),
        }
        self.moves = {name: one for name, one in self.moves.items() if one[1]}
        if not self.moves:
            raise ValueError("shifts and rotations must not both be empty or 0")
        self.seed = seed

    def __call__(self, subject: TrainedRun) -> Findings:
        """Accuracy, change and R² for each kind of move; as scalars the R² of one map for each class."""
        subject.require_single_label()
        split = subject.components.dataset.read("test")
        split = split.take(subject.sampled(split.size))
        self._require_in_sight(split)
        unmoved = _seen(subject, split, "unmoved")
        if unmoved.right.sum() < 2:
            raise UserError("fewer than 2 pictures are classified right: there are no poses to follow")
        numbers: dict[str, Any] = {
            "pictures": split.size,
            "accuracy": unmoved.right.double().mean().item(),
            "moves": {},
        }
        changes = {}
        for name, (move, amounts) in self.moves.items():
            accuracies, moved = [], []
            for by in amounts:
                there = _seen(subject, split._replace(images=move(split.images, by)), f"{name} {by:+g}")
                accuracies.append(there.right.double().mean().item())
                moved.append((there.poses - unmoved.poses)[unmoved.right])
            change = torch.stack(moved, 1).double()  # [N, M, D]
            told = self._told(change, unmoved, amounts)
            told |= {"by": amounts, "accuracy": accuracies, **_slopes(subject, name, change, amounts)}
            numbers["moves"][name], changes[name] = told, change.mean(0)
            numbers[f"r2/{name}"] = told["r2"]["each_class"]
        figures = {
            "equivariance": _drawn(numbers["moves"], numbers["accuracy"]),
            "equivariance-poses": _changes(changes, numbers["moves"]),
        }
        return Findings(numbers, figures)

    def _require_in_sight(self, split: Split) -> None:
        height, width = split.images.shape[2:]
        for name in self.moves.keys() - {"rotation"}:
            farthest = max(self.moves[name][1], key=abs)
            if abs(farthest) >= min(height, width):
                raise UserError(f"study.shifts: must be < the picture's {height}x{width}, got {farthest}")

    def _told(
        self, change: Float[Tensor, "N M D"], unmoved: Seen, amounts: Sequence[int | float]
    ) -> dict[str, Any]:
        labels, size = unmoved.labels[unmoved.right], unmoved.poses[unmoved.right].double().norm(dim=1)
        order = torch.randperm(len(change), generator=torch.Generator().manual_seed(self.seed))
        fitted = torch.zeros(len(change), dtype=torch.bool)
        fitted[order[: len(change) // 2]] = True
        by = torch.tensor(amounts, dtype=torch.float64).expand(len(change), -1).unsqueeze(2)  # [N, M, 1]
        everything = torch.zeros_like(labels)
        smallest = torch.finfo(size.dtype).tiny
        return {
            "relative_change": (change.norm(dim=2) / size.clamp_min(smallest)[:, None]).mean(0).tolist(),
            "r2": {
                "one_map": held_out_r2(change, by, everything, fitted),
                "each_class": held_out_r2(change, by, labels, fitted),
            },
            "explained": {
                "one_map": held_out_r2(by, change, everything, fitted),
                "each_class": held_out_r2(by, change, labels, fitted),
            },
        }


def held_out_r2(
    inputs: Float[Tensor, "N M P"],
    outputs: Float[Tensor, "N M Q"],
    groups: Tensor,
    fitted: Bool[Tensor, " N"],
) -> float | None:
    """R² of linear least squares with a constant, one fit for each group.

    Args:
        inputs: P numbers for each of N pictures and M moves.
        outputs: Q numbers to be told from them.
        groups: of each picture.
        fitted: pictures to fit to; R² is over the others.
    Returns: 1 is perfect, 0 no better than the mean of what is told, below 0 worse. None if no group has more
        rows to fit to than coefficients and others to be judged by.
    """
    truths, errors = [], []
    for group in groups.unique():
        here = groups == group
        train, test = here & fitted, here & ~fitted
        if train.sum() * inputs.shape[1] <= inputs.shape[2] + 1 or not test.any():
            continue
        weights = torch.linalg.lstsq(_with_one(inputs[train]), outputs[train].flatten(0, 1), driver="gelsd")
        truths.append(outputs[test].flatten(0, 1))
        errors.append(truths[-1] - _with_one(inputs[test]) @ weights.solution)
    if not truths:
        return None
    truth = torch.cat(truths)
    total = (truth - truth.mean(0)).square().sum()
    return (1 - torch.cat(errors).square().sum() / total).item() if total else None


def _with_one(inputs: Float[Tensor, "N M P"]) -> Float[Tensor, "R P1"]:
    return F.pad(inputs.flatten(0, 1), [0, 1], value=1.0)


def _seen(subject: TrainedRun, split: Split, what: str) -> Seen:
    poses, right = [], []
    for batch, output in subject.outputs(split, description=what):
        top = [*output.layers.values()][-1:]
        if not top or not isinstance(top[0], Routed):
            raise UserError("this network has no capsules, so there are no poses to follow")
        rows = torch.arange(len(batch.labels), device=batch.labels.device)
        poses.append(top[0].poses[rows, batch.labels].cpu())
        right.append((output.scores.argmax(1) == batch.labels).cpu())
    return Seen(torch.cat(poses), split.labels, torch.cat(right))


def _slopes(
    subject: TrainedRun, name: str, change: Float[Tensor, "N M D"], amounts: Sequence[int | float]
) -> dict[str, Any]:
    """How fast the two coordinates of a pose follow a shift; 1 is as fast as coordinate addition says."""
    layer = getattr(subject.model, "class_caps", None)
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


def _rotated(images: UInt8[Tensor, "N C H W"], by: int | float) -> UInt8[Tensor, "N C H W"]:
    chunks = images.split(RESIZE_CHUNK)
    return torch.cat([rotate(chunk, float(by), InterpolationMode.BILINEAR) for chunk in chunks])


def _drawn(moves: Mapping[str, Mapping[str, Any]], accuracy: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(moves) + 1, 5.5), layout="constrained")
    plots = figure.subplots(2, len(moves), squeeze=False, sharex="col", sharey="row")
    for column, (name, one) in enumerate(moves.items()):
        by = sorted([*one["by"], 0])
        for row, (key, there) in enumerate((("accuracy", accuracy), ("relative_change", 0.0))):
            value = dict(zip(one["by"], one[key], strict=True)) | {0: there}
            plots[row][column].plot(by, [value[amount] for amount in by], ".-", color=f"C{row}")
            plots[row][column].grid(alpha=0.3)
        r2, explained = one["r2"]["each_class"], one["explained"]["each_class"]
        title = f"R²: move from pose {_figure(r2)}, pose from move {_figure(explained)}"
        if "slope_of_row" in one:
            title += f"\nslope of row {one['slope_of_row']:.2f}, of column {one['slope_of_column']:.2f}"
        plots[0][column].set_title(title, fontsize=9)
        plots[1][column].set_xlabel("rotation, degrees" if name == "rotation" else f"{name}, pixels")
    highest = max(value for one in moves.values() for value in one["relative_change"])
    plots[0][0].set(ylabel="accuracy", ylim=(0, 1.02))
    plots[1][0].set_ylim(0, 1.1 * highest or 1)
    plots[1][0].set_ylabel("|change of the pose| / |pose|")
    return figure


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _changes(changes: Mapping[str, Float[Tensor, "M D"]], moves: Mapping[str, Mapping[str, Any]]) -> Any:
    """The mean change of each dimension by each move, on one scale."""
    from matplotlib.figure import Figure

    size = next(iter(changes.values())).shape[1]
    figure = Figure(figsize=(3.5 * len(changes) + 1, 0.22 * size + 1.5), layout="constrained")
    plots = figure.subplots(1, len(changes), squeeze=False, sharey=True)[0]
    reach = max(one.abs().max().item() for one in changes.values()) or 1.0
    for plot, (name, change) in zip(plots, changes.items(), strict=True):
        by = moves[name]["by"]
        order = sorted(range(len(by)), key=by.__getitem__)
        shown = plot.imshow(change[order].T.numpy(), cmap="bwr", vmin=-reach, vmax=reach, aspect="auto")
        plot.set_xticks(range(len(by)), [f"{by[place]:+g}" for place in order], fontsize=8)
        plot.set_yticks(range(size), [str(dimension) for dimension in range(size)], fontsize=7)
        plot.set_xlabel("rotation, degrees" if name == "rotation" else f"{name}, pixels")
    plots[0].set_ylabel("dimension of the pose")
    figure.colorbar(shown, ax=plots, label="mean change")
    return figure
