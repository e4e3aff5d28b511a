"""Fully connected capsules: every input capsule votes for every output capsule."""

import inspect
import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules, Routed
from capsexp.errors import refuse, require_at_least_1, require_literal
from capsexp.layer.routed import RoutedLayer, require_factory
from capsexp.ops.squash import length, squash
from capsexp.ops.votes import DenseVotes, make_votes

Transformation = Literal["matrix", "elementwise"]


class ClassCaps(RoutedLayer):
    """Capsules with one transformation matrix per pair of capsules, under any routing algorithm.

    The DigitCaps of Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 4; with shared
    transformations and uniform routing the Aff-CapsNet of Gu, Tresp, "Improving the robustness of capsule
    networks to image affine transformations" (CVPR 2020).
    Differs from them in: nothing.

    Args:
        in_caps, in_dim: number and pose size of the input capsules (I, K).
        out_caps, out_dim: of the output capsules (J, D).
        shared_transformations: one matrix W_j per output capsule for all input capsules, instead of W_ij.
        transformation: "matrix"; or "elementwise": û_j|i is the product of u_i and a vector w_ij, number by
            number, for in_dim = out_dim: with uniform routing the homogeneous vector capsules of Byerly,
            Kalganova, Dear, "No routing needed between capsules" (Neurocomputing 2021), but for their squash.
        routing: builds the routing from (in_caps, out_caps, pose_dim), see `capsexp.routing.Routing`; it also
            gets K if it has an argument `in_dim`.
        votes_mib: memory for votes in MiB, beyond which the batch is routed in chunks; None: by device.
    Raises:
        ValueError: a number < 1, votes_mib <= 0, an unknown option, "elementwise" with other poses.
        TypeError: routing builds nothing.
    """

    lazy_type = DenseVotes

    def __init__(
        self,
        in_caps: int,
        in_dim: int,
        out_caps: int,
        out_dim: int,
        *,
        routing: Callable[..., nn.Module],
        shared_transformations: bool = False,
        transformation: Transformation = "matrix",
        votes_mib: int | float | None = None,
    ) -> None:
        require_factory(routing)
        require_at_least_1(in_caps=in_caps, in_dim=in_dim, out_caps=out_caps, out_dim=out_dim)
        require_literal(Transformation, transformation=transformation)
        if transformation == "elementwise" and in_dim != out_dim:
            refuse(f"transformation elementwise needs in_dim = out_dim, got {in_dim} and {out_dim}")
        votes_per_image = in_caps * out_caps * out_dim
        super().__init__(in_caps=in_caps, in_dim=in_dim, votes_per_image=votes_per_image, votes_mib=votes_mib)
        matrices = 1 if shared_transformations else in_caps
        self.transformation: Transformation = transformation
        rows = [in_dim] if transformation == "matrix" else []
        self.weight = nn.Parameter(torch.empty(matrices, *rows, out_caps, out_dim))  # W_ij, or W_j
        # The paper gives no initialization. With this one the s_j = sum_i û_j|i / J of the first pass have,
        # in the mean square, the length of the input capsules, for any number of them: std 0.07 for MNIST,
        # where the authors have 0.1. One std for all sizes learned slower: 0.1 with few children or with many
        # parents, 0.01 everywhere. Shared: s_j = W_j sum_i u_i / J, and for independent u_i the square of
        # that sum is I times theirs, which gives the same std. On MNIST the capsules of a type are alike from
        # place to place: the s_j start 3 to 4.5 times as long as the u_i, far from where squash saturates.
        # Elementwise: no sum over the numbers of u_i.
        summed = out_dim if transformation == "matrix" else 1
        nn.init.normal_(self.weight, std=out_caps / math.sqrt(in_caps * summed))
        self.routing = routing(in_caps, out_caps, out_dim, **_pose_size(routing, in_dim))

    def votes(self, poses: Float[Tensor, "B I K"]) -> Float[Tensor, "B I J D"]:
        """û_j|i of every child."""
        if self.transformation == "elementwise":
            return (poses.unsqueeze(1) * self.weight.transpose(0, 1)).transpose(1, 2)  # memory [B, J, I, D]
        return make_votes(poses, self._matrices())

    def lazy_votes(self, poses: Float[Tensor, "B I K"]) -> DenseVotes:
        """û_j|i of every child before they are computed."""
        return DenseVotes(poses, self._matrices(), self._images_per_chunk())

    def fused_reason(self) -> str | None:
        """Why this layer takes the reference path; None where it takes the fused one. See `FusedRouting`."""
        if self.transformation == "elementwise":
            return "there is no fused routing of elementwise transformations"
        return super().fused_reason()

    def without_routing(self) -> "UnroutedClassCaps":
        """The same matrices without the routing, for comparison."""
        return UnroutedClassCaps(self.weight.detach())

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        out_caps, out_dim = self.weight.shape[-2:]
        sizes = f"in_caps={self.in_caps}, in_dim={self.in_dim}, out_caps={out_caps}, out_dim={out_dim}"
        shared = f"shared_transformations={len(self.weight) < self.in_caps}"
        return f"{sizes}, {shared}" + (f", {self.transformation}" if self.weight.dim() == 3 else "")

    def _matrices(self) -> Float[Tensor, "I K J D"]:
        """W_ij of every pair; shared ones are a view that repeats them."""
        return self.weight.expand(self.in_caps, -1, -1, -1)


def _pose_size(routing: Callable[..., nn.Module], in_dim: int) -> dict[str, int]:
    """The size of the children's poses, for a routing that has an argument for it."""
    return {"in_dim": in_dim} if "in_dim" in inspect.signature(routing).parameters else {}


class UnroutedClassCaps(nn.Module):
    """`ClassCaps` without the routing: every capsule gives each parent the same share.

    The baseline of `capsexp bench`: the same matrices, summed over the input capsules by one product that
    never makes votes, so no routing can be faster.

    Args: weight: the transformation matrices W_ij; one W_j for all input capsules where they are shared;
        without the axis K for elementwise transformations.
    """

    def __init__(self, weight: Float[Tensor, "W *K J D"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, capsules: Capsules) -> Routed:
        """Output capsules under uniform coupling."""
        out_caps, out_dim = self.weight.shape[-2:]
        children = capsules.poses.sum(1, keepdim=True) if len(self.weight) == 1 else capsules.poses
        if self.weight.dim() == 3:
            total = torch.einsum("bid,ijd->bjd", children, self.weight) / out_caps
        else:
            total = children.flatten(1) @ self.weight.flatten(2).flatten(0, 1) / out_caps
        poses = squash(total.view(-1, out_caps, out_dim))
        coupling = poses.new_full((), 1 / out_caps).expand(*capsules.poses.shape[:2], out_caps)
        return Routed(poses, length(poses), coupling)
