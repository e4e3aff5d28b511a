"""A start at which half of a layer's capsules are active."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from capsexp.capsules import Capsules

ROUNDS = 3
"""The costs that a routing balances depend, through its E-steps, on what the round before has set."""


@torch.no_grad()
def balance(
    routing: nn.Module, votes: Callable[[Tensor], Tensor], capsules: Capsules, *, images: int
) -> None:
    """Let the routing of a layer start balanced on these capsules, if it can.

    Args:
        routing: has `cost(votes, activations)` and `balance(costs)`, or is left alone.
        votes: makes the layer's votes from poses.
        capsules: the layer's input.
        images: pictures whose votes are made at a time.
    """
    cost, start = getattr(routing, "cost", None), getattr(routing, "balance", None)
    if cost is None or start is None:
        return
    pieces = list(zip(*(tensor.split(images) for tensor in capsules), strict=True))
    for _ in range(ROUNDS):
        start(torch.cat([cost(votes(poses), activations) for poses, activations in pieces]))
