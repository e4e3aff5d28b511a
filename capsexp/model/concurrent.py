"""The network of Tsai et al. 2020, whose layers of capsules are routed all at once."""

from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Capsules, Output, Routed
from capsexp.errors import refuse, require_at_least_1, require_literal, stop_if_refused
from capsexp.layer.class_scores import ClassScores
from capsexp.layer.conv_stack import conv_stack, require_windows
from capsexp.layer.dense_caps import DenseCaps
from capsexp.layer.matrix_caps import MatrixCapsOptions
from capsexp.layer.matrix_start import Initialisation, Pose
from capsexp.layer.resnet import ResNetTrunk
from capsexp.layer.routed import RoutedLayer
from capsexp.ops.receptive_fields import Grid
from capsexp.ops.weights import kernels_and_matrices
from capsexp.routing import SteppedRouting

RoutingOrder = Literal["concurrent", "sequential"]


def route_concurrently(
    layers: Sequence[RoutedLayer], poses: Float[Tensor, "B I D"], *, iterations: int
) -> list[Routed]:
    """Route all layers at once.

    Iteration 1 goes through the layers from the lowest to the highest. In each later one every layer takes
    the poses of its children and its own after the iteration before, so all could run at the same time.
    Tsai, Srivastava, Goh, Salakhutdinov, "Capsules with inverted dot-product attention routing" (ICLR 2020),
    algorithm 2. Differs from it in: nothing.

    Args:
        layers: with a `SteppedRouting` each, from the lowest to the highest.
        poses: of the primary capsules.
        iterations: T >= 1.
    Returns: the state of each layer after the last iteration.
    Laws: one layer, or one iteration, gives what routing layer after layer gives.
    """
    states: list[Routed] = []
    for layer in layers:
        states.append(layer.step(states[-1].poses if states else poses, None))
    for _ in range(iterations - 1):
        children = [poses, *(state.poses for state in states)]
        states = [
            layer.step(below, state.poses)
            for layer, below, state in zip(layers, children, states, strict=False)
        ]
    return states


class ConcurrentNet(nn.Module):
    """Residual trunk, primary capsules, convolutional capsules, class capsules over all of them.

    Tsai, Srivastava, Goh, Salakhutdinov, "Capsules with inverted dot-product attention routing" (ICLR 2020),
    section 4, with the values of conf/model/concurrent.yaml their network for CIFAR-10.
    Differs from it in: nothing. Primary capsules have no activations; theirs are 1 in `Output.layers`, like
    those of the convolutional capsules. Studies of the routing route each layer again, one after the other.

    Args:
        image_shape: channels, height and width.
        classes: number of classes.
        trunk: builds the convolutions from the channels of the images, see `ResNetTrunk`.
        primary_types: types of primary capsules, a 1x1 convolution and a normalization of each pose.
        conv_types, conv_kernels, conv_strides: one number per layer of convolutional capsules; [] for none.
        pose_dim, pose, initialisation, votes_mib: see `MatrixCaps`.
        routing_order: "concurrent": `route_concurrently`; "sequential": each layer routes all its iterations
            before the next begins.
        routing: builds a layer's routing from (in_caps, out_caps, pose_dim[, fields]); a `SteppedRouting`.
    Raises: ValueError: a size below 1, lists of different lengths, an unknown option; a routing without
        single steps.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        trunk: Callable[..., ResNetTrunk],
        primary_types: int,
        conv_types: Sequence[int],
        conv_kernels: Sequence[int],
        conv_strides: Sequence[int],
        pose_dim: int,
        pose: Pose,
        initialisation: Initialisation,
        votes_mib: int | float | None,
        routing_order: RoutingOrder,
        routing: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        require_at_least_1(
            primary_types=primary_types,
            pose_dim=pose_dim,
        )
        require_windows(conv_types, conv_kernels, conv_strides)
        require_literal(RoutingOrder, routing_order=routing_order)
        stop_if_refused()
        channels, height, width = image_shape
        self.pose_dim, self.routing_order = pose_dim, routing_order
        self.trunk = trunk(channels)
        self.primary = nn.Conv2d(self.trunk.out_channels, primary_types * pose_dim, 1, bias=False)
        self.primary_norm = nn.LayerNorm(pose_dim)
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
        windows = list(zip(conv_types, conv_kernels, conv_strides, strict=True))
        layers, self.grid, types = conv_stack(
            self.trunk.grid(Grid(height, width)), primary_types, windows, shared
        )
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.class_caps = DenseCaps(self.grid.positions * types, classes, **shared)
        self.routed_layers = [*layers, "class_caps"]
        self.iterations = _iterations(self.class_caps.routing)
        self.class_scores = ClassScores("scores", None)

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"] | None = None) -> Output:
        """Scores of the class capsules, and their softmax."""
        poses = self.primary(self.trunk(images)).permute(0, 2, 3, 1)
        poses = self.primary_norm(poses.reshape(len(images), -1, self.pose_dim))
        primary = Capsules(poses, poses.new_ones(poses.shape[:2]))
        routed = self._route(primary)
        scores, probabilities = self.class_scores(routed[-1])
        layers: dict[str, Capsules | Routed] = {
            "primary_caps": primary,
            **dict(zip(self.routed_layers, routed, strict=True)),
        }
        return Output(scores, probabilities, layers, weights=kernels_and_matrices(self))

    def _route(self, capsules: Capsules) -> list[Routed]:
        layers = [getattr(self, name) for name in self.routed_layers]
        if self.routing_order == "concurrent":
            return route_concurrently(layers, capsules.poses, iterations=self.iterations)
        states: list[Routed] = []
        for layer in layers:
            states.append(layer(capsules))
            capsules = Capsules(states[-1].poses, states[-1].activations)
        return states


def _iterations(routing: nn.Module) -> int:
    if not isinstance(routing, SteppedRouting):
        refuse(f"routing must route in single steps, as `inverted` does, got {type(routing).__name__}")
        return 1
    return routing.iterations
