"""One routing algorithm per file: a reference, a fast path, a public function, a module.

A layer builds its routing from (in_caps, out_caps, pose_dim), a convolutional layer also from `fields`. Where
every parent sees every child and all children share their matrices, it also passes `shared=True`, if the
routing has that argument. It calls it as `Routing` describes. That call is all that a new algorithm needs.
Everything else is optional: a routing that has the methods of one of the other protocols gets what that
protocol describes. A routing derives from `nn.Module` and inherits from none of these classes.

Three optional attributes need no method:

    reads_poses: bool the call takes a third argument, the poses of the children; False without it.
    iterations: int   passes of the algorithm; 1 without it (the routing study).
    squashes: bool    a pose is a squashed sum of votes, not their mean; False without it (the routing study).
"""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from capsexp.capsules import Routed
from capsexp.ops.votes import DenseVotes, MatrixVotes
from capsexp.schedule import Step

MOST_ITERATIONS = 1000
"""Every iteration costs time and, in training, memory."""


@runtime_checkable
class Routing(Protocol):
    """Required: route the votes of a layer, each image by itself, without random numbers."""

    def __call__(self, votes: Tensor, activations: Tensor) -> Routed:
        """Return the output capsules and the coupling.

        Args:
            votes: [B, I, J, D]; in a convolutional layer [B, P, K, J, D], see `ReceptiveFields`.
            activations: of the input capsules, [B, I].
        """
        # A routing with `reads_poses = True` is called with the poses of the input capsules, too.
        ...


@runtime_checkable
class FusedRouting(Protocol):
    """Optional: make the votes and route them in one operator. `RoutedLayer.forward` calls it."""

    fused_votes: type[DenseVotes] | type[MatrixVotes]
    """What `route_fused` takes: the votes of a `ClassCaps`, or those of matrix capsules."""

    def fused_reason(self, weight: Tensor) -> str | None:
        """Why a layer with these matrices takes the reference path; None where it takes the fused one.

        `capsexp bench` prints the reason.

        Raises: UserError: the config insists on the fused path, and there is none.
        """
        ...

    def route_fused(self, votes: Any, activations: Tensor) -> Routed:
        """The same as routing the votes that the poses and matrices make, up to rounding.

        Autocast is off. Poses have the dtype of the matrices; activations may have a lower precision.
        """
        ...


@runtime_checkable
class BalancedRouting(Protocol):
    """Optional: start with half of the capsules active. `RoutedLayer.calibrate` calls both methods."""

    def cost(self, votes: Tensor, activations: Tensor) -> Tensor:
        """Return the costs of some images, for `balance`; the batch is the first axis."""
        ...

    def balance(self, cost: Tensor) -> None:
        """Set the start from the costs of all images, unless the config sets it."""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """Optional, for any module of a network: follow a schedule over the training. `advance` calls it."""

    def advance(self, step: Step) -> dict[str, float]:
        """Move to a step of the training. Return the scheduled values, which the training loop records."""
        ...


@runtime_checkable
class TracedRouting(Protocol):
    """Optional: return every iteration. Without it, the routing study sees only the result."""

    def trace(self, votes: Tensor, activations: Tensor) -> list[Routed]:
        """The state after each iteration, by the reference and without a gradient.

        With a further keyword `iterations: int | None` the study may ask for more of them.
        """
        ...


@runtime_checkable
class AgreementRouting(Protocol):
    """Optional: return what a pass adds to the logits. The routing study reports how it changes."""

    def agreement(self, votes: Tensor, poses: Tensor) -> Tensor:
        """Return the amount that a pass ending with these poses adds to the logits b_ij, [B, I, J]."""
        ...


@runtime_checkable
class SteppedRouting(Protocol):
    """Optional: route one iteration at a time. `RoutedLayer.step` calls it, for the concurrent network."""

    iterations: int
    """Passes of the algorithm."""

    def step(self, votes: Tensor, before: Tensor | None) -> Routed:
        """Return the state after one iteration, from the parents' poses before it; None in the first."""
        ...


def reads_poses(routing: object) -> bool:
    """Whether a routing is called with the poses of the children, [B, I, D], as a third argument."""
    return bool(getattr(routing, "reads_poses", False))


def advance(model: nn.Module, step: Step) -> dict[str, float]:
    """Move everything inside a network that follows a schedule to a step of the training.

    The training loop of `capsexp train` calls this before each step; call it in your own loop too. A network
    whose schedules are all constant does not change.

    Args:
        model: a network.
        step: `Step(number, total)`: optimizer steps done, and of the whole training.

    Returns: the scheduled values, by "name/layer", for a log.
    """
    values: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, Scheduled):
            layer = name.removesuffix(".routing")
            values |= {f"{key}/{layer}": value for key, value in module.advance(step).items()}
    return values
