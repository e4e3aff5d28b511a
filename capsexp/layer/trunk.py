"""The convolutions below capsules of Heinsen 2019, and its primary capsules."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules
from capsexp.errors import refuse, require_at_least_1
from capsexp.layer.capsule_norm import ChannelNorm, Norm, require_norm
from capsexp.ops.receptive_fields import Grid

KERNEL = 3


class Trunk(nn.Module):
    """Blocks of a norm, a 3x3 convolution without padding and swish.

    The convolutions of Heinsen, "An algorithm for routing capsules in all domains" (arXiv 1911.00792), for
    smallNORB: Kaiming normal kernels, biases from 0, row and column as two more channels of the image.
    Differs from it in: nothing, with six blocks of 64 channels, strides 1, 2, 1, 2, 1, 2 and norm "batch".

    Args:
        image_shape: channels, height and width.
        channels, strides: of each block.
        coordinates: add two channels with the row and the column of a pixel, from -1 to 1.
        norm: before each convolution: "batch", over the batch, with a gain and a bias per channel; "group",
            over each image by itself; "none".
    Raises: ValueError: lists of different lengths, a number < 1, an image that is too small, an unknown norm.
    """

    coordinates: Tensor | None
    """[2, H, W]."""
    grid: Grid
    """Positions of the features."""

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        channels: Sequence[int] = (64,) * 6,
        strides: Sequence[int] = (1, 2, 1, 2, 1, 2),
        coordinates: bool = True,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        require_trunk(image_shape, channels=channels, strides=strides, norm=norm)
        depth, height, width = image_shape
        self.channels = channels[-1]
        self.register_buffer("coordinates", _coordinates(height, width) if coordinates else None, False)
        self.grid = Grid(height, width)
        blocks = []
        widths = pairwise([depth + 2 * coordinates, *channels])
        for (before, after), stride in zip(widths, strides, strict=True):
            blocks.append(ConvBlock(before, after, kernel=KERNEL, stride=stride, norm=norm))
            self.grid = self.grid.after_convolution((KERNEL, KERNEL), stride)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F h w"]:
        """Features of the images."""
        features = images
        if self.coordinates is not None:
            planes = self.coordinates.to(images.dtype).expand(len(images), -1, -1, -1)
            features = torch.cat([images, planes], 1)
        for block in self.blocks:
            features = nn.functional.silu(block(features))
        return features


class ConvBlock(nn.Module):
    """A norm, then a convolution without padding whose kernels start Kaiming normal and biases from 0.

    Args:
        in_channels, out_channels, kernel, stride: of the convolution.
        norm: "batch", "group" or "none"; see `Trunk`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.norm = None if norm == "none" else ChannelNorm(in_channels, norm=norm, affine=True)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride)
        nn.init.kaiming_normal_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F h w"]:
        """Normalize and convolve."""
        if self.norm is not None:
            features = self.norm(features.flatten(2)).view(features.shape)
        convolved: Tensor = self.conv(features)
        return convolved


class TrunkPrimaryCaps(nn.Module):
    """Primary capsules: a norm and a 1x1 convolution to scores, another norm and 1x1 convolution to poses.

    Heinsen, "An algorithm for routing capsules in all domains" (arXiv 1911.00792).
    Differs from it in: nothing, with norm "batch".

    Args:
        in_channels: of the features.
        types: capsule types.
        pose_dim: numbers of a pose.
        norm: see `Trunk`.
    """

    def __init__(self, in_channels: int, *, types: int, pose_dim: int = 16, norm: Norm = "batch") -> None:
        super().__init__()
        require_at_least_1(types=types, pose_dim=pose_dim)
        require_norm(norm=norm)
        self.types, self.pose_dim = types, pose_dim
        self.score = ConvBlock(in_channels, types, kernel=1, stride=1, norm=norm)
        self.pose = ConvBlock(in_channels, types * pose_dim, kernel=1, stride=1, norm=norm)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Capsules:
        """Capsules in the order (row, column, type); activations are the sigmoid of the scores."""
        poses = self.pose(features).permute(0, 2, 3, 1).reshape(len(features), -1, self.pose_dim)
        scores = self.score(features).permute(0, 2, 3, 1).flatten(1)
        return Capsules(poses, scores.sigmoid())

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"types={self.types}, pose_dim={self.pose_dim}"


def require_trunk(
    image_shape: Sequence[int], *, channels: Sequence[int], strides: Sequence[int], norm: Norm
) -> None:
    """Check the arguments of a `Trunk`.

    Raises:
        ValueError: see `Trunk`.
    """
    require_at_least_1(channels=channels, strides=strides)
    require_norm(trunk_norm=norm)
    if len(channels) != len(strides):
        refuse(
            "channels and strides must have one number per convolution, "
            f"got {len(channels)} and {len(strides)}"
        )
    height, width = image_shape[1:]
    side = smallest_side(strides)
    if min(height, width) < side:
        refuse(
            f"image_shape must be at least {side}x{side} for strides {[*strides]}, got {height}x{width}; "
            "fewer convolutions need fewer pixels"
        )


def smallest_side(strides: Sequence[int]) -> int:
    """Pixels of an image of which the convolutions leave one position."""
    side = 1
    for stride in reversed(strides):
        side = (side - 1) * stride + KERNEL
    return side


def _coordinates(height: int, width: int) -> Float[Tensor, "2 H W"]:
    """Row and column of each pixel, from -1 to 1."""
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack([rows[:, None].expand(-1, width), columns.expand(height, -1)])
