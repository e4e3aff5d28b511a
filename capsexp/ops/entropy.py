"""Entropy of the coupling coefficients."""

import torch
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import ReceptiveFields
from capsexp.ops.receptive_fields import scatter_sum


def coupling_entropy(
    coupling: Float[Tensor, "B *I J"], fields: ReceptiveFields | None = None
) -> Float[Tensor, ""]:
    """Mean entropy of the coupling coefficients over the parents of a child, divided by its maximum.

    A child's coefficients are divided by their sum first, because not every routing makes them sum to 1:
    leaky dynamic routing loses a share, and EM routing may normalise over types or positions alone.

    Args:
        coupling: as in `Routed`.
        fields: as in `Routed`.

    Returns: 1 when every child has equal coefficients, 0 when each goes to one parent. Children with one
        parent or none, and children whose coefficients are all 0, have no choice and are left out; 0 if
        there are no others.
    """
    # xlogy is 0 at 0, where x * log(x) is NaN.
    mass, spread, parents = coupling.sum(-1), coupling.xlogy(coupling).sum(-1), coupling.shape[-1]
    if fields is None:
        counts = mass.new_full(mass.shape[1:], parents)
    else:
        counts = scatter_sum(mass.new_full((1, *mass.shape[1:]), parents), fields)[0]
        mass, spread = scatter_sum(mass, fields), scatter_sum(spread, fields)
    chooses = (mass > 0) & (counts > 1)
    shares = torch.where(chooses, (mass.log() - spread / mass) / counts.log(), 0)
    return shares.sum() / chooses.sum().clamp_min(1)
