"""Capsules on the convolutions of Heinsen 2019, with any routing."""

from collections.abc import Callable, Sequence
from typing import Literal

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
    stop_if_refused,
)
from capsexp.layer.capsule_norm import CapsuleNorm, Norm, require_norm
from capsexp.layer.class_scores import ClassScores, LossInput
from capsexp.layer.dense_caps import DenseCaps
from capsexp.layer.matrix_start import Initialisation, Pose
from capsexp.layer.trunk import Trunk, TrunkPrimaryCaps, require_trunk
from capsexp.ops.receptive_fields import Grid
from capsexp.ops.weights import kernels_and_matrices

Shared = Literal["none", "first", "all"]


class TrunkCapsNet(nn.Module):
    """A trunk of convolutions, primary capsules, dense capsules, class capsules.

    The network for smallNORB of Heinsen, "An algorithm for routing capsules in all domains" (arXiv
    1911.00792): 271,688 parameters on stereo images of 96x96.
    Differs from it in: nothing, with the values of conf/model/trunk_caps.yaml and Heinsen routing.

    Routings that do not read activations, such as "dynamic", leave the primary scores without an effect.

    In a training loop of your own, call `calibrate(images)` once before the first step if the routing is EM,
    and `capsexp.routing.advance(network, Step(number, total))` before each step.

    Args:
        image_shape: channels, height and width.
        classes: number of class capsules.
        channels, strides, coordinates, trunk_norm: see `Trunk`; trunk_norm also of the primary capsules.
        primary_types: types of primary capsules.
        dense_types: capsules of each layer between these and the class capsules; a list, which may be empty.
        pose_dim, pose, votes_mib: see `MatrixCaps`.
        shared_transformations: which layers have one matrix per parent for all children: the "first", whose
            children are at all positions, "all" or "none".
        initialisation, init_identity, init_noise, vote_bias: see `MatrixCaps`.
        norm: of the capsules after each dense layer: "none", "batch" or "group", see `CapsuleNorm`.
        loss_input, score_gain: see `ClassScores`.
        routing: builds a layer's routing from (in_caps, out_caps, pose_dim[, shared]).
    Raises:
        ValueError: an image that is too small, a size below 1, lists of different lengths, an unknown option.
    """

    grid: Grid
    """Positions of the children of the class capsules: one, unless these are the primary capsules."""

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        coordinates: bool,
        trunk_norm: Norm,
        primary_types: int,
        dense_types: Sequence[int],
        pose_dim: int,
        pose: Pose,
        shared_transformations: Shared,
        initialisation: Initialisation,
        init_identity: int | float,
        init_noise: int | float,
        vote_bias: bool,
        norm: Norm,
        loss_input: LossInput,
        score_gain: int | float | None,
        votes_mib: int | float | None,
        routing: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        require_trunk(image_shape, channels=channels, strides=strides, norm=trunk_norm)
        require_at_least_1(primary_types=primary_types, pose_dim=pose_dim, dense_types=dense_types or None)
        require_literal(Shared, shared_transformations=shared_transformations)
        require_norm(norm=norm)
        require_not_negative(init_noise=init_noise)
        require_finite(init_identity=init_identity)
        if initialisation == "identity" and init_identity == init_noise == 0:
            refuse("init_identity and init_noise must not both be 0: all votes would be 0")
        stop_if_refused()
        self.trunk = Trunk(
            image_shape, channels=channels, strides=strides, coordinates=coordinates, norm=trunk_norm
        )
        self.primary_caps = TrunkPrimaryCaps(
            self.trunk.channels, types=primary_types, pose_dim=pose_dim, norm=trunk_norm
        )
        self.routed_layers = [
            *(f"dense_caps_{number + 1}" for number in range(len(dense_types))),
            "class_caps",
        ]
        self.norms = nn.ModuleDict()
        children = self.trunk.grid.positions * primary_types
        for name, parents in zip(self.routed_layers, [*dense_types, classes], strict=True):
            first = name == self.routed_layers[0]
            layer = DenseCaps(
                children,
                parents,
                routing=routing,
                pose_dim=pose_dim,
                pose=pose,
                shared_transformations=shared_transformations == "all"
                or (first and shared_transformations == "first"),
                initialisation=initialisation,
                init_identity=init_identity,
                init_noise=init_noise,
                vote_bias=vote_bias,
                votes_mib=votes_mib,
            )
            self.add_module(name, layer)
            if norm != "none":
                self.norms[name] = CapsuleNorm(parents, pose_dim, norm=norm)
            children = parents
        self.grid = Grid(1, 1) if dense_types else self.trunk.grid
        self.class_scores = ClassScores(loss_input, score_gain)

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B *T"] | None = None) -> Output:
        """Scores or activations of the class capsules. The labels are not used."""
        capsules: Capsules | Routed = self.primary_caps(self.trunk(images))
        layers: dict[str, Capsules | Routed] = {"primary_caps": capsules}
        for name in self.routed_layers:
            capsules = layers[name] = self._route(name, Capsules(capsules.poses, capsules.activations))
        assert isinstance(capsules, Routed)
        scores, probabilities = self.class_scores(capsules)
        return Output(scores, probabilities, layers, weights=kernels_and_matrices(self))

    @torch.no_grad()
    def calibrate(self, images: Float[Tensor, "B C H W"]) -> None:
        """Start with half of each layer's capsules active on these images, if the routing can (EM).

        Call it once, before training, with one batch of training images. It draws no random numbers.
        """
        capsules: Capsules | Routed = self.primary_caps(self.trunk(images))
        for name in self.routed_layers:
            inputs = Capsules(capsules.poses, capsules.activations)
            getattr(self, name).calibrate(inputs)
            capsules = self._route(name, inputs)

    def _route(self, name: str, capsules: Capsules) -> Routed:
        """Apply a layer, and its norm if there is one."""
        routed: Routed = getattr(self, name)(capsules)
        if name not in self.norms:
            return routed
        norm = self.norms[name]
        assert isinstance(norm, CapsuleNorm)
        return norm.routed(routed)
