"""Which children each parent of a convolutional layer sees, and where in the image they lie.

Capsules of a grid are in the order (row, column, type). A parent position sees a window of the grid; the
places of a window are in the same order.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import ReceptiveFields
from capsexp.errors import refuse

Padding = Literal["valid", "same"]


def margins(size: int, kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Zeros before and after an axis: none for "valid"; for "same" as TensorFlow, the odd one at the end."""
    if padding == "valid":
        return 0, 0
    missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return missing // 2, missing - missing // 2


def require_kernels(image_shape: Sequence[int], **kernels: int | Sequence[int]) -> None:
    """Check kernels against the image: with any padding, each weight must see a pixel.

    "same" centers a kernel on each pixel, so that a kernel of up to 2 n - 1 reaches from one border of an
    image of side n to the other. "valid" allows up to n, which the networks check.

    Args:
        image_shape: channels, height and width.
        kernels: a side, or a list of sides, by the name of the argument.

    Raises:
        ValueError: a kernel is twice as large as the image, or larger.
    """
    height, width = image_shape[1:]
    for name, kernel in kernels.items():
        sides = [kernel] if isinstance(kernel, int) else list(kernel)
        if sides and max(sides) >= 2 * min(height, width):
            refuse(f"{name} must be < twice the image's {height}x{width}, got {kernel}")


def padded(features: Float[Tensor, "B C H W"], kernel: int, stride: int, padding: Padding) -> Tensor:
    """Pad features with the zeros of `margins`."""
    height, width = features.shape[2:]
    sides = [*margins(width, kernel, stride, padding), *margins(height, kernel, stride, padding)]
    return F.pad(features, sides) if any(sides) else features


class Grid(NamedTuple):
    """Positions of a layer, and the pixels at the centers of their receptive fields."""

    rows: int
    columns: int
    first: tuple[float, float] = (0.0, 0.0)
    """Row and column, in pixels of the image, at the center of the first position's receptive field."""
    step: int = 1
    """Pixels between the centers of neighbors."""

    @property
    def positions(self) -> int:
        """Rows times columns."""
        return self.rows * self.columns

    def after_convolution(self, kernel: tuple[int, int], stride: int, padding: Padding = "valid") -> "Grid":
        """The grid of a convolution over this one; 0 rows or less where the kernel does not fit."""
        sizes, first = [], []
        for axis, size in enumerate((self.rows, self.columns)):
            before, after = margins(size, kernel[axis], stride, padding)
            sizes.append((size + before + after - kernel[axis]) // stride + 1)
            first.append(self.first[axis] + self.step * ((kernel[axis] - 1) / 2 - before))
        return Grid(sizes[0], sizes[1], (first[0], first[1]), self.step * stride)

    def bordered(self, border: int) -> "Grid":
        """The grid with so many more positions on each side."""
        first = (self.first[0] - border * self.step, self.first[1] - border * self.step)
        return Grid(self.rows + 2 * border, self.columns + 2 * border, first, self.step)

    def centres(self) -> Float[Tensor, "P 2"]:
        """Row and column, in pixels, at the center of each position's receptive field."""
        rows = self.first[0] + self.step * torch.arange(self.rows)
        columns = self.first[1] + self.step * torch.arange(self.columns)
        return torch.cartesian_prod(rows, columns).view(-1, 2).to(torch.get_default_dtype())


def with_border(values: Float[Tensor, "B I *rest"], grid: Grid, border: int) -> Tensor:
    """Values of the capsules of a grid, with zeros for those of a border around it.

    Args:
        values: of each capsule.
        grid: positions of the capsules.
        border: positions on each side.
    Returns: values in the order of `grid.bordered(border)`.
    """
    by_position = values.reshape(len(values), grid.rows, grid.columns, -1)
    padded_values = F.pad(by_position, (0, 0, border, border, border, border))
    return padded_values.reshape(len(values), -1, *values.shape[2:])


def receptive_fields(grid: Grid, types: int, kernel: tuple[int, int], stride: int) -> ReceptiveFields:
    """Windows over a grid of capsules, without padding.

    Args:
        grid: positions of the children.
        types: of the children.
        kernel: rows and columns of a window.
        stride: from one window to the next.
    """
    indices = torch.arange(grid.positions * types).view(grid.rows, grid.columns, types)
    windows = indices.unfold(0, kernel[0], stride).unfold(1, kernel[1], stride)
    children = windows.permute(0, 1, 3, 4, 2).flatten(0, 1).flatten(1)  # (row, column, type) of a place
    return ReceptiveFields(children, indices.numel(), _connected(grid, kernel, stride) * types)


def gather_windows(
    values: Float[Tensor, "B I *rest"], fields: ReceptiveFields
) -> Float[Tensor, "B P K *rest"]:
    """The value of the child at each place of each window, given the value of each child."""
    # The gradient of index_select is index_add, many times faster than the gradient of values[:, children].
    flat = values.index_select(1, fields.children.flatten())
    return flat.unflatten(1, tuple(fields.children.shape))


def scatter_sum(values: Float[Tensor, "B P K *rest"], fields: ReceptiveFields) -> Float[Tensor, "B I *rest"]:
    """Sum over all places at which each child occurs; 0 for a child without parents."""
    total = values.new_zeros(len(values), fields.in_caps, *values.shape[3:])
    return total.index_add(1, fields.children.flatten(), values.flatten(1, 2))


def scatter_max(values: Float[Tensor, "B P K *rest"], fields: ReceptiveFields) -> Float[Tensor, "B I *rest"]:
    """Maximum over all places at which each child occurs; -inf for a child without parents. No gradient."""
    flat = values.detach().flatten(1, 2)
    places = fields.children.flatten().view(1, -1, *(1 for _ in flat.shape[2:])).expand_as(flat)
    lowest = flat.new_full((len(flat), fields.in_caps, *flat.shape[2:]), -math.inf)
    return lowest.scatter_reduce(1, places, flat, "amax")


def _connected(grid: Grid, kernel: tuple[int, int], stride: int) -> int:
    """Number of grid positions that some window covers."""
    places = grid.after_convolution(kernel, stride)
    count = 1
    for windows, size in zip((places.rows, places.columns), kernel, strict=True):
        count *= (windows - 1) * min(stride, size) + size
    return count
