"""Non-linearities of vector capsules: keep the direction, map the length into [0, 1)."""

import torch
from jaxtyping import Float
from torch import Tensor


def length(vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
    """Euclidean length over the last axis.

    Laws: value and gradient are finite everywhere; both are 0 for a vector of zeros.
    """
    # The derivative of vector_norm at 0 is 0. That of sqrt(sum of squares) is 0/0 there, and an epsilon under
    # the root would change every other length.
    return torch.linalg.vector_norm(vectors, dim=-1)


def squash(vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Shrink each vector to length n^2 / (1 + n^2), where n is its own length.

        v = |s|^2 / (1 + |s|^2)  s / |s|

    Eq. 1 of Sabour et al., "Dynamic routing between capsules" (NIPS 2017).
    Differs from it in: float16 and bfloat16 are computed and returned in float32.

    Args: vectors: s.
    Returns: v, of length < 1 and in the same direction.
    Laws: squash(0) = 0, with gradient 0; rotating the input rotates the output.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    n = length(vectors).unsqueeze(-1)
    return vectors * (n / (1 + n * n))  # one n cancels, so nothing is divided by n


def exponential_squash(vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Shrink each vector to length 1 - exp(-n), where n is its own length.

        v = (1 - exp(-|s|))  s / |s|

    Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet: capsule network with self-attention routing" (Scientific
    Reports 11, 2021). Short vectors keep their length, where `squash` squares it.
    Differs from it in: no epsilon beside |s|; float16 and bfloat16 are computed and returned in float32.

    Args: vectors: s.
    Returns: v, of length < 1 up to rounding and in the same direction.
    Laws: the result at 0 is 0, with the gradient of the identity; rotating the input rotates the output.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    # expm1 keeps the digits of short vectors. At the smallest normal number the factor is 1, its limit at 0.
    n = length(vectors).unsqueeze(-1).clamp_min(torch.finfo(vectors.dtype).tiny)
    return vectors * (-torch.expm1(-n) / n)


def squash_backward(vectors: Float[Tensor, "*N D"], gradient: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Gradient of `squash` with respect to `vectors`, given the gradient of its result."""
    n = length(vectors).unsqueeze(-1)
    denominator = 1 + n * n
    along = (vectors * gradient).sum(-1, keepdim=True)
    # At n = 0 `along` is 0 too, so clamping the divisor changes no value.
    bend = along * (1 - n * n) / (denominator * denominator * n.clamp_min(torch.finfo(n.dtype).tiny))
    return gradient * (n / denominator) + vectors * bend
