"""The routings of a network, iteration by iteration, and what can be measured in them.

A routing module may offer `trace(votes, activations) -> list[Routed]`: the state after each iteration 1 … T.
One that can go on beyond the number that it has been given takes `iterations`, too. Without `trace` a routing
counts as a single iteration, its result.

Two more things that a routing may have: `squashes = True`, where a pose is a squashed sum of votes and not
their mean; and `agreement(votes, poses)`, where every iteration adds that to the logits.
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
    """A layer of a network, with the capsules that vote in it."""

    name: str
    layer: Any
    """Makes votes by `votes(poses)`, and has a `routing`."""
    children: Capsules


class Traced(NamedTuple):
    """A routing of some pictures."""

    votes: Float[Tensor, "B *I J D"]
    states: list[Routed]
    """After each iteration."""


def routed_layers(model: nn.Module, layers: Mapping[str, Capsules | Routed]) -> list[RoutedLayer]:
    """The layers that route, from the lowest to the class capsules.

    Args:
        model: holds each layer under its name.
        layers: see `Output`.

    Raises:
        UserError: there are none, or one that makes no votes to look at.
    """
    found = []
    for (_, below), (name, here) in pairwise(layers.items()):
        if isinstance(here, Routed):
            layer = getattr(model, name, None)
            if not hasattr(layer, "votes") or not hasattr(layer, "routing"):
                raise UserError(f"{name} has no votes(poses) and no routing, so there is nothing to trace")
            found.append(RoutedLayer(name, layer, Capsules(below.poses, below.activations)))
    if not found:
        raise UserError("this network has no capsules, so there is no routing to study")
    return found


@torch.no_grad()
def traced(layer: Any, children: Capsules, *, iterations: int | None) -> Iterator[Traced]:
    """Route a batch again, in pieces, so that the votes of all of it never exist at once.

    Args:
        layer: see `RoutedLayer`.
        children: the capsules that vote.
        iterations: at least so many, of a routing that can go on beyond its own number; None is its own.
    """
    trace = getattr(layer.routing, "trace", None) or functools.partial(_one_iteration, layer.routing)
    if iterations is not None and "iterations" in inspect.signature(trace).parameters:
        trace = functools.partial(trace, iterations=max(iterations, own_iterations(layer)))
    size = layer.votes(children.poses[:1]).nbytes
    images = images_per_chunk(size, budget=None, device=children.poses.device)
    for poses, activations in zip(*(tensor.split(images) for tensor in children), strict=True):
        votes = layer.votes(poses)
        yield Traced(votes, trace(votes, activations))


def _one_iteration(routing: Callable[..., Routed], votes: Tensor, activations: Tensor) -> list[Routed]:
    return [routing(votes, activations)]


def own_iterations(layer: Any) -> int:
    """Iterations of a layer's routing in the network."""
    return getattr(layer.routing, "iterations", 1)


def measured(layer: Any, routing: Traced) -> dict[str, list[float]]:
    """Means over some pictures, iteration by iteration.

    Returns: `entropy` of the coupling, as a share of its maximum; and from the second iteration on
        `coupling_change`: |R_ij - R_ij of the iteration before|, over all pairs;
        `logit_change`, of a routing by agreement: |what was added to b_ij|, the agreement û·v before;
        `agreement_change`: |that, less what was added the last time|, which alone can go to 0.
    """
    votes, states = routing
    told = {
        "entropy": [coupling_entropy(one.coupling, one.fields) for one in states],
        "coupling_change": [
            (after.coupling - before.coupling).abs().mean() for before, after in pairwise(states)
        ],
    }
    agreement = getattr(layer.routing, "agreement", None)
    if agreement is not None:
        added = [torch.zeros(()).to(votes), *(agreement(votes, one.poses) for one in states[:-1])]
        told["logit_change"] = [one.abs().mean() for one in added[1:]]
        told["agreement_change"] = [(after - before).abs().mean() for before, after in pairwise(added)]
    return {name: [float(value) for value in values] for name, values in told.items()}


def vote_distances(
    layer: Any, votes: Float[Tensor, "B I J D"], state: Routed, *, squared: bool
) -> Float[Tensor, "B I J"]:
    """How far each vote lies from its parent's mean: the pose, or the mean by coupling before a squash."""
    mean = state.poses
    if getattr(layer.routing, "squashes", False):
        total = torch.einsum("bij,bijd->bjd", state.coupling, votes)
        mean = total / state.coupling.sum(1).clamp_min(torch.finfo(votes.dtype).tiny).unsqueeze(2)
    distances = (votes - mean.unsqueeze(1)).square().sum(3)
    return distances if squared else distances.sqrt()


def shares_and_means(
    coupling: Float[Tensor, "B I J"], distances: Float[Tensor, "B I J"]
) -> tuple[Float[Tensor, "B J"], Float[Tensor, "B J"]]:
    """Of all assignment the share that each parent gets, and its mean distance under it."""
    mass = coupling.sum(1)
    means = (distances * coupling).sum(1) / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    return mass / mass.sum(1, keepdim=True), means


def excess(state: Routed, activations: Float[Tensor, "B I"], positions: int) -> Float[Tensor, "B P J"]:
    """What each class gets of the active children at each place beyond an even share.

    The sum over a place's types of activation * (coupling - its mean over the classes). 0 is an even share.
    """
    beyond = state.coupling - state.coupling.mean(2, keepdim=True)
    return (activations.unsqueeze(2) * beyond).unflatten(1, (positions, -1)).sum(2)
