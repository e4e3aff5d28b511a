"""What all layers with a routing share: votes in chunks, the fused path, a balanced start."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules, Routed
from capsexp.ops.votes import DenseVotes, MatrixVotes, chunked, images_per_chunk, votes_budget
from capsexp.routing import BalancedRouting, FusedRouting

BALANCE_ROUNDS = 3
"""The costs to balance depend, through the E-steps, on the start that the previous round set."""


class RoutedLayer(nn.Module, ABC):
    """Capsules whose votes a routing algorithm routes. A subclass sets `weight` and `routing`.

    Args:
        in_caps, in_dim: number and pose size of the input capsules.
        votes_per_image: numbers in the votes of one image.
        votes_mib: memory for votes in MiB, beyond which the batch is routed in chunks; None: by device.
    Raises: ValueError: votes_mib <= 0.
    """

    weight: nn.Parameter
    routing: nn.Module
    lazy_type: type[DenseVotes] | type[MatrixVotes]
    """What `lazy_votes` returns."""

    def __init__(
        self, *, in_caps: int, in_dim: int, votes_per_image: int, votes_mib: int | float | None
    ) -> None:
        super().__init__()
        self.in_caps, self.in_dim, self.votes_per_image = in_caps, in_dim, votes_per_image
        self.votes_bytes = votes_budget(votes_mib)

    @abstractmethod
    def votes(self, poses: Float[Tensor, "B I D"]) -> Float[Tensor, "B *I J E"]:
        """The votes of every child, as the routing takes them."""

    @abstractmethod
    def lazy_votes(self, poses: Float[Tensor, "B I D"]) -> DenseVotes | MatrixVotes:
        """The same votes before they are computed, for a fused routing."""

    def forward(self, capsules: Capsules) -> Routed:
        """Output capsules, in a grid in the order (row, column, type), and the coupling that made them.

        Raises: ValueError: the number or the pose size of the capsules is not the layer's.
        """
        poses, activations = capsules
        if tuple(poses.shape[1:]) != (self.in_caps, self.in_dim):
            raise ValueError(
                f"expected {self.in_caps} capsules with poses of {self.in_dim} numbers, "
                f"got {poses.shape[1]} with {poses.shape[2]}"
            )
        if self.fused_reason() is not None:
            return chunked(self._route, poses, activations, images=self._images_per_chunk())
        with torch.autocast(poses.device.type, enabled=False):
            votes = self.lazy_votes(poses.to(self.weight.dtype))
            return self.routing.route_fused(votes, activations.to(self.weight.dtype))  # type: ignore[operator]

    def fused_reason(self) -> str | None:
        """Why this layer takes the reference path; None where it takes the fused one. See `FusedRouting`."""
        if not isinstance(self.routing, FusedRouting) or self.routing.fused_votes is not self.lazy_type:
            return f"there is no fused {type(self.routing).__name__} for {type(self).__name__}"
        return self.routing.fused_reason(self.weight)

    @torch.no_grad()
    def calibrate(self, capsules: Capsules) -> None:
        """Start with half of the capsules active on these inputs, if the routing is a `BalancedRouting`."""
        routing = self.routing
        if not isinstance(routing, BalancedRouting):
            return
        chunks = list(zip(*(tensor.split(self._images_per_chunk()) for tensor in capsules), strict=True))
        for _ in range(BALANCE_ROUNDS):
            costs = [routing.cost(self.votes(poses), activations) for poses, activations in chunks]
            routing.balance(torch.cat(costs))

    def _images_per_chunk(self) -> int:
        size = self.votes_per_image * self.weight.element_size()
        return images_per_chunk(size, budget=self.votes_bytes, device=self.weight.device)

    def _route(self, poses: Float[Tensor, "B I D"], activations: Float[Tensor, "B I"]) -> Routed:
        # Votes in the weights' precision also under autocast: writing them is most of the work, and a routing
        # in float32 would write them a second time.
        with torch.autocast(poses.device.type, enabled=False):
            return self.routing(self.votes(poses.to(self.weight.dtype)), activations.to(self.weight.dtype))
