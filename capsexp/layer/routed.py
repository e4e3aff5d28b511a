"""What all layers with a routing share: votes in chunks, the fused path, a balanced start."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules, Routed
from capsexp.ops.votes import DenseVotes, MatrixVotes, chunked, images_per_chunk, votes_budget
from capsexp.routing import BalancedRouting, FusedRouting, reads_poses

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
            return self.routing.route_fused(votes, activations)  # type: ignore[operator]

    def step(self, poses: Float[Tensor, "B I D"], before: Float[Tensor, "B J E"] | None) -> Routed:
        """One iteration of a `SteppedRouting`, from the parents' poses before it; None in the first."""
        inputs = (poses,) if before is None else (poses, before)
        return chunked(self._step, *inputs, images=self._images_per_chunk())

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

    def _step(self, poses: Float[Tensor, "B I D"], before: Float[Tensor, "B J E"] | None = None) -> Routed:
        with torch.autocast(poses.device.type, enabled=False):
            votes = self.votes(poses.to(self.weight.dtype))
            routed: Routed = self.routing.step(votes, before)  # type: ignore[operator]
            return routed

    def _images_per_chunk(self) -> int:
        size = self.votes_per_image * self.weight.element_size()
        return images_per_chunk(size, budget=self.votes_bytes, device=self.weight.device)

    def _route(self, poses: Float[Tensor, "B I D"], activations: Float[Tensor, "B I"]) -> Routed:
        # Votes in the weights' precision also under autocast: writing them is most of the work, and a routing
        # in float32 would write them a second time.
        with torch.autocast(poses.device.type, enabled=False):
            poses = poses.to(self.weight.dtype)
            votes = self.votes(poses)
            given = (poses,) if reads_poses(self.routing) else ()
            routed = self.routing(votes, activations.to(self.weight.dtype), *given)
        _check_routed(routed, votes, name=type(self.routing).__name__)
        return routed


def shared_keyword(routing: Callable[..., nn.Module], shared: bool) -> dict[str, bool]:
    """`shared=True` for a routing that takes it, in a layer whose children share their matrices."""
    return {"shared": True} if shared and "shared" in inspect.signature(routing).parameters else {}


def require_factory(routing: object) -> None:
    """Check the argument `routing` of a layer.

    Raises: TypeError: it is not a function or class that builds a routing from its sizes.
    """
    if isinstance(routing, nn.Module) or not callable(routing):
        got = type(routing).__name__ if isinstance(routing, nn.Module) else repr(routing)
        raise TypeError(f"routing must be a factory, such as capsexp.make('routing/em'), got {got}")


def _check_routed(routed: object, votes: Tensor, *, name: str) -> None:
    """Check what a routing returns: a wrong shape could train without an error.

    Raises: TypeError, ValueError: no `Routed`, or one of another shape.
    """
    if not isinstance(routed, Routed):
        raise TypeError(f"{name} must return a Routed, got {type(routed).__name__}")
    parents = votes.shape[1:-3].numel() * votes.shape[-2]
    expected = {
        "poses": [len(votes), parents, votes.shape[-1]],
        "activations": [len(votes), parents],
        "coupling": list(votes.shape[:-1]),
    }
    if routed.scores is not None:
        expected["scores"] = expected["activations"]
    for field, shape in expected.items():
        got = list(getattr(routed, field).shape)
        if got != shape:
            raise ValueError(f"{name} must return {field} of shape {shape} for these votes, got {got}")
