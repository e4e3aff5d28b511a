"""Primary capsules that each see a whole map of features."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules
from capsexp.errors import refuse, require_at_least_1, stop_if_refused
from capsexp.ops.receptive_fields import Grid
from capsexp.ops.squash import exponential_squash, length


class WholeMapPrimaryCaps(nn.Module):
    """Primary capsules of Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet" (Scientific Reports 11, 2021).

    A depthwise convolution with a kernel as large as the map makes one number of each channel; `dim` channels
    in a row are one capsule, squashed by `exponential_squash`.
    Differs from it in: nothing. The kernels start as PyTorch starts a convolution.

    Args:
        in_channels: channels of the features, a multiple of dim.
        grid: rows and columns of the features.
        dim: pose size.
    Raises: ValueError: a number < 1; in_channels is no multiple of dim.
    """

    def __init__(self, in_channels: int, grid: Grid, *, dim: int = 8) -> None:
        super().__init__()
        require_at_least_1(in_channels=in_channels, rows=grid.rows, columns=grid.columns, dim=dim)
        stop_if_refused()
        if in_channels % dim:
            refuse(f"in_channels must be a multiple of dim ({dim}), got {in_channels}")
        self.types, self.dim = in_channels // dim, dim
        self.weight = nn.Parameter(torch.empty(in_channels, grid.rows, grid.columns))
        self.bias = nn.Parameter(torch.empty(in_channels))
        bound = 1 / math.sqrt(grid.positions)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Capsules:
        """Capsules in the order of their channels."""
        # With one place a depthwise convolution is a product and a sum. On a CPU these are several times
        # faster than PyTorch's convolution, forward and backward.
        numbers = (features * self.weight).sum((2, 3)) + self.bias
        poses = exponential_squash(numbers.unflatten(1, (self.types, self.dim)))
        return Capsules(poses, length(poses))

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"types={self.types}, dim={self.dim}"
