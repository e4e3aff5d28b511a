"""The routings of a network, iteration by iteration, and metrics of them.

A routing module may offer `trace(votes, activations) -> list[Routed]`: the state after each iteration 1 … T.
One that can run more iterations than it is configured for takes `iterations`, too. Without `trace`, a routing
counts as a single iteration, its result.

A routing may also have `squashes = True`, if a pose is a squashed sum of votes and not their mean; and
`agreement(votes, poses)`, if every iteration adds that to the logits.
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


class RoutedLayer(NamedTuple):
    """A layer of a network, with the capsules that vote for its capsules."""

    name: str
    layer: Any
    """Has `votes(poses)` and a `routing`."""
    children: Capsules


class RoutingTrace(NamedTuple):
    """The routing of some images in one layer."""

    votes: Float[Tensor, "B *I J D"]
    states: list[Routed]
    """After each iteration."""


def routed_layers(model: nn.Module, layers: Mapping[str, Capsules | Routed]) -> list[RoutedLayer]:
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
            layer = getattr(model, name, None)
            if not hasattr(layer, "votes") or not hasattr(layer, "routing"):
                raise UserError(f"{name} has no votes(poses) and no routing, so there is nothing to trace")
            routed.append(RoutedLayer(name, layer, Capsules(below.poses, below.activations)))
    if not routed:
        raise UserError("this network has no capsules, so there is no routing to study")
    return routed


@torch.no_grad()
def trace_layer(layer: Any, children: Capsules, *, iterations: int | None) -> Iterator[RoutingTrace]:
    """Route a batch again, in chunks, so that not all of its votes are in memory at once.

    Args:
        layer: see `RoutedLayer`.
        children: the capsules that vote.
        iterations: run at least so many, if the routing can run more than its own number; None for its own.
    """
    trace = getattr(layer.routing, "trace", None) or functools.partial(_one_iteration, layer.routing)
    if iterations is not None and "iterations" in inspect.signature(trace).parameters:
        trace = functools.partial(trace, iterations=max(iterations, own_iterations(layer)))
    size = layer.votes(children.poses[:1]).nbytes
    images = images_per_chunk(size, budget=None, device=children.poses.device)
    for poses, activations in zip(*(tensor.split(images) for tensor in children), strict=True):
        votes = layer.votes(poses)
        yield RoutingTrace(votes, trace(votes, activations))


def _one_iteration(routing: Callable[..., Routed], votes: Tensor, activations: Tensor) -> list[Routed]:
    return [routing(votes, activations)]


def own_iterations(layer: Any) -> int:
    """Return the iterations of a layer's routing in the network."""
    return getattr(layer.routing, "iterations", 1)


def trace_metrics(layer: Any, trace: RoutingTrace) -> dict[str, list[float]]:
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
    agreement = getattr(layer.routing, "agreement", None)
    if agreement is not None:
        added = [torch.zeros(()).to(votes), *(agreement(votes, state.poses) for state in states[:-1])]
        metrics["logit_change"] = [amount.abs().mean() for amount in added[1:]]
        metrics["agreement_change"] = [(after - before).abs().mean() for before, after in pairwise(added)]
    return {name: [float(value) for value in values] for name, values in metrics.items()}


def vote_distances(
    layer: Any, votes: Float[Tensor, "B I J D"], state: Routed, *, squared: bool
) -> Float[Tensor, "B I J"]:
    """Return the distance of each vote from its parent's mean.

    The mean is the pose; or, if that is squashed, the mean of the votes weighted by the coupling.
    """
    mean = state.poses
    if getattr(layer.routing, "squashes", False):
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
