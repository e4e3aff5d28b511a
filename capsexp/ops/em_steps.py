"""The steps of EM routing as tensor functions: coupling at the start, M-step, E-step."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import ReceptiveFields
from capsexp.errors import require_in, require_literal, require_not_negative
from capsexp.ops.receptive_fields import gather_windows, scatter_max, scatter_sum

Normalisation = Literal["paper", "types", "official_v1"]
InitialCoupling = Literal["paper", "official"]
Activation = Literal["logistic", "mixing"]
SMALLEST_MASS = 1e-8  # lower bound of a parent's mass as a divisor


class EMOptions(NamedTuple):
    """The switches of EM routing that are the same in all iterations. See `em_routing`."""

    variance_floor: int | float
    cost_scale: int | float
    normalisation: Normalisation
    initial_coupling: InitialCoupling
    activation: Activation
    mean_smoothing: int | float
    detach: bool

    def check(self) -> None:
        """Raise ValueError for a number out of its range or an unknown name."""
        require_literal(Normalisation, normalisation=self.normalisation)
        require_literal(InitialCoupling, initial_coupling=self.initial_coupling)
        require_literal(Activation, activation=self.activation)
        require_not_negative(variance_floor=self.variance_floor)
        require_in("[0, 1)", mean_smoothing=self.mean_smoothing)


class Gaussians(NamedTuple):
    """The result of an M-step."""

    mean: Float[Tensor, "B P J D"]
    squared: Float[Tensor, "B P K J D"]
    """(V - mu)^2, of every vote."""
    variance: Float[Tensor, "B P J D"]
    mass: Float[Tensor, "B P J"]
    """Sum of R_ij a_i over the children."""


def check_shapes(votes: Tensor, activations: Tensor, fields: ReceptiveFields | None, iterations: int) -> None:
    """Raise ValueError where votes [B, P, K, J, D], activations and windows do not fit each other."""
    if votes.dim() != 5:
        raise ValueError(f"votes must have shape [B, I, J, D] or [B, P, K, J, D], got {list(votes.shape)}")
    batch, positions, places = votes.shape[:3]
    expected = [1, places] if fields is None else list(fields.children.shape)
    if [positions, places] != expected:
        source = "without fields" if fields is None else "from fields"
        raise ValueError(f"votes must have [P, K] = {expected} {source}, got {[positions, places]}")
    in_caps = places if fields is None else fields.in_caps
    if list(activations.shape) != [batch, in_caps]:
        raise ValueError(
            f"activations must have shape [B, I] = {[batch, in_caps]}, got {list(activations.shape)}"
        )
    if iterations < 1:
        raise ValueError("inverse_temperature must hold one number per iteration, got none")


def initial_shares(
    like: Float[Tensor, "1 P K"], types: int, fields: ReceptiveFields | None, initial: InitialCoupling
) -> Float[Tensor, "1 P K"]:
    """R of the first iteration, the same for every type. See `EMOptions`."""
    shares = torch.ones_like(like)
    if fields is not None and initial == "paper":
        shares = gather_windows(scatter_sum(shares, fields), fields).reciprocal()
    return shares / types


def m_step(
    votes: Float[Tensor, "B P K J D"],
    shares: Float[Tensor, "B P K J"],
    before: Float[Tensor, "B P J D"] | None,
    options: EMOptions,
) -> Gaussians:
    """Weighted mean and variance of the votes for each parent, as EM routing takes them.

    Args:
        votes: V_ij.
        shares: r_ij = R_ij a_i, the weights.
        before: means of the previous iteration; None in the first.
        options: of these, `mean_smoothing` and `variance_floor` count.
    """
    return fit_gaussians(
        votes, shares, before, smoothing=options.mean_smoothing, variance_floor=options.variance_floor
    )


def fit_gaussians(
    votes: Float[Tensor, "B P K J D"],
    shares: Float[Tensor, "B P K J"],
    before: Float[Tensor, "B P J D"] | None = None,
    *,
    smoothing: int | float = 0.0,
    variance_floor: int | float,
    mass_epsilon: int | float = 0.0,
) -> Gaussians:
    """Weighted mean and variance of the votes for each parent.

    Args:
        votes: V_ij.
        shares: r_ij, the weights.
        before: means of the previous iteration; None in the first.
        smoothing: weight of these in the new ones.
        variance_floor: added to every variance.
        mass_epsilon: added to the sum of the weights where it divides. It pulls mean and variance towards 0.
    """
    # Matrix products over K, on memory in the order [B, P, J, K, D], which `window_votes` makes: the only
    # tensor of the votes' size that is written is that of the squared differences.
    mass = shares.sum(2)
    # Clamped: adding a number to the divisor would pull the mean towards 0.
    divisor = (mass + mass_epsilon if mass_epsilon else mass).clamp_min(SMALLEST_MASS)
    weights = (shares / divisor.unsqueeze(2)).permute(0, 1, 3, 2).unsqueeze(3)
    by_parent = votes.permute(0, 1, 3, 2, 4)
    mean = torch.matmul(weights, by_parent)
    if smoothing:
        mean = (1 - smoothing) * mean + (0 if before is None else smoothing * before.unsqueeze(3))
    # The same as (by_parent - mean).square(), with one pass forward and two backward instead of two and six.
    squared = F.mse_loss(by_parent, mean.expand_as(by_parent), reduction="none")
    variance = torch.matmul(weights, squared).squeeze(3) + variance_floor
    return Gaussians(mean.squeeze(3), squared.permute(0, 1, 3, 2, 4), variance, mass)


def e_step(
    fitted: Gaussians,
    weight: Float[Tensor, "B P J"],
    fields: ReceptiveFields | None,
    normalisation: Normalisation,
) -> Float[Tensor, "B P K J"]:
    """R_ij from log(a_j p_j) = weight - 1/2 sum_h (V - mu)^2 / sigma^2; pi cancels."""
    precision = 0.5 * fitted.variance.reciprocal().unsqueeze(3)
    distance = torch.matmul(precision, fitted.squared.permute(0, 1, 3, 4, 2)).squeeze(3)  # [B, P, J, K]
    logits = (weight.unsqueeze(3) - distance).transpose(2, 3)
    return shares_of(logits, fields, normalisation)


def shares_of(
    logits: Float[Tensor, "B P K J"],
    fields: ReceptiveFields | None,
    normalisation: Normalisation,
    *,
    outlier: int | float | None = None,
) -> Float[Tensor, "B P K J"]:
    """Densities, given as logarithms, divided by their sum over the parents that compete for a child.

    Args:
        logits: log densities of each child under each of its parents.
        fields: windows; None where every parent sees every child.
        normalisation: see `EMOptions`.
        outlier: smallest divisor: a child that no parent explains keeps less than 1; None for none.
    """
    if fields is None or normalisation == "types":
        if outlier is None:
            return logits.softmax(3)
        floor = logits.new_tensor(outlier).log()
        return (logits - torch.maximum(logits.logsumexp(3, keepdim=True), floor)).exp()
    if normalisation == "paper":
        top = scatter_max(logits.amax(3), fields)
        if outlier is not None:
            top = top.clamp_min(math.log(outlier))
        shares = (logits - gather_windows(top, fields).unsqueeze(3)).exp()
        total = scatter_sum(shares.sum(3), fields)
        if outlier is not None:
            total = torch.maximum(total, (math.log(outlier) - top).exp())
        return shares / gather_windows(total, fields).unsqueeze(3)
    shares = (logits - gather_windows(scatter_max(logits, fields), fields)).exp()
    return shares / gather_windows(scatter_sum(shares, fields), fields)


def log_shares(mass: Float[Tensor, "B P J"]) -> Float[Tensor, "B P J"]:
    """Logarithm of each parent's share of the mass in its layer."""
    total = mass.sum((1, 2), keepdim=True).clamp_min(SMALLEST_MASS)
    return (mass / total).clamp_min(torch.finfo(mass.dtype).tiny).log()
