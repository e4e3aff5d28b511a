"""A residual network below the primary capsules."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.errors import refuse, require_at_least_1, require_literal, stop_if_refused
from capsexp.layer.capsule_norm import ChannelNorm
from capsexp.ops.receptive_fields import Grid

Block = Literal["residual", "plain"]
Shortcut = Literal["pad", "convolution"]
TrunkNorm = Literal["batch", "group"]


class ResNetTrunk(nn.Module):
    """A 3x3 convolution, then stages of blocks of 3x3 convolutions, each with a norm.

    He, Zhang, Ren, Sun, "Deep residual learning for image recognition" (CVPR 2016), section 4.2. Stem 16,
    channels 16, 32, 64, blocks 3, 3, 3 and padded shortcuts make the ResNet-20 for CIFAR-10 without its last
    layer.
    Differs from it in: a block may also be one plain convolution; a channel with one value in a training
    batch becomes 0, see `ChannelNorm`.

    Args:
        in_channels: of the images.
        stem: channels of the first convolution.
        channels: of each stage.
        blocks: number of blocks of each stage.
        strides: of each stage's first block.
        block: "residual": two convolutions, added to a shortcut; "plain": one convolution.
        shortcut: where a residual block changes size: "pad": every stride-th value, with channels of zeros
            (the paper's A); "convolution": 1x1 and a norm (B).
        norm: after each convolution, see `ChannelNorm`.
    Raises: ValueError: lists of different lengths, a number < 1, an unknown option.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        stem: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int],
        block: Block,
        shortcut: Shortcut,
        norm: TrunkNorm,
    ) -> None:
        super().__init__()
        require_at_least_1(stem=stem, channels=channels, blocks=blocks, strides=strides)
        require_literal(Block, block=block)
        require_literal(Shortcut, shortcut=shortcut)
        require_literal(TrunkNorm, norm=norm)
        if not len(channels) == len(blocks) == len(strides):
            got = f"{len(channels)}, {len(blocks)} and {len(strides)}"
            refuse(f"channels, blocks and strides must have one number per stage, got {got}")
        widths = [stem, *channels]
        if block == "residual" and shortcut == "pad" and widths != sorted(widths):
            refuse(f"stem and channels must not shrink with shortcut pad, got {widths}")
        stop_if_refused()
        self.strides, self.out_channels = tuple(strides), widths[-1]
        self.stem = ConvNorm(in_channels, stem, norm=norm)
        self.blocks = nn.ModuleList()
        for width, wide, count, first in zip(widths, channels, blocks, strides, strict=False):
            for number in range(count):
                sizes = (width, wide, first) if number == 0 else (wide, wide, 1)
                if block == "plain":
                    self.blocks.append(ConvNorm(sizes[0], wide, stride=sizes[2], norm=norm))
                else:
                    self.blocks.append(ResidualBlock(*sizes, shortcut=shortcut, norm=norm))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E h w"]:
        """Features, after ReLU."""
        features: Tensor = self.stem(images).relu()
        for block in self.blocks:
            features = block(features).relu()
        return features

    def grid(self, images: Grid) -> Grid:
        """Positions of the features on images with this grid."""
        for stride in self.strides:  # odd kernels, centered on each stride-th position
            rows, columns = -(-images.rows // stride), -(-images.columns // stride)
            images = Grid(rows, columns, images.first, images.step * stride)
        return images


class ConvNorm(nn.Module):
    """A convolution without bias and a norm. Odd kernels with zeros around, so that stride 1 keeps the size.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel: side; odd.
        stride: in both directions.
        norm: see `ChannelNorm`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, norm: TrunkNorm, kernel: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm = ChannelNorm(out_channels, norm=norm, affine=True)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E h w"]:
        """Normalized features."""
        maps: Tensor = self.conv(features)
        normal: Tensor = self.norm(maps.flatten(2)).view_as(maps)
        return normal


class ResidualBlock(nn.Module):
    """Two convolutions, added to a shortcut. See `ResNetTrunk`."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, shortcut: Shortcut, norm: TrunkNorm
    ) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, out_channels - in_channels
        self.first = ConvNorm(in_channels, out_channels, stride=stride, norm=norm)
        self.second = ConvNorm(out_channels, out_channels, norm=norm)
        self.shortcut: ConvNorm | None = None
        changes = stride > 1 or self.new_channels != 0
        if changes and shortcut == "convolution":
            self.shortcut = ConvNorm(in_channels, out_channels, kernel=1, stride=stride, norm=norm)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E h w"]:
        """The sum, before ReLU."""
        added = self.second(self.first(features).relu())
        kept = self._padded(features) if self.shortcut is None else self.shortcut(features)
        total: Tensor = kept + added
        return total

    def _padded(self, features: Tensor) -> Tensor:
        kept = features[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        return F.pad(kept, (0, 0, 0, 0, before, self.new_channels - before)) if self.new_channels else kept
