"""CapsNet: the network of Sabour et al. 2017, for images of any size."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Output
from capsexp.errors import (
    refuse,
    require_at_least_1,
    require_literal,
    require_positive,
    stop_if_refused,
)
from capsexp.layer.class_caps import ClassCaps, Transformation
from capsexp.layer.decoder import Decode, check_decode, decoded_class
from capsexp.layer.primary import PrimaryCaps
from capsexp.ops.receptive_fields import Grid, Padding, require_kernels
from capsexp.ops.weights import kernels_and_matrices
from capsexp.routing import BalancedRouting

Initialisation = Literal["default", "official"]


class CapsNet(nn.Module):
    """Convolution, primary capsules, class capsules, decoder.

    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), sections 4 and 4.1.
    Differs from it in: nothing, with the values of conf/model/dynamic_routing.yaml. What the paper leaves
    open (initialization, which capsule to decode without a label) is a keyword.

    In a training loop of your own, dynamic routing needs no extra calls. With EM routing call
    `calibrate(images)` once, before the first step, and before each step
    `capsexp.routing.advance(network, Step(number, total))`, which moves the inverse temperature.

    Args:
        image_shape: channels, height and width.
        classes: number of classes, one capsule each.
        conv_channels, conv_kernel: of the first convolution, stride 1, ReLU.
        primary_types, primary_dim, primary_kernel, primary_stride, primary_scale: see `PrimaryCaps`.
        padding: "valid" or "same", of both convolutions.
        class_dim: pose size of the class capsules.
        shared_transformations, transformation: see `ClassCaps`.
        initialisation: "default", or "official", that of the authors' code.
        decode: the class to decode: "label": the label if given, else the longest capsule; "prediction":
            always the longest; or a class index.
        votes_mib: see `ClassCaps`.
        routing: see `ClassCaps`.
        decoder: builds the decoder from (classes, pose_dim, image_shape); None for a network without.
    Raises: ValueError: an image that is too small (the message has the smallest size), a size below 1, an
        unknown option.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        conv_channels: int,
        conv_kernel: int,
        primary_types: int,
        primary_dim: int,
        primary_kernel: int,
        primary_stride: int,
        primary_scale: int | float,
        padding: Padding,
        class_dim: int,
        shared_transformations: bool,
        transformation: Transformation,
        initialisation: Initialisation,
        decode: Decode | int,
        votes_mib: int | float | None,
        routing: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module] | None,
    ) -> None:
        super().__init__()
        require_at_least_1(
            conv_channels=conv_channels,
            conv_kernel=conv_kernel,
            primary_types=primary_types,
            primary_dim=primary_dim,
            primary_kernel=primary_kernel,
            primary_stride=primary_stride,
            class_dim=class_dim,
        )
        if padding == "same":  # `_grid` checks "valid"
            require_kernels(image_shape, conv_kernel=conv_kernel, primary_kernel=primary_kernel)
        require_positive(primary_scale=primary_scale)
        check_decode(decode, classes)
        require_literal(Initialisation, initialisation=initialisation)
        require_literal(Transformation, transformation=transformation)
        if transformation == "elementwise" and primary_dim != class_dim:
            got = f"{class_dim} and {primary_dim}"
            refuse(f"transformation elementwise needs class_dim = primary_dim, got {got}")
        stop_if_refused()
        self.decode: Decode | int = decode
        self.primary_caps = PrimaryCaps(
            conv_channels,
            types=primary_types,
            dim=primary_dim,
            kernel=primary_kernel,
            stride=primary_stride,
            padding=padding,
            scale=primary_scale,
        )
        self.conv = nn.Conv2d(image_shape[0], conv_channels, conv_kernel, padding=padding)
        self.grid = self._grid(*image_shape[1:])
        """Positions of the primary capsules."""
        self.class_caps = ClassCaps(
            self.grid.positions * primary_types,
            primary_dim,
            classes,
            class_dim,
            shared_transformations=shared_transformations,
            transformation=transformation,
            routing=routing,
            votes_mib=votes_mib,
        )
        self.decoder = None if decoder is None else decoder(classes, class_dim, image_shape)
        if initialisation == "official":
            self._initialise_officially()

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B *T"] | None = None) -> Output:
        """Lengths of the class capsules, and the image decoded from one of them."""
        primary = self.primary_caps(self.conv(images).relu())
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
        """Start with half of the class capsules active on these images, under a `BalancedRouting` (EM).

        Call it once, before training, with one batch of training images. It draws no random numbers.
        """
        if isinstance(self.class_caps.routing, BalancedRouting):  # else do not compute the features
            self.class_caps.calibrate(self.primary_caps(self.conv(images).relu()))

    def _grid(self, height: int, width: int) -> Grid:
        kernel, padding = self.conv.kernel_size[0], self.primary_caps.padding
        grid = self.primary_caps.grid(Grid(height, width).after_convolution((kernel, kernel), 1, padding))
        if grid.rows < 1 or grid.columns < 1:
            lost = kernel - 1 if padding == "valid" else 0
            smallest = lost + self.primary_caps.conv.kernel_size[0]
            refuse(
                f"image_shape must be at least {smallest}x{smallest} for conv_kernel {lost + 1} and "
                f"primary_kernel {smallest - lost} with padding valid, got {height}x{width}"
            )
        return grid

    def _initialise_officially(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, 0.1)
            elif name.endswith("weight"):  # a routing initializes its own parameters
                std = 0.05 if name == "conv.weight" else 0.1
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
