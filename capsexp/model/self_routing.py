"""The self-routing network of Hahn, Pyeon, Kim 2019, for images of any size."""

from collections.abc import Callable, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Capsules, Output, Routed
from capsexp.errors import refuse, require_at_least_1, require_not_negative, stop_if_refused
from capsexp.layer.capsule_norm import CapsuleNorm, Norm, require_norm
from capsexp.layer.class_scores import ClassScores
from capsexp.layer.conv_stack import conv_stack, require_windows
from capsexp.layer.matrix_caps import MatrixCapsOptions
from capsexp.layer.matrix_primary import MatrixPrimaryCaps
from capsexp.layer.matrix_start import Initialisation, Pose
from capsexp.layer.own_pose_caps import OwnPoseCaps
from capsexp.layer.resnet import ResNetTrunk
from capsexp.ops.receptive_fields import Grid, with_border
from capsexp.ops.weights import kernels_and_matrices


class SelfRoutingNet(nn.Module):
    """Trunk, primary capsules, convolutional capsules if any, class capsules without matrices.

    Hahn, Pyeon, Kim, "Self-routing capsule networks" (NeurIPS 2019), SR-1 (no convolutional capsules) and
    SR-2 (one layer of them).
    Differs from it in: the matrices start by `initialisation`; the norm above them removes their scale. Only
    the primary capsules may have a border of zeros, which SR-2 needs.

    Args:
        image_shape: channels, height and width.
        classes: number of classes.
        trunk: builds the convolutions from the channels of the images, see `ResNetTrunk`.
        primary_types, primary_kernel: see `MatrixPrimaryCaps`; zeros around, so that the grid stays.
        primary_border: positions of capsules with pose and activation 0 around the primary capsules, for the
            windows above them.
        conv_types, conv_kernels, conv_strides: one number per layer of convolutional capsules; [] for none.
        pose_dim, pose, initialisation, votes_mib: see `MatrixCaps`.
        norm: of the capsules: "none", "batch" or "group", with a gain and a bias per type and number of a
            pose. See `CapsuleNorm`.
        routing: builds a layer's routing from (in_caps, out_caps, pose_dim[, fields]).
    Raises: ValueError: a size below 1, lists of different lengths, an unknown option.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        trunk: Callable[..., ResNetTrunk],
        primary_types: int,
        primary_kernel: int,
        primary_border: int,
        conv_types: Sequence[int],
        conv_kernels: Sequence[int],
        conv_strides: Sequence[int],
        pose_dim: int,
        pose: Pose,
        initialisation: Initialisation,
        norm: Norm,
        votes_mib: int | float | None,
        routing: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        require_at_least_1(
            primary_types=primary_types,
            primary_kernel=primary_kernel,
            pose_dim=pose_dim,
        )
        require_windows(conv_types, conv_kernels, conv_strides)
        require_norm(norm=norm)
        require_not_negative(primary_border=primary_border)
        if primary_border and not conv_types:
            refuse(f"primary_border must be 0 without convolutional capsules, got {primary_border}")
        stop_if_refused()
        channels, height, width = image_shape
        self.trunk = trunk(channels)
        self.primary_caps = MatrixPrimaryCaps(
            self.trunk.out_channels,
            types=primary_types,
            pose_dim=pose_dim,
            norm=norm,
            norm_per="element",
            kernel=primary_kernel,
            padding="same",
        )
        shared = MatrixCapsOptions(
            pose_dim=pose_dim,
            pose=pose,
            shared_transformations=False,
            init_identity=1.0,
            init_noise=0.03,
            initialisation=initialisation,
            vote_bias=False,
            routing=routing,
            votes_mib=votes_mib,
        )
        self.border, self.primary_grid = primary_border, self.trunk.grid(Grid(height, width))
        windows = list(zip(conv_types, conv_kernels, conv_strides, strict=True))
        grid = self.primary_grid.bordered(primary_border)
        layers, self.grid, types = conv_stack(grid, primary_types, windows, shared)
        """Positions of the capsules below the class capsules."""
        self.conv_layers = list(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.class_caps = OwnPoseCaps(
            self.grid.positions * types, classes, pose_dim=pose_dim, routing=routing
        )
        self.norms = nn.ModuleDict()
        if norm != "none":
            self.norms.update(
                {
                    name: CapsuleNorm(parents, pose_dim, norm=norm, per="element", affine=True, scores=False)
                    for name, parents in zip(layers, conv_types, strict=True)
                }
            )
        self.class_scores = ClassScores("scores", None)

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"] | None = None) -> Output:
        """Activations of the class capsules, which sum to 1."""
        capsules = self._primary(images)
        layers: dict[str, Capsules | Routed] = {"primary_caps": capsules}
        for name in self.conv_layers:
            routed = layers[name] = self._route(name, capsules)
            capsules = Capsules(routed.poses, routed.activations)
        layers["class_caps"] = routed = self.class_caps(capsules)
        scores, probabilities = self.class_scores(routed)
        return Output(scores, probabilities, layers, weights=kernels_and_matrices(self))

    def _primary(self, images: Tensor) -> Capsules:
        """Primary capsules, and their border if there is one."""
        capsules: Capsules = self.primary_caps(self.trunk(images))
        if not self.border:
            return capsules
        poses, activations = (with_border(values, self.primary_grid, self.border) for values in capsules)
        return Capsules(poses, activations)

    def _route(self, name: str, capsules: Capsules) -> Routed:
        """Apply a layer of convolutional capsules, and its norm if there is one."""
        routed: Routed = getattr(self, name)(capsules)
        if name not in self.norms:
            return routed
        norm = self.norms[name]
        assert isinstance(norm, CapsuleNorm)
        return norm.routed(routed)
