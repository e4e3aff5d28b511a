"""Entropy of the coupling coefficients."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import ReceptiveFields
from capsexp.ops.receptive_fields import scatter_sum


def coupling_entropy(
    coupling: Float[Tensor, "B *I J"], fields: ReceptiveFields | None = None
) -> Float[Tensor, ""]:
    """Mean entropy of the coupling coefficients over the parents of a child, divided by its maximum.

    Args:
        coupling: as in `Routed`.
        fields: as in `Routed`. With windows, a child's coefficients are divided by their sum first, and
            children with one parent or none are left out.

    Returns: 1 when every child has equal coefficients, 0 when each goes to one parent (or has only one).
    """
    if fields is not None:
        return _entropy_over_windows(coupling, fields)
    parents = coupling.shape[-1]
    if parents == 1:
        return coupling.new_zeros(())
    # xlogy is 0 at 0, where x * log(x) is NaN.
    entropy = -coupling.xlogy(coupling).sum(-1)
    return entropy.mean() / math.log(parents)


def _entropy_over_windows(coupling: Float[Tensor, "B P K J"], fields: ReceptiveFields) -> Float[Tensor, ""]:
    mass = scatter_sum(coupling.sum(-1), fields)
    parents = scatter_sum(coupling.new_full((1, *coupling.shape[1:3]), coupling.shape[-1]), fields)[0]  # [I]
    mass = mass.clamp_min(torch.finfo(mass.dtype).tiny)
    entropy = mass.log() - scatter_sum(coupling.xlogy(coupling).sum(-1), fields) / mass
    choice = parents > 1
    shares = entropy[:, choice] / parents[choice].log()
    return shares.mean() if shares.numel() else coupling.new_zeros(())
