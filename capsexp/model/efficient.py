"""Efficient-CapsNet: few capsules on a stack of convolutions, for images of any size."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Output
from capsexp.errors import refuse, require_at_least_1, require_in, require_literal, stop_if_refused
from capsexp.layer.capsule_norm import ChannelNorm
from capsexp.layer.class_caps import ClassCaps
from capsexp.layer.decoder import Decode, check_decode, decoded_class
from capsexp.layer.whole_map_primary import WholeMapPrimaryCaps
from capsexp.ops.receptive_fields import Grid
from capsexp.ops.weights import kernels_and_matrices
from capsexp.routing import BalancedRouting

Norm = Literal["batch", "instance"]
NormStart = Literal["default", "official"]


class EfficientCapsNet(nn.Module):
    """Convolutions with normalisation, primary capsules that see the whole map, class capsules, decoder.

    Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet: capsule network with self-attention routing" (Scientific
    Reports 11, 2021).
    Differs from it in: the decoder of every dataset is the fully connected one, whose target is the image in
    [0, 1]; the authors' target on smallNORB is the standardised image, which a sigmoid cannot reach. What we
    found no source for is ours: each convolution is followed by the activation and then the normalisation,
    with PyTorch's epsilon and momentum; kernels start from He's normal. So do the matrices, with the fan-in
    I K J of a kernel [I, K, J, D]: on MNIST their standard deviation is 0.04.

    The batch normalisation sees the images of a step, or those of a piece with `trainer.accumulate`.

    Args:
        image_shape: channels, height and width.
        classes: number of classes, one capsule each.
        conv_channels, conv_kernels, conv_strides: of the convolutions, without padding.
        leak: slope of the activation below 0; 0 is ReLU.
        norm: "batch" or "instance" normalisation after each activation, with gain and bias.
        norm_start: gains start at 1 and biases at 0 ("default"), or both are uniform in ±0.05 ("official").
        primary_dim: pose size of the primary capsules; the last of conv_channels is a multiple of it.
        class_dim, shared_transformations, votes_mib, routing: see `ClassCaps`.
        decode: see `CapsNet`.
        decoder: builds the decoder from (classes, pose_dim, image_shape); None for a network without.
    Raises: ValueError: an image that is too small (the message has the smallest size), a size below 1, lists
        of different lengths, an unknown option.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        conv_channels: Sequence[int],
        conv_kernels: Sequence[int],
        conv_strides: Sequence[int],
        leak: int | float,
        norm: Norm,
        norm_start: NormStart,
        primary_dim: int,
        class_dim: int,
        shared_transformations: bool,
        decode: Decode | int,
        votes_mib: int | float | None,
        routing: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module] | None,
    ) -> None:
        super().__init__()
        require_at_least_1(
            conv_channels=conv_channels,
            conv_kernels=conv_kernels,
            conv_strides=conv_strides,
            primary_dim=primary_dim,
            class_dim=class_dim,
        )
        require_in("[0, 1)", leak=leak)
        require_literal(Norm, norm=norm)
        require_literal(NormStart, norm_start=norm_start)
        check_decode(decode, classes)
        stop_if_refused()
        _check_lengths(conv_channels, conv_kernels, conv_strides)
        if conv_channels[-1] % primary_dim:
            last = conv_channels[-1]
            refuse(f"the last of conv_channels must be a multiple of primary_dim {primary_dim}, got {last}")
        stop_if_refused()
        sizes = list(zip(conv_kernels, conv_strides, strict=True))
        features = _map_of(image_shape, sizes, smallest=2 if norm == "instance" else 1)
        self.decode: Decode | int = decode
        channels = pairwise([image_shape[0], *conv_channels])
        self.convs = nn.Sequential(*_convolutions(channels, sizes, leak, norm))
        self.primary_caps = WholeMapPrimaryCaps(conv_channels[-1], features, dim=primary_dim)
        self.grid = features.after_convolution((features.rows, features.columns), 1)
        """The only position of the primary capsules."""
        self.class_caps = ClassCaps(
            self.primary_caps.types,
            primary_dim,
            classes,
            class_dim,
            shared_transformations=shared_transformations,
            routing=routing,
            votes_mib=votes_mib,
        )
        self.decoder = None if decoder is None else decoder(classes, class_dim, image_shape)
        self._initialise(norm_start)

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B *T"] | None = None) -> Output:
        """Lengths of the class capsules, and the image decoded from one of them."""
        primary = self.primary_caps(self.convs(images))
        routed = self.class_caps(primary)
        lengths = routed.activations
        reconstruction = None
        if self.decoder is not None:
            reconstruction = self.decoder(routed.poses, decoded_class(self.decode, lengths, labels))
        return Output(
            scores=lengths,
            probabilities=lengths,
            layers={"primary_caps": primary, "class_caps": routed},
            reconstruction=reconstruction,
            weights=kernels_and_matrices(self),
        )

    @torch.no_grad()
    def calibrate(self, images: Float[Tensor, "B C H W"]) -> None:
        """Start with half of the class capsules active on these images, under a `BalancedRouting` (EM)."""
        if isinstance(self.class_caps.routing, BalancedRouting):
            self.class_caps.calibrate(self.primary_caps(self.convs(images)))

    def _initialise(self, norm_start: NormStart) -> None:
        for module in self.convs:
            for parameter in module.parameters():
                if parameter.ndim == 4:
                    nn.init.kaiming_normal_(parameter)
                elif isinstance(module, nn.Conv2d):
                    nn.init.zeros_(parameter)
                elif norm_start == "official":
                    nn.init.uniform_(parameter, -0.05, 0.05)
        weight = self.class_caps.weight
        nn.init.normal_(weight, std=math.sqrt(2 / math.prod(weight.shape[:3])))


def _convolutions(
    channels: Iterator[tuple[int, int]], sizes: Sequence[tuple[int, int]], leak: int | float, norm: Norm
) -> Iterator[nn.Module]:
    """Yield the convolutions, each with its activation and its normalisation."""
    for (before, after), (kernel, stride) in zip(channels, sizes, strict=True):
        yield nn.Conv2d(before, after, kernel, stride)
        yield nn.LeakyReLU(leak)
        yield (
            ChannelNorm(after, norm="batch", affine=True)
            if norm == "batch"
            else nn.InstanceNorm2d(after, affine=True)
        )


def _check_lengths(channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int]) -> None:
    if not len(channels) == len(kernels) == len(strides):
        refuse(
            "conv_channels, conv_kernels and conv_strides must have one number per convolution, "
            f"got {len(channels)}, {len(kernels)} and {len(strides)}"
        )


def _map_of(image_shape: Sequence[int], sizes: Sequence[tuple[int, int]], *, smallest: int) -> Grid:
    """The map after the convolutions; an image that leaves a smaller side than `smallest` is refused."""
    side = smallest
    for kernel, stride in reversed(sizes):
        side = (side - 1) * stride + kernel
    height, width = image_shape[1:]
    if min(height, width) < side:
        kernels, strides = ([size[place] for size in sizes] for place in (0, 1))
        refuse(
            f"image_shape must be at least {side}x{side} for conv_kernels {kernels} and "
            f"conv_strides {strides}, got {height}x{width}"
        )
    stop_if_refused()
    grid = Grid(height, width)
    for kernel, stride in sizes:
        grid = grid.after_convolution((kernel, kernel), stride)
    return grid
