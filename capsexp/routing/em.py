"""EM routing: each parent is a Gaussian fitted to its votes, and active if that saves coding cost."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import ReceptiveFields, Routed
from capsexp.errors import (
    refuse,
    require_at_least_1,
    require_at_most,
    require_finite,
    require_literal,
    require_positive,
)
from capsexp.ops.em_steps import (
    Activation,
    EMOptions,
    InitialCoupling,
    Normalisation,
    check_shapes,
    e_step,
    initial_shares,
    log_shares,
    m_step,
)
from capsexp.ops.kernels import problem
from capsexp.ops.kernels.em import FUSED_ACTIVATION, fused_em_routing, fused_reason
from capsexp.ops.receptive_fields import gather_windows
from capsexp.ops.votes import MatrixVotes
from capsexp.routing import MOST_ITERATIONS
from capsexp.schedule import Saturating, Schedule, Step, require_some_positive, schedule_in

Implementation = Literal["auto", "reference", "fused"]
BALANCED = "balanced"
PAPERS_TEMPERATURES = tuple(Saturating(limit=0.01, decay=0.95)(Step(number, 3)) for number in range(3))


def em_routing(
    votes: Float[Tensor, "B *places J D"],
    activations: Float[Tensor, "B I"],
    *,
    fields: ReceptiveFields | None = None,
    beta_u: Float[Tensor, " J"] | int | float = 0.0,
    beta_a: Float[Tensor, " J"] | int | float = 0.0,
    inverse_temperature: Float[Tensor, " T"] | Sequence[int | float] = PAPERS_TEMPERATURES,
    variance_floor: int | float = 0.0005,
    cost_scale: int | float = 1.0,
    normalisation: Normalisation = "paper",
    initial_coupling: InitialCoupling = "paper",
    activation: Activation = "logistic",
    mean_smoothing: int | float = 0.0,
    detach: bool = False,
) -> Routed:
    """Fit one diagonal Gaussian per parent to the votes of its children, by EM.

    Each iteration computes

        M:  r_ij = R_ij a_i
            mu_j, sigma_j^2 = mean and variance of V_ij over i, weighted by r_ij
            cost_j = sum_h (beta_u + log sigma_j^h) sum_i r_ij
            a_j = sigmoid(lambda (beta_a - cost_j))
        E:  R_ij = a_j N(V_ij; mu_j, sigma_j^2), divided by its sum over the parents of child i

    Procedure 1 of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), with densities as
    logarithms. Parents at all positions and of all types compete for a child. The defaults are the paper's,
    with three iterations; 0 for both betas, which are learned.
    Differs from it in: a variance floor, which the paper leaves out (0 is allowed); nothing else, with the
    other defaults. float16 and bfloat16 votes are routed and returned in float32; autocast is off inside.

    Args:
        votes: V_ij: [B, I, J, D] where every parent sees every child; with `fields` [B, P, K, J, D], of the
            child at place k of the window of position p, for each parent type j.
        activations: a_i.
        fields: which child is at which place; None where every parent sees every child.
        beta_u: cost of each dimension of a child's pose, per parent type.
        beta_a: what a parent saves by being active, per parent type.
        inverse_temperature: lambda of iterations 0 … T-1; T is the number of iterations.
        variance_floor: added to every variance, in squared units of the poses, >= 0.
        cost_scale: factor on the cost.
        normalisation: R of a child sums to 1 over "paper": all its parents; "types": the types at each
            position separately (most public code); "official_v1": the positions of each type separately (the
            authors' first release, convolutional layers only; at stride 2 an idealization, because there
            that release sums over cells that do not belong together).
        initial_coupling: "paper": 1 / number of the child's parents; "official": 1 / J.
        activation: "logistic"; "mixing": a parent's share of all the mass in its layer (the paper's
            alternative; both betas then have no effect).
        mean_smoothing: weight of the previous iteration's mean (at first 0) in the new one, in [0, 1).
        detach: gradients flow through the last iteration only.

    Raises: ValueError: a wrong shape; an unknown option; no iteration.
    Returns: poses mu and activations of the P * J parents in the order (position, type), and the coupling R
        that gave them. See `Routed`.
    Laws: translating all votes translates the poses; children with activation 0 have no effect; values and
        gradients are finite for any number of votes and for equal votes.
    """
    options = EMOptions(
        variance_floor, cost_scale, normalisation, initial_coupling, activation, mean_smoothing, detach
    )
    options.check()
    return em_routing_and_cost(
        votes,
        activations,
        options,
        fields=fields,
        beta_u=beta_u,
        beta_a=beta_a,
        inverse_temperature=inverse_temperature,
    )[0]


def em_routing_and_cost(
    votes: Float[Tensor, "B *places J D"],
    activations: Float[Tensor, "B I"],
    options: EMOptions,
    *,
    fields: ReceptiveFields | None,
    beta_u: Tensor | int | float,
    beta_a: Tensor | int | float,
    inverse_temperature: Tensor | Sequence[int | float],
) -> tuple[Routed, Float[Tensor, "B P J"]]:
    """`em_routing`, and the cost of each parent in the last iteration, for the start of `EMRouting`."""
    if votes.dim() == 4:
        votes = votes.unsqueeze(1)
    check_shapes(votes, activations, fields, len(inverse_temperature))
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    with torch.autocast(votes.device.type, enabled=False):
        active = activations.to(votes.dtype)
        active = active.unsqueeze(1) if fields is None else gather_windows(active, fields)  # [B, P, K]
        first = initial_shares(votes[:1, :, :, 0, 0], votes.shape[3], fields, options.initial_coupling)
        coupling = first.unsqueeze(3).expand(-1, -1, -1, votes.shape[3])
        before = None
        logistic = options.activation == "logistic"
        for iteration, temperature in enumerate(inverse_temperature):
            fitted = m_step(votes, coupling * active.unsqueeze(3), before, options)
            log_deviation = 0.5 * fitted.variance.log().sum(3)  # sum over h of log sigma_h
            cost = options.cost_scale * (votes.shape[4] * beta_u + log_deviation) * fitted.mass
            logit = temperature * (beta_a - cost)
            if iteration + 1 < len(inverse_temperature):  # nothing reads an E-step after the last M-step
                log_active = F.logsigmoid(logit) if logistic else log_shares(fitted.mass)
                with torch.set_grad_enabled(torch.is_grad_enabled() and not options.detach):
                    coupling = e_step(fitted, log_active - log_deviation, fields, options.normalisation)
                before = fitted.mean.detach() if options.detach else fitted.mean
        parents = logit.sigmoid() if logistic else log_shares(fitted.mass).exp()
    coupling = coupling.expand(votes.shape[:4])
    if fields is None:
        coupling = coupling.squeeze(1)
    return Routed(fitted.mean.flatten(1, 2), parents.flatten(1), coupling, fields), cost


class EMRouting(nn.Module):
    """EM routing with its parameters and schedules. See `em_routing`.

    lambda of iteration t is `inverse_temperature` at step t, times `inverse_temperature_ramp` at the step of
    the training (see `advance`), times `class_factor` where every parent sees every child.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes; J is the number of parent types.
        fields: windows of a convolutional layer; None where every parent sees every child.
        iterations: T >= 1.
        inverse_temperature: schedule over the iterations; a number is the same for all.
        inverse_temperature_ramp: factor, a schedule over the training.
        class_factor: factor on lambda in the class layer, > 0.
        beta_u: initial value.
        beta_a: initial value: a number, or "balanced": the median cost of a type's capsules on one batch, so
            that half of them are active (see `balance`).
        beta_a_gain: beta_a = gain / class_factor * parameter (the factor in the class layer only). lambda is
            about 0.001, so without a gain no optimizer could move beta_a.
        cost_norm: None for the paper's cost; a number: the cost is multiplied by cost_norm / (children per
            parent), so that one lambda fits layers with different amounts of data (Gritzman 2019, 2.2).
        variance_floor, normalisation, initial_coupling, activation, mean_smoothing, detach: see `em_routing`.
        implementation: "reference": `em_routing` on votes that the layer makes; "fused": an operator that
            makes the votes itself (capsexp/ops/kernels/em.py); "auto": fused where available.
    Raises: ValueError: a number out of its range; an unknown option.
    """

    fused_votes = MatrixVotes
    inverse_temperatures: Tensor
    ramp: Tensor
    windows: Tensor | None

    def __init__(
        self,
        in_caps: int,
        out_caps: int,
        pose_dim: int,
        fields: ReceptiveFields | None = None,
        *,
        iterations: int,
        inverse_temperature: Schedule | int | float,
        inverse_temperature_ramp: Schedule | int | float,
        class_factor: int | float,
        beta_u: int | float,
        beta_a: Literal["balanced"] | int | float,
        beta_a_gain: int | float,
        cost_norm: int | float | None,
        variance_floor: int | float,
        normalisation: Normalisation,
        initial_coupling: InitialCoupling,
        activation: Activation,
        mean_smoothing: int | float,
        detach: bool,
        implementation: Implementation,
    ) -> None:
        super().__init__()
        require_at_least_1(iterations=iterations)
        require_at_most(MOST_ITERATIONS, iterations=iterations)
        require_literal(Implementation, implementation=implementation)
        require_positive(class_factor=class_factor, beta_a_gain=beta_a_gain, cost_norm=cost_norm)
        require_finite(beta_u=beta_u, beta_a=None if isinstance(beta_a, str) else beta_a)
        if isinstance(beta_a, str) and beta_a != BALANCED:
            refuse(f"beta_a must be a number or {BALANCED}, got {beta_a}")
        if implementation == "fused" and activation != FUSED_ACTIVATION:
            refuse(f"implementation fused is for activation {FUSED_ACTIVATION}, got {activation}")
        self.in_caps, self.out_caps, self.pose_dim = in_caps, out_caps, pose_dim
        self.iterations, self.implementation = iterations, implementation
        self.options = EMOptions(
            variance_floor=float(variance_floor),
            cost_scale=_cost_scale(cost_norm, in_caps, out_caps, fields),
            normalisation=normalisation,
            initial_coupling=initial_coupling,
            activation=activation,
            mean_smoothing=float(mean_smoothing),
            detach=detach,
        )
        self.options.check()
        factor = class_factor if fields is None else 1.0
        self.gain = beta_a_gain / factor
        self.schedule = schedule_in("[0, inf)", inverse_temperature_ramp=inverse_temperature_ramp)
        require_some_positive(inverse_temperature_ramp=self.schedule)
        self.starts_balanced = isinstance(beta_a, str)
        start = 0.0 if isinstance(beta_a, str) else beta_a / self.gain
        self.beta_u = nn.Parameter(torch.full((out_caps,), float(beta_u)))
        self.beta_a = nn.Parameter(torch.full((out_caps,), start))  # in units of the gain
        within_pass = schedule_in("[0, inf)", inverse_temperature=inverse_temperature)
        require_some_positive(inverse_temperature=within_pass)
        temperatures = [factor * within_pass(Step(number, iterations)) for number in range(iterations)]
        self.last_temperature = temperatures[-1]
        # Tensors, because torch.compile would recompile for every new value of a number.
        self.register_buffer("inverse_temperatures", torch.tensor(temperatures), persistent=False)
        self.register_buffer("ramp", torch.tensor(float(self.schedule(Step(0, 1)))))
        self.register_buffer("windows", None if fields is None else fields.children, persistent=False)
        self.counts = (0, 0) if fields is None else (fields.in_caps, fields.connected)

    def forward(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> Routed:
        """Route votes [B, I, J, D], or [B, P, K, J, D] in a convolutional layer."""
        return self._fit(votes, activations)[0]

    def extra_repr(self) -> str:
        """The sizes of the layer, and the iterations."""
        sizes = f"in_caps={self.in_caps}, out_caps={self.out_caps}, pose_dim={self.pose_dim}"
        return f"{sizes}, iterations={self.iterations}"

    @torch.no_grad()
    def trace(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> list[Routed]:
        """The state after each iteration 1 … T, by plain PyTorch.

        lambda of an iteration does not depend on how many follow. There is none for iterations after T.
        """
        return [self._fit(votes, activations, count)[0] for count in range(1, self.iterations + 1)]

    def fused_reason(self, weight: Float[Tensor, "W J n n"]) -> str | None:
        """Why a layer with these matrices takes the reference path; None where it takes the fused one.

        Raises: UserError: the implementation is "fused", and there is none for these matrices.
        """
        if self.implementation == "reference":
            return "routing.implementation=reference"
        if self.options.activation != FUSED_ACTIVATION:
            return f"there is no fused EM routing with activation {self.options.activation}"
        side = weight.shape[2]
        reason = fused_reason(weight.device.type, weight.dtype, self.pose_dim // side, side)
        return problem.insist(self.implementation, reason)

    def route_fused(self, votes: MatrixVotes, activations: Float[Tensor, "B I"]) -> Routed:
        """Make the votes and route them."""
        return fused_em_routing(
            votes,
            activations.to(votes.weight.dtype),
            initial=problem.first_shares(votes, self.options.initial_coupling),
            beta_u=self.beta_u,
            beta_a=self.gain * self.beta_a,
            inverse_temperature=self.inverse_temperatures * self.ramp,
            options=self.options,
        )

    def advance(self, step: Step) -> dict[str, float]:
        """Move the ramp to a step of the training. Return lambda of the last iteration."""
        factor = self.schedule(step)
        self.ramp.fill_(factor)
        return {"inverse_temperature": factor * self.last_temperature}

    def cost(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> Tensor:
        """Cost of each parent in the last iteration, [B, P, J]."""
        return self._fit(votes, activations)[1]

    @torch.no_grad()
    def balance(self, cost: Float[Tensor, "B P J"]) -> None:
        """Set beta_a of each type to the median of its costs, if it starts "balanced"."""
        if self.starts_balanced:
            ordered = cost.flatten(0, 1).sort(0).values
            # torch.median takes the lower of the two in the middle, which is off with few capsules.
            middle = ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]
            self.beta_a.copy_(0.5 * middle / self.gain)

    def _fit(
        self, votes: Tensor, activations: Tensor, iterations: int | None = None
    ) -> tuple[Routed, Tensor]:
        fields = None if self.windows is None else ReceptiveFields(self.windows, *self.counts)
        return em_routing_and_cost(
            votes,
            activations,
            self.options,
            fields=fields,
            beta_u=self.beta_u,
            beta_a=self.gain * self.beta_a,
            inverse_temperature=self.inverse_temperatures[:iterations] * self.ramp,
        )


def _cost_scale(
    cost_norm: int | float | None, in_caps: int, out_caps: int, fields: ReceptiveFields | None
) -> float:
    if cost_norm is None:
        return 1.0
    if fields is None:
        return cost_norm * out_caps / in_caps
    return cost_norm * len(fields.children) * out_caps / fields.connected
