"""Fully connected capsules: every input capsule votes for every output capsule."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules, Routed
from capsexp.layer.balance import balance
from capsexp.ops.squash import length, squash
from capsexp.ops.votes import DenseVotes, chunked, images_per_chunk, make_votes, votes_budget


class ClassCaps(nn.Module):
    """Capsules with one transformation matrix per pair of capsules, under any routing algorithm.

    The DigitCaps of Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 4; with shared
    transformations and uniform routing the Aff-CapsNet of Gu, Tresp, "Improving the robustness of capsule
    networks to image affine transformations" (CVPR 2020).
    Differs from them in: nothing.

    Args:
        in_caps, in_dim: number and pose size of the input capsules (I, K).
        out_caps, out_dim: of the output capsules (J, D).
        shared_transformations: one matrix W_j per output capsule for all input capsules, instead of W_ij.
        routing: builds the routing from (in_caps, out_caps, pose_dim); the module that comes back is called
            with (votes, activations) and treats each picture alone.
        votes_mib: memory for votes in MiB, beyond which the batch is routed in pieces; None: by device.
    Raises: ValueError: votes_mib <= 0.
    """

    def __init__(
        self,
        in_caps: int,
        in_dim: int,
        out_caps: int,
        out_dim: int,
        *,
        shared_transformations: bool,
        routing: Callable[..., nn.Module],
        votes_mib: int | float | None,
    ) -> None:
        super().__init__()
        self.votes_bytes = votes_budget(votes_mib)
        self.in_caps = in_caps
        matrices = 1 if shared_transformations else in_caps
        self.weight = nn.Parameter(torch.empty(matrices, in_dim, out_caps, out_dim))  # W_ij, or W_j
        # The paper gives no initialisation. With this one the s_j = sum_i û_j|i / J of the first pass are, in
        # the mean square, as long as the input capsules, however many there are: std 0.07 for MNIST, where
        # the authors have 0.1. One std for all sizes learned slower: 0.1 with few children or with many
        # parents, 0.01 everywhere. Shared: s_j = W_j sum_i u_i / J, and where the u_i are independent the
        # square of that sum is I times theirs: the same std. On MNIST the capsules of a type are alike from
        # place to place: the s_j begin 3 to 4.5 times as long as the u_i, far from where squash saturates.
        nn.init.normal_(self.weight, std=out_caps / math.sqrt(in_caps * out_dim))
        self.routing = routing(in_caps, out_caps, out_dim)

    def forward(self, capsules: Capsules) -> Routed:
        """Output capsules, and the coupling that made them."""
        images = self._images_per_chunk()
        makes_votes = getattr(self.routing, "makes_dense_votes", None)
        if makes_votes is not None and makes_votes(self.weight):
            with torch.autocast(capsules.poses.device.type, enabled=False):
                unmade = DenseVotes(capsules.poses.to(self.weight.dtype), self._matrices())
                return self.routing.route_dense(unmade, images=images)  # type: ignore[operator]
        return chunked(self._route, capsules.poses, capsules.activations, images=images)

    def calibrate(self, capsules: Capsules) -> None:
        """Let the routing start balanced on these capsules, if it can."""
        balance(self.routing, self.votes, capsules, images=self._images_per_chunk())

    def votes(self, poses: Float[Tensor, "B I K"]) -> Float[Tensor, "B I J D"]:
        """û_j|i of every child."""
        return make_votes(poses, self._matrices())

    def without_routing(self) -> "UnroutedClassCaps":
        """The same matrices without the routing, for comparison."""
        return UnroutedClassCaps(self.weight.detach())

    def _matrices(self) -> Float[Tensor, "I K J D"]:
        """W_ij of every pair; shared ones are a view that repeats them."""
        return self.weight.expand(self.in_caps, -1, -1, -1)

    def _images_per_chunk(self) -> int:
        out_caps, out_dim = self.weight.shape[2:]
        size = self.in_caps * out_caps * out_dim * self.weight.element_size()
        return images_per_chunk(size, budget=self.votes_bytes, device=self.weight.device)

    def _route(self, poses: Float[Tensor, "B I K"], activations: Float[Tensor, "B I"]) -> Routed:
        # Votes in the weights' precision also under autocast: writing them is most of the work, and a routing
        # that wants float32 would write them a second time.
        with torch.autocast(poses.device.type, enabled=False):
            votes = self.votes(poses.to(self.weight.dtype))
            return self.routing(votes, activations.to(self.weight.dtype))


class UnroutedClassCaps(nn.Module):
    """`ClassCaps` with the routing taken out: every capsule gives each parent the same share.

    What `capsexp bench` compares with: the same matrices, summed over the input capsules by one product
    that never makes votes, so nothing that routes can be faster.

    Args: weight: the transformation matrices W_ij; one W_j for all input capsules where they are shared.
    """

    def __init__(self, weight: Float[Tensor, "W K J D"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, capsules: Capsules) -> Routed:
        """Output capsules under uniform coupling."""
        matrices, _, out_caps, out_dim = self.weight.shape
        inputs = capsules.poses.sum(1) if matrices == 1 else capsules.poses.flatten(1)
        total = inputs @ self.weight.flatten(2).flatten(0, 1) / out_caps
        poses = squash(total.view(-1, out_caps, out_dim))
        coupling = poses.new_full((), 1 / out_caps).expand(*capsules.poses.shape[:2], out_caps)
        return Routed(poses, length(poses), coupling)
