"""The matrix capsule network of Hinton, Sabour, Frosst 2018, for images of any size."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Capsules, Output, Routed
from capsexp.errors import (
    refuse,
    require_at_least_1,
    require_finite,
    require_literal,
    require_not_negative,
    require_positive,
    stop_if_refused,
)
from capsexp.layer.capsule_norm import CapsuleNorm, ChannelNorm, Norm, require_norm
from capsexp.layer.class_scores import ClassScores, LossInput
from capsexp.layer.conv_stack import conv_stack, require_windows
from capsexp.layer.decoder import Decode, check_decode, decoded_class
from capsexp.layer.dense_caps import DenseCaps
from capsexp.layer.matrix_caps import Coordinates, MatrixCaps, MatrixCapsOptions, SharedClassCaps
from capsexp.layer.matrix_primary import MatrixPrimaryCaps
from capsexp.layer.matrix_start import Initialisation, Pose
from capsexp.ops.receptive_fields import Grid, Padding, padded, require_kernels
from capsexp.ops.weights import kernels_and_matrices


class MatrixCapsNet(nn.Module):
    """Convolution, primary capsules, convolutional capsules, class capsules; a decoder as an option.

    Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), figure 1 and section 4.
    Differs from it in: nothing, with the values of conf/model/em_routing.yaml. What the paper leaves open
    (initialization, padding, scale of the coordinates) is a keyword.

    In a training loop of your own, call `calibrate(images)` once, before the first step: without it nearly
    all capsules start active and stay so. Before each step call
    `capsexp.routing.advance(network, Step(number, total))`, which moves the inverse temperature.

    Args:
        image_shape: channels, height and width.
        classes: E.
        conv_channels, conv_kernel, conv_stride: A; of the first convolution, with ReLU.
        padding: of the first convolution, "valid" or "same".
        primary_types, primary_kernel, primary_stride: B; kernel and stride of the primary capsules, 1 in the
            paper.
        conv_types, conv_kernels, conv_strides: C, D, …; one number per layer of convolutional capsules, of
            which there may be none.
        pose_dim, pose, shared_transformations, votes_mib: see `MatrixCaps`.
        initialisation, init_identity, init_noise, vote_bias: see `MatrixCaps`.
        norm: of the capsules after each layer: "none", "batch" or "group", see `CapsuleNorm`. That of the
            primary capsules has a gain and a bias.
        conv_norm: the same of the first convolution, which then has no bias; "group": per channel and image.
        loss_input, score_gain: see `ClassScores`.
        coordinates, coordinate_scale: see `SharedClassCaps`.
        share_positions: class capsules share their matrices over the positions, as in the paper. Without it
            each capsule has its own, and there are no coordinates (`DenseCaps`).
        decode: see `CapsNet`; counts only with a decoder.
        routing: builds a layer's routing from (in_caps, out_caps, pose_dim[, fields]).
        decoder: builds the decoder from (classes, pose_dim, image_shape); None for a network without.
    Raises:
        ValueError: an image that is too small, a size below 1, lists of different lengths, an unknown option.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        conv_channels: int,
        conv_kernel: int,
        conv_stride: int,
        padding: Padding,
        primary_types: int,
        primary_kernel: int,
        primary_stride: int,
        conv_types: Sequence[int],
        conv_kernels: Sequence[int],
        conv_strides: Sequence[int],
        pose_dim: int,
        pose: Pose,
        shared_transformations: bool,
        init_identity: int | float,
        init_noise: int | float,
        initialisation: Initialisation,
        vote_bias: bool,
        norm: Norm,
        conv_norm: Norm,
        loss_input: LossInput,
        score_gain: int | float | None,
        coordinates: Coordinates | None,
        coordinate_scale: int | float,
        share_positions: bool,
        decode: Decode | int,
        votes_mib: int | float | None,
        routing: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module] | None,
    ) -> None:
        super().__init__()
        require_at_least_1(
            conv_channels=conv_channels,
            conv_kernel=conv_kernel,
            conv_stride=conv_stride,
            primary_types=primary_types,
            primary_kernel=primary_kernel,
            primary_stride=primary_stride,
            pose_dim=pose_dim,
        )
        require_windows(conv_types, conv_kernels, conv_strides)
        require_literal(Padding, padding=padding)
        if padding == "same":  # `_first_grid` checks "valid"
            require_kernels(image_shape, conv_kernel=conv_kernel)
        require_not_negative(init_noise=init_noise)
        require_finite(init_identity=init_identity)
        require_positive(coordinate_scale=coordinate_scale)
        if init_identity == init_noise == 0:
            refuse("init_identity and init_noise must not both be 0: all votes would be 0")
        check_decode(decode, classes)
        require_norm(norm=norm, conv_norm=conv_norm)
        stop_if_refused()
        channels, height, width = image_shape
        shared = MatrixCapsOptions(
            pose_dim=pose_dim,
            pose=pose,
            shared_transformations=shared_transformations,
            init_identity=init_identity,
            init_noise=init_noise,
            initialisation=initialisation,
            vote_bias=vote_bias,
            routing=routing,
            votes_mib=votes_mib,
        )
        self.decode: Decode | int = decode
        self.padding: Padding = padding
        self.conv = nn.Conv2d(channels, conv_channels, conv_kernel, conv_stride, bias=conv_norm == "none")
        self.conv_norm = (
            None if conv_norm == "none" else ChannelNorm(conv_channels, norm=conv_norm, affine=True)
        )
        self.primary_caps = MatrixPrimaryCaps(
            conv_channels,
            types=primary_types,
            pose_dim=pose_dim,
            kernel=primary_kernel,
            stride=primary_stride,
            norm=norm,
            initialisation=initialisation,
        )
        grid = _first_grid(height, width, conv_kernel, conv_stride, padding)
        grid = _primary_grid(grid, primary_kernel, primary_stride)
        windows = list(zip(conv_types, conv_kernels, conv_strides, strict=True))
        layers, self.grid, types = conv_stack(grid, primary_types, windows, shared)
        """Positions of the last convolutional capsules."""
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.routed_layers = [*layers, "class_caps"]
        self.class_caps: MatrixCaps
        if share_positions:
            self.class_caps = SharedClassCaps(
                self.grid,
                types,
                classes,
                image_size=(height, width),
                coordinates=coordinates,
                coordinate_scale=coordinate_scale,
                **shared,
            )
        else:
            self.class_caps = DenseCaps(self.grid.positions * types, classes, **shared)
        self.norms = nn.ModuleDict()
        if norm != "none":
            parents = zip(self.routed_layers, [*conv_types, classes], strict=True)
            self.norms.update({name: CapsuleNorm(types, pose_dim, norm=norm) for name, types in parents})
        self.class_scores = ClassScores(loss_input, score_gain)
        self.decoder = None if decoder is None else decoder(classes, pose_dim, image_shape)

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B *T"] | None = None) -> Output:
        """Activations of the class capsules and, with a decoder, the image decoded from one of them."""
        layers: dict[str, Capsules | Routed] = {"primary_caps": self.primary_caps(self._features(images))}
        capsules: Capsules | Routed = layers["primary_caps"]
        for name in self.routed_layers:
            capsules = layers[name] = self._route(name, Capsules(capsules.poses, capsules.activations))
        assert isinstance(capsules, Routed)
        scores, probabilities = self.class_scores(capsules)
        reconstruction = None
        if self.decoder is not None:
            reconstruction = self.decoder(capsules.poses, decoded_class(self.decode, scores, labels))
        return Output(
            scores=scores,
            probabilities=probabilities,
            layers=layers,
            reconstruction=reconstruction,
            weights=kernels_and_matrices(self),
        )

    @torch.no_grad()
    def calibrate(self, images: Float[Tensor, "B C H W"]) -> None:
        """Start with primary poses of mean square 1 and half of each layer's capsules active on these images.

        Call it once, before training, with one batch of training images. It draws no random numbers. The
        authors chose their initialization "so that at the start half of the capsules in each layer are
        active"; here the batch sets it, layer by layer.
        """
        features = self._features(images)
        self.primary_caps.calibrate(features)
        capsules: Capsules | Routed = self.primary_caps(features)
        for name in self.routed_layers:
            layer, inputs = getattr(self, name), Capsules(capsules.poses, capsules.activations)
            layer.calibrate(inputs)
            capsules = self._route(name, inputs)

    def _features(self, images: Tensor) -> Float[Tensor, "B C H W"]:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        features: Tensor = self.conv(padded(images, kernel, stride, self.padding))
        if self.conv_norm is not None:
            features = self.conv_norm(features.flatten(2)).view_as(features)
        return features.relu()

    def _route(self, name: str, capsules: Capsules) -> Routed:
        """Apply a layer, and its norm if there is one."""
        routed: Routed = getattr(self, name)(capsules)
        if name not in self.norms:
            return routed
        norm = self.norms[name]
        assert isinstance(norm, CapsuleNorm)
        return norm.routed(routed)


def _first_grid(height: int, width: int, kernel: int, stride: int, padding: Padding) -> Grid:
    """Positions after the first convolution."""
    grid = Grid(height, width).after_convolution((kernel, kernel), stride, padding)
    if grid.rows < 1 or grid.columns < 1:
        refuse(
            f"image_shape must be at least {kernel}x{kernel} for conv_kernel {kernel} "
            f"with padding {padding}, got {height}x{width}"
        )
    return grid


def _primary_grid(grid: Grid, kernel: int, stride: int) -> Grid:
    """Positions of the primary capsules on features with this grid."""
    if min(grid.rows, grid.columns) < kernel:
        refuse(f"primary_kernel must be <= the features' {grid.rows}x{grid.columns}, got {kernel}")
        return grid
    return grid.after_convolution((kernel, kernel), stride)
