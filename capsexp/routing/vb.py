"""Variational Bayes routing: each parent is a Gaussian with priors, so none collapses."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import ReceptiveFields, Routed
from capsexp.errors import require_at_least_1, require_at_most, require_literal
from capsexp.ops.em_steps import InitialCoupling, check_shapes, initial_shares, shares_of
from capsexp.ops.kernels import problem
from capsexp.ops.kernels.vb import fused_reason, fused_vb_routing
from capsexp.ops.receptive_fields import gather_windows
from capsexp.ops.vb_steps import Normalisation, VBOptions, evidence, infer, log_densities
from capsexp.ops.votes import MatrixVotes
from capsexp.routing import MOST_ITERATIONS

Implementation = Literal["auto", "reference", "fused"]


def vb_routing(
    votes: Float[Tensor, "B *places J D"],
    activations: Float[Tensor, "B I"],
    *,
    fields: ReceptiveFields | None = None,
    iterations: int = 3,
    beta_a: Float[Tensor, " J"] | int | float = 0.0,
    beta_u: Float[Tensor, " J"] | int | float = 0.0,
    prior_counts: int | float = 1.0,
    prior_strength: int | float = 1.0,
    prior_degrees: int | float | None = None,
    prior_scale: int | float = 1.0,
    outlier: int | float | None = None,
    normalisation: Normalisation = "paper",
    initial_coupling: InitialCoupling = "paper",
) -> Routed:
    """Fit a Gaussian with unknown mean and diagonal precision to the votes for each parent.

    Each iteration computes, with r_ij = R_ij a_i and S_j = sum_i r_ij,

        alpha_j = alpha_0 + S_j,  kappa_j = kappa_0 + S_j,  nu_j = nu_0 + S_j
        m_j = sum_i r_ij V_ij / kappa_j
        psi_j = 1 / Psi_0 + sum_i r_ij (V_ij - m_j)^2 + kappa_0 m_j^2
        R_ij = exp(E[log pi_j N(V_ij; mu_j, Lambda_j)]), divided by its sum over the parents of child i

    and in the end the score evidence_j = beta_a - (exp(E[log pi_j]) H_j + beta_u), H_j the entropy.

    Algorithm 1 of Ribeiro, Leontidis, Kollias, "Capsule routing via variational Bayes" (AAAI 2020), with
    diagonal precisions. The prior mean is 0.
    Differs from it in: log densities, so that R of a child sums to 1 however far its votes are (the authors'
    code divides by at least 1e-11, see `outlier`); R starts at 1 / number of the child's parents at all
    positions (the code: of the types, see `initial_coupling`). The code normalizes poses and scores over the
    batch inside; here the network does (`CapsuleNorm`). float16 and bfloat16 votes are routed and returned in
    float32; autocast is off inside.

    Args:
        votes: V_ij: [B, I, J, D] where every parent sees every child; with `fields` [B, P, K, J, D].
        activations: a_i.
        fields: which child is at which place; None where every parent sees every child.
        iterations: T >= 1.
        beta_a: added to the score, per parent type.
        beta_u: subtracted from the score, per parent type.
        prior_counts: alpha_0 of the Dirichlet prior over the types at a position, > 0.
        prior_strength: kappa_0, the number of votes at 0 that the prior of the mean is worth, >= 0.
        prior_degrees: nu_0 of the Wishart prior, > D - 1; None for D + 1.
        prior_scale: Psi_0 of the Wishart prior, > 0.
        outlier: least sum of densities by which a child's R are divided, in (0, 1); 1e-11 in the authors'
            code. None for no such floor.
        normalisation: R of a child sums to 1 over "paper": all its parents; "types": those at each position.
        initial_coupling: "paper": 1 / number of the child's parents; "official": 1 / J.
    Raises: ValueError: a wrong shape; an unknown option; a number out of its range.
    Returns: poses m and scores of the P * J parents in the order (position, type), activations = their
        sigmoid, and the coupling R that gave them. See `Routed`.
    Laws: children with activation 0 have no effect; without active children a parent is at the prior, and
        everything is finite; with kappa_0 = 0 translating all votes translates the poses.
    """
    options = VBOptions(
        prior_counts, prior_strength, prior_degrees, prior_scale, outlier, normalisation, initial_coupling
    )
    options.check(votes.shape[-1])
    require_at_least_1(iterations=iterations)
    return _route(votes, activations, options, iterations, fields, beta_a, beta_u)


def _route(
    votes: Tensor,
    activations: Tensor,
    options: VBOptions,
    iterations: int,
    fields: ReceptiveFields | None,
    beta_a: Tensor | int | float,
    beta_u: Tensor | int | float,
) -> Routed:
    if votes.dim() == 4:
        votes = votes.unsqueeze(1)
    check_shapes(votes, activations, fields, iterations)
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    with torch.autocast(votes.device.type, enabled=False):
        active = activations.to(votes.dtype)
        active = active.unsqueeze(1) if fields is None else gather_windows(active, fields)  # [B, P, K]
        first = initial_shares(votes[:1, :, :, 0, 0], votes.shape[3], fields, options.initial_coupling)
        coupling = first.unsqueeze(3).expand(-1, -1, -1, votes.shape[3])
        posterior = infer(votes, coupling * active.unsqueeze(3), options)
        for _ in range(iterations - 1):
            logits = log_densities(posterior)
            coupling = shares_of(logits, fields, options.normalisation, outlier=options.outlier)
            posterior = infer(votes, coupling * active.unsqueeze(3), options)
        scores = (beta_a - beta_u + evidence(posterior)).flatten(1)
    coupling = coupling.expand(votes.shape[:4])
    if fields is None:
        coupling = coupling.squeeze(1)
    return Routed(posterior.mean.flatten(1, 2), scores.sigmoid(), coupling, fields, scores)


class VBRouting(nn.Module):
    """Variational Bayes routing with its parameters. See `vb_routing`.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes; J is the number of parent types.
        fields: windows of a convolutional layer; None where every parent sees every child.
        iterations: T >= 1.
        betas: learn beta_a and beta_u per parent type, from 0. A batch norm of the scores removes them.
        prior_counts, prior_strength, prior_degrees, prior_scale: see `vb_routing`.
        outlier, normalisation, initial_coupling: see `vb_routing`.
        implementation: "reference": `vb_routing` on votes that the layer makes; "fused": an operator that
            makes the votes itself (capsexp/ops/kernels/vb.py); "auto": fused where available.
    Raises: ValueError: a number out of its range; an unknown option.
    """

    fused_votes = MatrixVotes
    fused_bias = True
    beta_a: nn.Parameter | None
    beta_u: nn.Parameter | None
    windows: Tensor | None

    def __init__(
        self,
        in_caps: int,
        out_caps: int,
        pose_dim: int,
        fields: ReceptiveFields | None = None,
        *,
        iterations: int,
        betas: bool,
        prior_counts: int | float,
        prior_strength: int | float,
        prior_degrees: int | float | None,
        prior_scale: int | float,
        outlier: int | float | None,
        normalisation: Normalisation,
        initial_coupling: InitialCoupling,
        implementation: Implementation,
    ) -> None:
        super().__init__()
        require_at_least_1(iterations=iterations)
        require_at_most(MOST_ITERATIONS, iterations=iterations)
        require_literal(Implementation, implementation=implementation)
        self.in_caps, self.out_caps, self.pose_dim = in_caps, out_caps, pose_dim
        self.iterations, self.implementation = iterations, implementation
        self.options = VBOptions(
            prior_counts, prior_strength, prior_degrees, prior_scale, outlier, normalisation, initial_coupling
        )
        self.options.check(pose_dim)
        self.beta_a = nn.Parameter(torch.zeros(out_caps)) if betas else None
        self.beta_u = nn.Parameter(torch.zeros(out_caps)) if betas else None
        self.register_buffer("windows", None if fields is None else fields.children, persistent=False)
        self.counts = (0, 0) if fields is None else (fields.in_caps, fields.connected)

    def forward(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> Routed:
        """Route votes [B, I, J, D], or [B, P, K, J, D] in a convolutional layer."""
        return self._fit(votes, activations, self.iterations)

    @torch.no_grad()
    def trace(
        self,
        votes: Float[Tensor, "B *I J D"],
        activations: Float[Tensor, "B I"],
        *,
        iterations: int | None = None,
    ) -> list[Routed]:
        """The state after each iteration, by plain PyTorch.

        Args: iterations: number of iterations, which may be higher than in training; None for as many.
        Raises: ValueError: iterations < 1.
        """
        require_at_least_1(iterations=iterations)
        last = iterations or self.iterations
        return [self._fit(votes, activations, count) for count in range(1, last + 1)]

    def fused_reason(self, weight: Float[Tensor, "W J n n"]) -> str | None:
        """Why a layer with these matrices takes the reference path; None where it takes the fused one.

        Raises: UserError: the implementation is "fused", and there is none for these matrices.
        """
        if self.implementation == "reference":
            return "routing.implementation=reference"
        side = weight.shape[2]
        reason = fused_reason(weight.device.type, weight.dtype, self.pose_dim // side, side)
        return problem.insist(self.implementation, reason)

    def route_fused(self, votes: MatrixVotes, activations: Float[Tensor, "B I"]) -> Routed:
        """Make the votes and route them."""
        return fused_vb_routing(
            votes,
            activations.to(votes.weight.dtype),
            initial=problem.first_shares(votes, self.options.initial_coupling),
            iterations=self.iterations,
            beta_a=0.0 if self.beta_a is None else self.beta_a,
            beta_u=0.0 if self.beta_u is None else self.beta_u,
            options=self.options,
        )

    def extra_repr(self) -> str:
        """The sizes of the layer, and the iterations."""
        sizes = f"in_caps={self.in_caps}, out_caps={self.out_caps}, pose_dim={self.pose_dim}"
        return f"{sizes}, iterations={self.iterations}"

    def _fit(self, votes: Tensor, activations: Tensor, iterations: int) -> Routed:
        fields = None if self.windows is None else ReceptiveFields(self.windows, *self.counts)
        beta_a = 0.0 if self.beta_a is None else self.beta_a
        beta_u = 0.0 if self.beta_u is None else self.beta_u
        return _route(votes, activations, self.options, iterations, fields, beta_a, beta_u)
