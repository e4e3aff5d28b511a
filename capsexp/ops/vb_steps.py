"""The steps of variational Bayes routing as tensor functions: posteriors, evidence, log densities."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from capsexp.errors import refuse, require_in, require_literal, require_not_negative, require_positive
from capsexp.ops.em_steps import SMALLEST_MASS, InitialCoupling

Normalisation = Literal["paper", "types"]


class VBOptions(NamedTuple):
    """The switches of variational Bayes routing. See `vb_routing`."""

    prior_counts: int | float
    prior_strength: int | float
    prior_degrees: int | float | None
    prior_scale: int | float
    outlier: int | float | None
    normalisation: Normalisation
    initial_coupling: InitialCoupling

    def check(self, pose_dim: int) -> None:
        """Raise ValueError for a number out of its range or an unknown name."""
        require_literal(Normalisation, normalisation=self.normalisation)
        require_literal(InitialCoupling, initial_coupling=self.initial_coupling)
        require_positive(prior_counts=self.prior_counts, prior_scale=self.prior_scale)
        require_not_negative(prior_strength=self.prior_strength)
        require_in("(0, 1)", outlier=self.outlier)
        if self.prior_degrees is not None and not self.prior_degrees > pose_dim - 1:
            refuse(f"prior_degrees must be > pose_dim - 1 ({pose_dim - 1}), got {self.prior_degrees}")

    def degrees(self, pose_dim: int) -> float:
        """Return nu_0."""
        return float(pose_dim + 1 if self.prior_degrees is None else self.prior_degrees)


class Posterior(NamedTuple):
    """What a step of variational Bayes infers about the parents."""

    mean: Float[Tensor, "B P J D"]
    """m_j."""
    squared: Float[Tensor, "B P K J D"]
    """(V - m)^2, of every vote."""
    scale: Float[Tensor, "B P J D"]
    """psi_j, the inverse scale of the Wishart distribution."""
    strength: Float[Tensor, "B P J"]
    """kappa_j."""
    degrees: Float[Tensor, "B P J"]
    """nu_j."""
    log_share: Float[Tensor, "B P J"]
    """E[log pi_j], of the type among those at its position."""
    log_precision: Float[Tensor, "B P J"]
    """E[log det Lambda_j]."""


def infer(
    votes: Float[Tensor, "B P K J D"], shares: Float[Tensor, "B P K J"], options: VBOptions
) -> Posterior:
    """Return the posteriors of the parents under the votes, weighted by r_ij = R_ij a_i."""
    dim = votes.shape[4]
    mass = shares.sum(2)
    strength = options.prior_strength + mass
    counts, degrees = options.prior_counts + mass, options.degrees(dim) + mass
    # Matrix products over K, on memory in the order [B, P, J, K, D], as in `m_step`.
    weights = shares.permute(0, 1, 3, 2).unsqueeze(3)
    by_parent = votes.permute(0, 1, 3, 2, 4)
    # Clamped for prior_strength 0. The prior's mean is 0.
    mean = torch.matmul(weights, by_parent) / strength.clamp_min(SMALLEST_MASS)[..., None, None]
    squared = (by_parent - mean).square()
    spread = torch.matmul(weights, squared) + options.prior_strength * mean.square()
    scale = 1 / options.prior_scale + spread.squeeze(3)
    halves = 0.5 * (degrees.unsqueeze(3) - torch.arange(dim, dtype=votes.dtype, device=votes.device))
    log_precision = halves.digamma().sum(3) + dim * math.log(2) - scale.log().sum(3)
    log_share = counts.digamma() - counts.sum(2, keepdim=True).digamma()
    squared = squared.permute(0, 1, 3, 2, 4)
    return Posterior(mean.squeeze(3), squared, scale, strength, degrees, log_share, log_precision)


def log_densities(posterior: Posterior) -> Float[Tensor, "B P K J"]:
    """E[log pi_j N(V_ij; mu_j, Lambda_j)] of each vote."""
    dim = posterior.mean.shape[3]
    constant = posterior.log_share + 0.5 * posterior.log_precision - 0.5 * dim * math.log(2 * math.pi)
    constant = constant - 0.5 * dim / posterior.strength.clamp_min(SMALLEST_MASS)
    precision = 0.5 * posterior.degrees.unsqueeze(3) / posterior.scale
    distance = torch.matmul(precision.unsqueeze(3), posterior.squared.permute(0, 1, 3, 4, 2)).squeeze(3)
    return (constant.unsqueeze(3) - distance).transpose(2, 3)


def evidence(posterior: Posterior) -> Float[Tensor, "B P J"]:
    """-exp(E[log pi_j]) H_j, with H_j the entropy of a Gaussian of the expected precision."""
    dim = posterior.mean.shape[3]
    entropy = 0.5 * dim * math.log(2 * math.pi * math.e) - 0.5 * posterior.log_precision
    return -posterior.log_share.exp() * entropy
