"""CapsNet: the network of Sabour et al. 2017, for pictures of any size."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Output
from capsexp.errors import require_at_least_1, require_one_of
from capsexp.layer.class_caps import ClassCaps
from capsexp.layer.decoder import check_decode, decoded_class
from capsexp.layer.primary import PrimaryCaps
from capsexp.ops.receptive_fields import Grid
from capsexp.ops.weights import kernels_and_matrices

INITIALISATIONS = ("default", "official")


class CapsNet(nn.Module):
    """Convolution, primary capsules, class capsules, decoder.

    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), sections 4 and 4.1.
    Differs from it in: nothing, with the values of conf/model/dynamic_routing.yaml. What the paper leaves
    open (initialisation, which capsule to decode without a label) is a keyword.

    Args:
        image_shape: channels, height and width.
        classes: number of classes, one capsule each.
        conv_channels, conv_kernel: of the first convolution, stride 1, ReLU.
        primary_types, primary_dim, primary_kernel, primary_stride, primary_scale: see `PrimaryCaps`.
        padding: "valid" or "same", of both convolutions.
        class_dim: pose size of the class capsules.
        shared_transformations: see `ClassCaps`.
        initialisation: "default", or "official", that of the authors' code.
        decode: the class to decode: "label", where a label is given, else the longest capsule; "prediction":
            always the longest; or the index of a class.
        votes_mib: see `ClassCaps`.
        routing: see `ClassCaps`.
        decoder: builds the decoder from (classes, pose_dim, image_shape); None for a network without.
    Raises: ValueError: too small a picture (naming the smallest), a size below 1, an option that is none.
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
        padding: str,
        class_dim: int,
        shared_transformations: bool,
        initialisation: str,
        decode: str | int,
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
        check_decode(decode, classes)
        require_one_of(INITIALISATIONS, initialisation=initialisation)
        self.decode = decode
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
        """Where the children of the class capsules look."""
        self.class_caps = ClassCaps(
            self.grid.positions * primary_types,
            primary_dim,
            classes,
            class_dim,
            shared_transformations=shared_transformations,
            routing=routing,
            votes_mib=votes_mib,
        )
        self.decoder = None if decoder is None else decoder(classes, class_dim, image_shape)
        if initialisation == "official":
            self._initialise_officially()

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B *T"] | None = None) -> Output:
        """Lengths of the class capsules, and the picture that the chosen one decodes to."""
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
        """Let the routing start balanced on these pictures, if it can (EM routing)."""
        if hasattr(self.class_caps.routing, "balance"):  # else the features would be for nothing
            self.class_caps.calibrate(self.primary_caps(self.conv(images).relu()))

    def _grid(self, height: int, width: int) -> Grid:
        kernel, padding = self.conv.kernel_size[0], str(self.conv.padding)
        grid = self.primary_caps.grid(Grid(height, width).after_convolution((kernel, kernel), 1, padding))
        if grid.rows < 1 or grid.columns < 1:
            lost = kernel - 1 if padding == "valid" else 0
            smallest = lost + self.primary_caps.conv.kernel_size[0]
            raise ValueError(
                f"image_shape must be at least {smallest}x{smallest} for conv_kernel {lost + 1} and "
                f"primary_kernel {smallest - lost} with padding valid, got {height}x{width}"
            )
        return grid

    def _initialise_officially(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, 0.1)
            elif name.endswith("weight"):  # whatever else a routing learns starts where the routing puts it
                std = 0.05 if name == "conv.weight" else 0.1
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
