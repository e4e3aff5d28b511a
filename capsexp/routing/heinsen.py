"""Heinsen routing: a parent's score is the benefit of its children less the cost of those it ignores."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import ReceptiveFields, Routed
from capsexp.errors import (
    require_at_least_1,
    require_at_most,
    require_literal,
    require_not_negative,
)
from capsexp.ops.em_steps import check_shapes, e_step, fit_gaussians, initial_shares
from capsexp.ops.kernels import problem
from capsexp.ops.kernels.heinsen import fused_heinsen_routing, fused_reason
from capsexp.ops.moment_routing import moment_routing, moments_problem
from capsexp.ops.receptive_fields import gather_windows
from capsexp.ops.votes import MatrixVotes
from capsexp.routing import MOST_ITERATIONS

Implementation = Literal["auto", "reference", "fused"]


def heinsen_routing(
    votes: Float[Tensor, "B *places J D"],
    activations: Float[Tensor, "B I"],
    *,
    beta_use: Float[Tensor, "K J"],
    beta_ign: Float[Tensor, "K J"],
    fields: ReceptiveFields | None = None,
    iterations: int = 3,
    variance_floor: int | float = 1e-5,
    mass_epsilon: int | float = 0.0,
) -> Routed:
    """Fit one diagonal Gaussian per parent to the votes of its children, with a price for each child.

    Each iteration computes

        use_ij = R_ij a_i;  ign_ij = a_i - use_ij
        x_j = sum_i beta_use_ij use_ij - sum_i beta_ign_ij ign_ij
        mu_j, sigma_j^2 = mean and variance of V_ij over i, weighted by use_ij
        R_ij = sigmoid(x_j) N(V_ij; mu_j, sigma_j^2), divided by its sum over the parents of child i

    R starts even; nothing reads an R after the last iteration. Algorithm 1 of Heinsen, "An algorithm for
    routing capsules in all domains" (arXiv 1911.00792).
    Differs from it in: the divisor of mean and variance is clamped at 1e-8, where the author's code adds 1e-5
    to it (see `mass_epsilon`); the code's 1e-5 on every variance stays. Windows are ours: parents at all
    positions and of all types compete for a child, as in EM routing. The children's activations sigmoid(x_i)
    are given, not their scores. float16 and bfloat16 votes are routed and returned in float32; autocast is
    off inside.

    Args:
        votes: V_ij: [B, I, J, D] where every parent sees every child; with `fields` [B, P, K, J, D], of the
            child at place k of the window of position p, for each parent type j.
        activations: a_i = sigmoid(x_i).
        beta_use: benefit of each unit of a child that a parent uses, for each place of a window (or each
            child) and parent type; [1, J] is the same for all children.
        beta_ign: cost of each unit of it that the parent ignores, likewise.
        fields: which child is at which place; None where every parent sees every child.
        iterations: T >= 1.
        variance_floor: added to every variance, in squared units of the poses, >= 0.
        mass_epsilon: added to a parent's mass where it divides, >= 0; 1e-5 in the author's code.

    Raises: ValueError: a wrong shape; a number out of its range.
    Returns: poses mu, activations sigmoid(x) and scores x of the P * J parents in the order (position, type),
        and the coupling R that gave them. See `Routed`.
    Laws: translating all votes of a parent translates its pose and changes nothing else, with mass_epsilon 0;
        children with activation 0 have no effect; values and gradients are finite for equal votes and for
        children that are all inactive.
    """
    require_at_least_1(iterations=iterations)
    require_not_negative(variance_floor=variance_floor, mass_epsilon=mass_epsilon)
    *_, last = _states(
        votes,
        activations,
        beta_use,
        beta_ign,
        fields,
        iterations=iterations,
        variance_floor=variance_floor,
        mass_epsilon=mass_epsilon,
    )
    return last


def _states(
    votes: Float[Tensor, "B *places J D"],
    activations: Float[Tensor, "B I"],
    beta_use: Float[Tensor, "K J"],
    beta_ign: Float[Tensor, "K J"],
    fields: ReceptiveFields | None,
    *,
    iterations: int,
    variance_floor: int | float,
    mass_epsilon: int | float,
) -> Iterator[Routed]:
    """The result of `heinsen_routing` after each iteration."""
    if votes.dim() == 4:
        votes = votes.unsqueeze(1)
    check_shapes(votes, activations, fields, iterations)
    places, types = votes.shape[2:4]
    _check_betas(places, types, beta_use=beta_use, beta_ign=beta_ign)
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    with torch.autocast(votes.device.type, enabled=False):
        active = activations.to(votes.dtype)
        active = active.unsqueeze(1) if fields is None else gather_windows(active, fields)
        active = active.unsqueeze(3)  # [B, P, K, 1]
        coupling = initial_shares(votes[:1, :, :, 0, 0], types, fields, "paper").unsqueeze(3)
        coupling = coupling.expand(len(votes), -1, -1, types)
        ignored = (beta_ign * active).sum(2)  # what ignoring every child costs
        for iteration in range(iterations):
            use = coupling * active
            scores = ((beta_use + beta_ign) * use).sum(2) - ignored
            fitted = fit_gaussians(votes, use, variance_floor=variance_floor, mass_epsilon=mass_epsilon)
            yield _routed(scores, fitted.mean, coupling, fields)
            if iteration + 1 < iterations:
                weight = F.logsigmoid(scores) - 0.5 * fitted.variance.log().sum(3)
                coupling = e_step(fitted, weight, fields, "paper")


def _routed(scores: Tensor, mean: Tensor, coupling: Tensor, fields: ReceptiveFields | None) -> Routed:
    scores = scores.flatten(1)
    coupling = coupling.squeeze(1) if fields is None else coupling
    return Routed(mean.flatten(1, 2), scores.sigmoid(), coupling, fields, scores)


def _check_betas(places: int, types: int, **betas: Tensor) -> None:
    for name, beta in betas.items():
        if beta.dim() != 2 or beta.shape[0] not in (1, places) or beta.shape[1] != types:
            raise ValueError(
                f"{name} must have shape {[places, types]} or {[1, types]}, got {list(beta.shape)}"
            )


class HeinsenRouting(nn.Module):
    """Heinsen routing with its parameters. See `heinsen_routing`.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes; J is the number of parent types.
        fields: windows of a convolutional layer; None where every parent sees every child.
        shared: one beta_use and beta_ign per parent type for all children, as in the author's layers whose
            matrices are shared; otherwise one per child, in windows one per place.
        iterations: T >= 1.
        beta_start: standard deviation of the normal distribution that both betas start from; 0 as published.
        variance_floor, mass_epsilon: see `heinsen_routing`.
        implementation: "reference": `heinsen_routing` on votes that the layer makes; "fused": an
            operator that makes the votes itself (capsexp/ops/kernels/heinsen.py), or, where that is not
            available and all children share one matrix, moments of the poses
            (capsexp/ops/moment_routing.py); "auto": fused where available.
    Raises: ValueError: a number out of its range; an unknown option.
    """

    fused_votes = MatrixVotes
    fused_bias = True
    windows: Tensor | None

    def __init__(
        self,
        in_caps: int,
        out_caps: int,
        pose_dim: int,
        fields: ReceptiveFields | None = None,
        shared: bool = False,
        *,
        iterations: int,
        beta_start: int | float,
        variance_floor: int | float,
        mass_epsilon: int | float,
        implementation: Implementation,
    ) -> None:
        super().__init__()
        require_at_least_1(iterations=iterations)
        require_at_most(MOST_ITERATIONS, iterations=iterations)
        require_not_negative(beta_start=beta_start, variance_floor=variance_floor, mass_epsilon=mass_epsilon)
        require_literal(Implementation, implementation=implementation)
        self.in_caps, self.out_caps, self.pose_dim = in_caps, out_caps, pose_dim
        self.iterations, self.implementation = iterations, implementation
        self.variance_floor, self.mass_epsilon = float(variance_floor), float(mass_epsilon)
        places = in_caps if fields is None else fields.children.shape[1]
        shape = (1 if shared else places, out_caps)
        self.beta_use = nn.Parameter(beta_start * torch.randn(shape))
        self.beta_ign = nn.Parameter(beta_start * torch.randn(shape))
        self.register_buffer("windows", None if fields is None else fields.children, persistent=False)
        self.counts = (0, 0) if fields is None else (fields.in_caps, fields.connected)

    def forward(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> Routed:
        """Route votes [B, I, J, D], or [B, P, K, J, D] in a convolutional layer."""
        *_, last = self._states(votes, activations, self.iterations)
        return last

    def extra_repr(self) -> str:
        """The sizes of the layer, and the iterations."""
        sizes = f"in_caps={self.in_caps}, out_caps={self.out_caps}, pose_dim={self.pose_dim}"
        return f"{sizes}, iterations={self.iterations}"

    @torch.no_grad()
    def trace(
        self,
        votes: Float[Tensor, "B *I J D"],
        activations: Float[Tensor, "B I"],
        iterations: int | None = None,
    ) -> list[Routed]:
        """The state after each iteration, by the reference.

        Args:
            votes: see `heinsen_routing`.
            activations: of the children.
            iterations: how many; None for the module's own number.
        """
        return list(self._states(votes, activations, iterations or self.iterations))

    def fused_reason(self, weight: Float[Tensor, "W J n n"]) -> str | None:
        """Why a layer with these matrices takes the reference path; None where it takes the fused one.

        Raises: UserError: the implementation is "fused", and there is none for these matrices.
        """
        if self.implementation == "reference":
            return "routing.implementation=reference"
        reason = self._kernel_reason(weight)  # also reports a missing library
        return None if self._has_moments(weight) else problem.insist(self.implementation, reason)

    def route_fused(self, votes: MatrixVotes, activations: Float[Tensor, "B I"]) -> Routed:
        """Make the votes and route them; where there is no kernel, by moments of the poses, without votes."""
        activations = activations.to(votes.weight.dtype)
        if self._kernel_reason(votes.weight) is None:
            return fused_heinsen_routing(
                votes,
                activations,
                beta_use=self.beta_use,
                beta_ign=self.beta_ign,
                iterations=self.iterations,
                variance_floor=self.variance_floor,
                mass_epsilon=self.mass_epsilon,
            )
        return moment_routing(
            votes.poses,
            activations,
            votes.weight[0],
            bias=None if votes.bias is None else votes.bias[0],
            offsets=votes.offsets,
            beta_use=self.beta_use[0],
            beta_ign=self.beta_ign[0],
            iterations=self.iterations,
            variance_floor=self.variance_floor,
            mass_epsilon=self.mass_epsilon,
        )

    def _kernel_reason(self, weight: Float[Tensor, "W J n n"]) -> str | None:
        side = weight.shape[2]
        return fused_reason(weight.device.type, weight.dtype, self.pose_dim // side, side)

    def _has_moments(self, weight: Float[Tensor, "W J n n"]) -> bool:
        """Whether moments of the poses could replace the votes: all children share a matrix and betas."""
        shared = self.windows is None and len(weight) == len(self.beta_use) == 1
        return shared and moments_problem(weight.device.type) is None

    def _states(self, votes: Tensor, activations: Tensor, iterations: int) -> Iterator[Routed]:
        return _states(
            votes,
            activations,
            self.beta_use,
            self.beta_ign,
            None if self.windows is None else ReceptiveFields(self.windows, *self.counts),
            iterations=iterations,
            variance_floor=self.variance_floor,
            mass_epsilon=self.mass_epsilon,
        )
