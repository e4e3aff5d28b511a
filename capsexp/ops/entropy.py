"""How decided a routing is."""

import math

from jaxtyping import Float
from torch import Tensor


def coupling_entropy(coupling: Float[Tensor, "B I J"]) -> Float[Tensor, ""]:
    """Mean entropy of the coupling coefficients over the parents of a child, as a share of log J.

    Returns: 1 when every child divides itself evenly, 0 when each has chosen one parent (or has but one).
    """
    parents = coupling.shape[-1]
    if parents == 1:
        return coupling.new_zeros(())
    # xlogy is 0 at 0, where x * log(x) is not a number.
    entropy = -coupling.xlogy(coupling).sum(-1)
    return entropy.mean() / math.log(parents)
