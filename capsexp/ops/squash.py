"""The non-linearity of vector capsules: direction kept, length mapped into [0, 1)."""

import torch
from jaxtyping import Float
from torch import Tensor


def length(vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
    """Euclidean length over the last axis.

    Laws: value and gradient are finite everywhere; both are 0 for a vector of zeros.
    """
    # vector_norm's derivative at 0 is defined as 0. sqrt(sum of squares) would give 0/0 there, and an epsilon
    # under the root would make every other length wrong.
    return torch.linalg.vector_norm(vectors, dim=-1)


def squash(vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Shrink each vector to length n^2 / (1 + n^2), n its own length.

    Eq. 1 of Sabour et al., "Dynamic routing between capsules" (NIPS 2017).
    Differs from it in: float16 and bfloat16 are squashed in float32, which is also what comes back.

    Returns: vectors of length < 1 in the same directions.
    Laws: squash(0) = 0, with gradient 0; rotating the input rotates the output.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    n = length(vectors).unsqueeze(-1)
    return vectors * (n / (1 + n * n))  # one n of the numerator cancels: nothing is divided by the length


def squash_backward(vectors: Float[Tensor, "*N D"], gradient: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Gradient of `squash` with respect to `vectors`, given the one with respect to its result."""
    n = length(vectors).unsqueeze(-1)
    denominator = 1 + n * n
    along = (vectors * gradient).sum(-1, keepdim=True)
    # At n = 0 `along` is 0 as well, so that clamping the divisor changes no value.
    bend = along * (1 - n * n) / (denominator * denominator * n.clamp_min(torch.finfo(n.dtype).tiny))
    return gradient * (n / denominator) + vectors * bend
