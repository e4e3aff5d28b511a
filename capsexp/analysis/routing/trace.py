"""The routings of a network, iteration by iteration, and metrics of them.

The optional methods `trace` and `agreement` and the attributes `iterations` and `squashes` of a routing are
described in capsexp/routing/__init__.py.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules, Routed
from capsexp.errors import UserError
from capsexp.ops.entropy import coupling_entropy
from capsexp.ops.votes import images_per_chunk
from capsexp.routing import AgreementRouting, Routing, TracedRouting, reads_poses


class TracedLayer(NamedTuple):
    """What a layer routes: its votes and its routing, and the capsules that vote."""

    name: str
    votes: Callable[[Tensor], Tensor]
    """Takes the poses of the children."""
    routing: Routing
    children: Capsules


class RoutingTrace(NamedTuple):
    """The routing of some images in one layer."""

    votes: Float[Tensor, "B *I J D"]
    states: list[Routed]
    """After each iteration."""


def routed_layers(model: nn.Module, layers: Mapping[str, Capsules | Routed]) -> list[TracedLayer]:
    """Return the layers that route, from the lowest to the class capsules.

    Args:
        model: holds each layer under its name.
        layers: see `Output`.

    Raises:
        UserError: there are none, or one has no `votes` or no `routing`.
    """
    routed = []
    for (_, below), (name, here) in pairwise(layers.items()):
        if isinstance(here, Routed):
            layer: Any = getattr(model, name, None)
            if not hasattr(layer, "votes") or not hasattr(layer, "routing"):
                raise UserError(f"{name} has no votes(poses) and no routing, so there is nothing to trace")
            children = Capsules(below.poses, below.activations)
            routed.append(TracedLayer(name, layer.votes, layer.routing, children))
    if not routed:
        raise UserError("this network routes no capsules, so there is no routing to study")
    return routed


@torch.no_grad()
def trace_layer(layer: TracedLayer, *, iterations: int | None) -> Iterator[RoutingTrace]:
    """Route a batch again, in chunks, so that not all of its votes are in memory at once.

    Args:
        layer: one of `routed_layers`.
        iterations: run at least so many, if the routing can run more than its own number; None for its own.
    """
    trace = _trace_function(layer.routing, iterations)
    poses = layer.children.poses
    images = images_per_chunk(layer.votes(poses[:1]).nbytes, budget=None, device=poses.device)
    for poses, activations in zip(*(tensor.split(images) for tensor in layer.children), strict=True):
        votes = layer.votes(poses)
        given = (poses,) if reads_poses(layer.routing) else ()
        yield RoutingTrace(votes, trace(votes, activations, *given))


def _trace_function(routing: Routing, iterations: int | None) -> Callable[..., list[Routed]]:
    if not isinstance(routing, TracedRouting):
        return lambda *inputs: [routing(*inputs)]
    trace: Callable[..., list[Routed]] = routing.trace
    if iterations is None or "iterations" not in inspect.signature(trace).parameters:
        return trace
    return functools.partial(trace, iterations=max(iterations, own_iterations(routing)))


def own_iterations(routing: Routing) -> int:
    """Return the iterations of a routing in the network."""
    return getattr(routing, "iterations", 1)


def trace_metrics(routing: Routing, trace: RoutingTrace) -> dict[str, list[float]]:
    """Return means over some images, iteration by iteration.

    Returns:
        `entropy` of the coupling, as a share of its maximum; and from the second iteration on
        `coupling_change`: |R_ij - R_ij of the previous iteration|, over all pairs;
        `logit_change`, of a routing by agreement: |the amount added to b_ij|, the previous agreement û·v;
        `agreement_change`: |that, minus the amount added before|; only this one can converge to 0.
    """
    votes, states = trace
    metrics = {
        "entropy": [coupling_entropy(state.coupling, state.fields) for state in states],
        "coupling_change": [
            (after.coupling - before.coupling).abs().mean() for before, after in pairwise(states)
        ],
    }
    if isinstance(routing, AgreementRouting):
        added = [torch.zeros(()).to(votes), *(routing.agreement(votes, state.poses) for state in states[:-1])]
        metrics["logit_change"] = [amount.abs().mean() for amount in added[1:]]
        metrics["agreement_change"] = [(after - before).abs().mean() for before, after in pairwise(added)]
    return {name: [float(value) for value in values] for name, values in metrics.items()}


def vote_distances(
    routing: Routing, votes: Float[Tensor, "B I J D"], state: Routed, *, squared: bool
) -> Float[Tensor, "B I J"]:
    """Return the distance of each vote from its parent's mean.

    The mean is the pose; or, if that is squashed, the mean of the votes weighted by the coupling.
    """
    mean = state.poses
    if getattr(routing, "squashes", False):
        total = torch.einsum("bij,bijd->bjd", state.coupling, votes)
        mean = total / state.coupling.sum(1).clamp_min(torch.finfo(votes.dtype).tiny).unsqueeze(2)
    distances = (votes - mean.unsqueeze(1)).square().sum(3)
    return distances if squared else distances.sqrt()


def shares_and_means(
    coupling: Float[Tensor, "B I J"], distances: Float[Tensor, "B I J"]
) -> tuple[Float[Tensor, "B J"], Float[Tensor, "B J"]]:
    """Return each parent's share of all coupling, and the mean distance of its votes by coupling."""
    mass = coupling.sum(1)
    means = (distances * coupling).sum(1) / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    return mass / mass.sum(1, keepdim=True), means


def excess(state: Routed, activations: Float[Tensor, "B I"], positions: int) -> Float[Tensor, "B P J"]:
    """Return each class's share of the active children at each position beyond an even share.

    The sum over a position's types of activation * (coupling - its mean over the classes). Even: 0.
    """
    beyond = state.coupling - state.coupling.mean(2, keepdim=True)
    return (activations.unsqueeze(2) * beyond).unflatten(1, (positions, -1)).sum(2)
