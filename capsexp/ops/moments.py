"""Gaussians of the votes from moments of the poses, where all children share one matrix per parent.

A vote V_ij = M_i W_j + B_j is linear in the pose of the child. So a parent's mean and variance follow from
weighted sums of the `features` of M_i: 1, its entries, and the products of two entries of one row; 57 numbers
for a pose of 4x4. The distance of a vote from a parent's mean is a linear function of the same features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from capsexp.ops.em_steps import SMALLEST_MASS


class Parents(NamedTuple):
    """The learned numbers of a layer, in float64."""

    weight: Float[Tensor, "J m h"]
    bias: Float[Tensor, "J c h"]
    beta_use: Float[Tensor, " J"]
    beta_ign: Float[Tensor, " J"]


class Fitted(NamedTuple):
    """Gaussians of the parents, and their scores."""

    scores: Float[Tensor, "J B"]
    mean: Float[Tensor, "J B c h"]
    variance: Float[Tensor, "J B c h"]
    rest: Float[Tensor, "J B c h"]
    """The vote of a child whose pose is the center, less the mean."""


def features(rows: Float[Tensor, "B I c m"]) -> Float[Tensor, "B I f"]:
    """1, the entries of a pose, and the products of two entries of one row."""
    one = rows.new_ones(1).expand(*rows.shape[:2], 1)
    return torch.cat([one, rows.flatten(2), _products(rows, 3).flatten(2)], 2)


def fit(
    sums: Float[Tensor, "B J f"],
    total: Float[Tensor, " B"],
    center: Float[Tensor, "B c m"],
    parents: Parents,
    *,
    variance_floor: float,
    mass_epsilon: float,
) -> Fitted:
    """The M-step of Heinsen routing, in float64.

    In float32 the couplings would have two to three times the error of those from votes, because variances
    and distances are differences here.

    Args:
        sums: of the features of M_i - center, weighted by use_ij.
        total: sum of the activations.
        center: any pose.
        parents: W_j, B_j and betas.
        variance_floor: see `heinsen_routing`.
        mass_epsilon: see `heinsen_routing`.
    """
    weight, entries = parents.weight, center[0].numel()
    by_parent = sums.double().transpose(0, 1)  # [J, B, f]: each parent has a matrix of its own
    mass = by_parent[..., 0]
    divisor = (mass + mass_epsilon).clamp_min(SMALLEST_MASS)
    moments = by_parent[..., 1:] / divisor.unsqueeze(2)
    first = moments[..., :entries].unflatten(2, center.shape[1:])
    covariance = moments[..., entries:].unflatten(2, (len(center[0]), -1)) - _products(first, 3)
    moved = _per_parent(first, weight)
    at_center = _per_parent(center.double().expand(len(weight), -1, -1, -1), weight)
    at_center = at_center + parents.bias.unsqueeze(1)
    missing = (1 - mass / divisor)[..., None, None]  # 0, unless something was added to the mass
    rest = missing * at_center - moved
    variance = _per_parent(covariance, _square(weight)) + (missing * at_center).square()
    variance = (variance - missing * rest.square()).clamp_min(0) + variance_floor
    prices = (parents.beta_use + parents.beta_ign)[:, None] * mass
    return Fitted(prices - parents.beta_ign[:, None] * total, at_center - rest, variance, rest)


def log_densities(fitted: Fitted, weight: Float[Tensor, "J m h"]) -> Float[Tensor, "B J f"]:
    """The E-step: vectors whose product with the features of a child is log(sigmoid(x_j) p_j) + constant."""
    precision = 0.5 / fitted.variance
    tilted = precision * fitted.rest
    height = F.logsigmoid(fitted.scores) - 0.5 * fitted.variance.log().sum((2, 3))
    constant = height - (tilted * fitted.rest).sum((2, 3))
    linear = -2 * _per_parent(tilted, weight.transpose(1, 2))
    quadratic = -_per_parent(precision, _square(weight).transpose(1, 2))
    return torch.cat([constant.unsqueeze(2), linear.flatten(2), quadratic.flatten(2)], 2).transpose(0, 1)


def _products(tensor: Tensor, dim: int) -> Tensor:
    """Products of two entries along an axis, in the order (0, 0), (0, 1), …, (1, 1), (1, 2), …, each once."""
    width = tensor.shape[dim]
    parts = [tensor.narrow(dim, k, 1) * tensor.narrow(dim, k, width - k) for k in range(width)]
    return torch.cat(parts, dim)


def _square(weight: Float[Tensor, "J m h"]) -> Float[Tensor, "J t h"]:
    """(x W)_h^2 as a linear map of the products of x, where that of two different entries counts twice."""
    width = weight.shape[1]
    counts = torch.tensor([1.0 if a == b else 2.0 for a in range(width) for b in range(a, width)])
    return _products(weight, 1) * counts.to(weight)[:, None]


def _per_parent(rows: Float[Tensor, "J B c m"], weight: Float[Tensor, "J m h"]) -> Float[Tensor, "J B c h"]:
    return torch.bmm(rows.flatten(1, 2), weight).unflatten(1, rows.shape[1:3])
