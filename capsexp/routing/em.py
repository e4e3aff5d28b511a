"""EM routing: a parent is a Gaussian over its children's votes, its activation a coding cost saved."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import ReceptiveFields, Routed
from capsexp.errors import UserError, require_at_least_1, require_one_of
from capsexp.ops.kernels.em import (
    FUSED_ACTIVATION,
    FUSED_OPTIONS,
    NORMALISATIONS,
    fused_em_routing,
    why_not_fused,
)
from capsexp.ops.receptive_fields import gather_windows, scatter_max, scatter_sum
from capsexp.ops.votes import MatrixVotes
from capsexp.schedule import Schedule, Step, as_schedule

INITIAL_COUPLINGS = ("paper", "official")
ACTIVATIONS = ("logistic", "mixing")
IMPLEMENTATIONS = ("auto", "reference", "fused")
BALANCED = "balanced"
SMALLEST_MASS = 1e-8  # of what a parent gets from all its children, as a divisor


class Gaussians(NamedTuple):
    """What an M-step returns."""

    mean: Float[Tensor, "B P J D"]
    squared: Float[Tensor, "B P K J D"]
    """(V - mu)^2, of every vote."""
    variance: Float[Tensor, "B P J D"]
    mass: Float[Tensor, "B P J"]
    """Sum of R_ij a_i over the children."""


def em_routing(
    votes: Float[Tensor, "B P K J D"],
    activations: Float[Tensor, "B I"],
    *,
    fields: ReceptiveFields | None,
    beta_u: Float[Tensor, " J"],
    beta_a: Float[Tensor, " J"],
    inverse_temperature: Float[Tensor, " T"],
    variance_floor: float,
    cost_scale: float,
    normalisation: str,
    initial_coupling: str,
    activation: str,
    mean_smoothing: float,
    detach: bool,
) -> tuple[Routed, Float[Tensor, "B P J"]]:
    """Fit one diagonal Gaussian per parent to the votes of its children, by EM.

    Procedure 1 of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), with densities as
    logarithms. Parents at all positions and of all types compete for a child.
    Differs from it in: a variance floor, which the paper leaves out (0 is allowed). With mean_smoothing 0,
    cost_scale 1, detach False and "paper" or "logistic" for the other switches: in nothing else. float16 and
    bfloat16 votes are routed in float32, which is also what comes back; autocast is off inside.

    Args:
        votes: V_ij of the child at place k of the window of position p, for each parent type j. Where every
            parent sees every child, P = 1 and K = I.
        activations: a_i.
        fields: which child is where; None where P = 1 and K = I.
        beta_u: cost of each dimension of a child's pose, per parent type.
        beta_a: what a parent saves by being active, per type.
        inverse_temperature: lambda of iterations 0 … T-1, whose number this sets.
        variance_floor: added to every variance, in squared units of the poses.
        cost_scale: factor on the cost of the data.
        normalisation: R of a child is 1 in sum over "paper": all its parents; "types": the types at each
            position apart (what most public code does); "official_v1": the positions of each type apart (the
            authors' first release, convolutional layers only).
        initial_coupling: "paper": 1 / number of the child's parents; "official": 1 / J.
        activation: "logistic"; "mixing": a parent's share of all the mass in its layer (the paper's
            alternative; leaves both betas without effect).
        mean_smoothing: share of the mean that stays that of the iteration before (at first 0), in [0, 1).
        detach: gradients flow through the last iteration only.

    Returns: poses mu and activations of the P * J parents in the order (position, type), the coupling R that
        made them; and the cost of each parent, cost_scale * sum_h (beta_u + log sigma_h) * mass.
    Laws: translating all votes translates the poses; children with activation 0 have no effect; everything is
        finite, with finite gradients, however few and however equal the votes are.
    """
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    with torch.autocast(votes.device.type, enabled=False):
        active = activations.to(votes.dtype)
        active = active.unsqueeze(1) if fields is None else gather_windows(active, fields)  # [B, P, K]
        first = initial_shares(votes[:1, :, :, 0, 0], votes.shape[3], fields, initial_coupling)
        coupling = first.unsqueeze(3).expand(-1, -1, -1, votes.shape[3])
        before = None
        for iteration, temperature in enumerate(inverse_temperature):
            fitted = _m_step(votes, coupling * active.unsqueeze(3), before, mean_smoothing, variance_floor)
            log_deviation = 0.5 * fitted.variance.log().sum(3)  # sum over h of log sigma_h
            cost = cost_scale * (votes.shape[4] * beta_u + log_deviation) * fitted.mass
            logit = temperature * (beta_a - cost)
            if iteration + 1 < len(inverse_temperature):  # nothing reads an E-step after the last M-step
                log_active = F.logsigmoid(logit) if activation == "logistic" else _log_shares(fitted.mass)
                with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
                    coupling = _e_step(fitted, log_active - log_deviation, fields, normalisation)
                before = fitted.mean.detach() if detach else fitted.mean
        parents = logit.sigmoid() if activation == "logistic" else _log_shares(fitted.mass).exp()
    coupling = coupling.expand(votes.shape[:4])
    if fields is None:
        coupling = coupling.squeeze(1)
    return Routed(fitted.mean.flatten(1, 2), parents.flatten(1), coupling, fields), cost


def initial_shares(
    like: Float[Tensor, "1 P K"], types: int, fields: ReceptiveFields | None, initial: str
) -> Float[Tensor, "1 P K"]:
    """R of the first iteration, of every type alike. See `em_routing`."""
    one = torch.ones_like(like)
    if fields is not None and initial == "paper":
        one = gather_windows(scatter_sum(one, fields), fields).reciprocal()
    return one / types


def _m_step(
    votes: Float[Tensor, "B P K J D"],
    shares: Float[Tensor, "B P K J"],
    before: Float[Tensor, "B P J D"] | None,
    smoothing: float,
    floor: float,
) -> Gaussians:
    # Matrix products over K, on memory in the order [B, P, J, K, D], which `window_votes` makes: no tensor of
    # the votes' size is written but the squared differences.
    mass = shares.sum(2)
    # Clamped: a number added to the divisor would pull the mean towards 0.
    weights = (shares / mass.clamp_min(SMALLEST_MASS).unsqueeze(2)).permute(0, 1, 3, 2).unsqueeze(3)
    by_parent = votes.permute(0, 1, 3, 2, 4)
    mean = torch.matmul(weights, by_parent)
    if smoothing:
        mean = (1 - smoothing) * mean + (0 if before is None else smoothing * before.unsqueeze(3))
    # The same as (by_parent - mean).square(), in one pass forward and two backward instead of two and six.
    squared = F.mse_loss(by_parent, mean.expand_as(by_parent), reduction="none")
    variance = torch.matmul(weights, squared).squeeze(3) + floor
    return Gaussians(mean.squeeze(3), squared.permute(0, 1, 3, 2, 4), variance, mass)


def _e_step(
    fitted: Gaussians, weight: Float[Tensor, "B P J"], fields: ReceptiveFields | None, normalisation: str
) -> Float[Tensor, "B P K J"]:
    """R_ij from log(a_j p_j) = weight - 1/2 sum_h (V - mu)^2 / sigma^2; pi cancels."""
    precision = 0.5 * fitted.variance.reciprocal().unsqueeze(3)
    distance = torch.matmul(precision, fitted.squared.permute(0, 1, 3, 4, 2)).squeeze(3)  # [B, P, J, K]
    logits = (weight.unsqueeze(3) - distance).transpose(2, 3)
    if fields is None or normalisation == "types":
        return logits.softmax(3)
    if normalisation == "paper":
        shares = (logits - gather_windows(scatter_max(logits.amax(3), fields), fields).unsqueeze(3)).exp()
        return shares / gather_windows(scatter_sum(shares.sum(3), fields), fields).unsqueeze(3)
    shares = (logits - gather_windows(scatter_max(logits, fields), fields)).exp()
    return shares / gather_windows(scatter_sum(shares, fields), fields)


def _log_shares(mass: Float[Tensor, "B P J"]) -> Float[Tensor, "B P J"]:
    """Logarithm of each parent's share of the mass in its layer."""
    total = mass.sum((1, 2), keepdim=True).clamp_min(SMALLEST_MASS)
    return (mass / total).clamp_min(torch.finfo(mass.dtype).tiny).log()


class EMRouting(nn.Module):
    """EM routing with its parameters and schedules. See `em_routing`.

    lambda of iteration t is `inverse_temperature` at step t, times `inverse_temperature_ramp` at the step of
    the training (see `advance`), times `class_factor` where every parent sees every child.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes; J is the number of parent types.
        fields: windows of a convolutional layer; None where every parent sees every child.
        iterations: T >= 1.
        inverse_temperature: schedule over the iterations of one pass; a number is the same for all.
        inverse_temperature_ramp: schedule over the training, of a factor.
        class_factor: factor on lambda in the class layer, > 0.
        beta_u: where it starts.
        beta_a: where it starts: a number, or "balanced": at the median cost of a type's capsules on one
            batch, so that half of them are active (see `balance`).
        beta_a_gain: beta_a = gain / class_factor * parameter (the factor in the class layer only). lambda is
            about 0.001, so without a gain no optimiser could move beta_a.
        cost_norm: None for the paper's cost; a number: the cost is multiplied by cost_norm / (children per
            parent), so that one lambda fits layers with different amounts of data (Gritzman 2019, 2.2).
        variance_floor, normalisation, initial_coupling, activation, mean_smoothing, detach: see `em_routing`.
        implementation: "reference": `em_routing`, on votes that a layer has made; "fused": the same by an
            operator that makes them itself (capsexp/ops/kernels/em.py); "auto": fused where it is to be had.
    Raises: ValueError: a number out of its range; an option that does not exist.
    """

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
        beta_a: str | int | float,
        beta_a_gain: int | float,
        cost_norm: int | float | None,
        variance_floor: int | float,
        normalisation: str,
        initial_coupling: str,
        activation: str,
        mean_smoothing: int | float,
        detach: bool,
        implementation: str,
    ) -> None:
        super().__init__()
        require_at_least_1(iterations=iterations)
        require_one_of(IMPLEMENTATIONS, implementation=implementation)
        require_one_of(NORMALISATIONS, normalisation=normalisation)
        require_one_of(INITIAL_COUPLINGS, initial_coupling=initial_coupling)
        require_one_of(ACTIVATIONS, activation=activation)
        _require_positive(class_factor=class_factor, beta_a_gain=beta_a_gain)
        if cost_norm is not None:
            _require_positive(cost_norm=cost_norm)
        if not 0 <= variance_floor < math.inf:
            raise ValueError(f"variance_floor must be >= 0, got {variance_floor}")
        if not 0 <= mean_smoothing < 1:
            raise ValueError(f"mean_smoothing must be in [0, 1), got {mean_smoothing}")
        if isinstance(beta_a, str) and beta_a != BALANCED:
            raise ValueError(f"beta_a must be a number or {BALANCED}, got {beta_a}")
        if implementation == "fused" and activation != FUSED_ACTIVATION:
            raise ValueError(f"implementation fused is for activation {FUSED_ACTIVATION}, got {activation}")
        self.implementation = implementation
        self.options: dict[str, Any] = {
            "variance_floor": float(variance_floor),
            "cost_scale": _cost_scale(cost_norm, in_caps, out_caps, fields),
            "normalisation": normalisation,
            "initial_coupling": initial_coupling,
            "activation": activation,
            "mean_smoothing": float(mean_smoothing),
            "detach": detach,
        }
        self.iterations, self.pose_dim = iterations, pose_dim
        self.factor = class_factor if fields is None else 1.0
        self.gain = beta_a_gain / self.factor
        self.schedule = as_schedule(inverse_temperature_ramp)
        self.starts_balanced = beta_a == BALANCED
        start = 0.0 if isinstance(beta_a, str) else beta_a / self.gain
        self.beta_u = nn.Parameter(torch.full((out_caps,), float(beta_u)))
        self.beta_a = nn.Parameter(torch.full((out_caps,), start))  # in units of the gain
        within_pass = as_schedule(inverse_temperature)
        temperatures = [self.factor * within_pass(Step(number, iterations)) for number in range(iterations)]
        self.last_temperature = temperatures[-1]
        # Tensors, because torch.compile would take a number that changes for a new program.
        self.register_buffer("inverse_temperatures", torch.tensor(temperatures), persistent=False)
        self.register_buffer("ramp", torch.tensor(float(self.schedule(Step(0, 1)))))
        self.register_buffer("windows", None if fields is None else fields.children, persistent=False)
        self.counts = (0, 0) if fields is None else (fields.in_caps, fields.connected)

    def forward(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> Routed:
        """Route votes [B, I, J, D], or [B, P, K, J, D] in a convolutional layer."""
        return self._fit(votes, activations)[0]

    @torch.no_grad()
    def trace(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> list[Routed]:
        """The state after each iteration 1 … T, by plain PyTorch.

        lambda of an iteration does not depend on how many follow. Beyond T no lambda was ever trained with.
        """
        return [self._fit(votes, activations, count)[0] for count in range(1, self.iterations + 1)]

    def why_plain(self, weight: Float[Tensor, "W J n n"]) -> str | None:
        """Why a layer with these matrices takes the plain path; None where it takes the fused one."""
        if self.implementation == "reference":
            return "routing.implementation=reference"
        if self.options["activation"] != FUSED_ACTIVATION:
            return f"there is no fused EM routing with activation {self.options['activation']}"
        side = weight.shape[2]
        return why_not_fused(weight.device.type, weight.dtype, self.pose_dim // side, side)

    def makes_votes(self, weight: Float[Tensor, "W J n n"]) -> bool:
        """Whether a layer with these matrices should call `route_unmade`.

        Raises: UserError: the implementation is "fused", and that is not to be had here.
        """
        reason = self.why_plain(weight)
        if reason is not None and self.implementation == "fused":
            raise UserError(f"routing.implementation=fused: {reason}")
        return reason is None

    def route_unmade(self, votes: MatrixVotes, activations: Float[Tensor, "B I"]) -> Routed:
        """Make the votes and route them."""
        positions = 1 if votes.fields is None else len(votes.fields.children)
        like = votes.poses.new_empty(1, positions, len(votes.matrices))
        types, initial = votes.weight.shape[1], self.options["initial_coupling"]
        return fused_em_routing(
            votes,
            activations,
            initial=initial_shares(like, types, votes.fields, initial).squeeze(0),
            beta_u=self.beta_u,
            beta_a=self.gain * self.beta_a,
            inverse_temperature=self.inverse_temperatures * self.ramp,
            **{name: self.options[name] for name in FUSED_OPTIONS},
        )

    def advance(self, step: Step) -> dict[str, float]:
        """Bring the ramp to a step of the training. Returns lambda of the last iteration, for the record."""
        factor = self.schedule(step)
        self.ramp.fill_(factor)
        return {"inverse_temperature": factor * self.last_temperature}

    def cost(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> Tensor:
        """Cost of each parent in the last iteration, [B, P, J]."""
        return self._fit(votes, activations)[1]

    @torch.no_grad()
    def balance(self, cost: Float[Tensor, "B P J"]) -> None:
        """Set beta_a of each type to the median of its costs, if it is to start "balanced"."""
        if self.starts_balanced:
            ordered = cost.flatten(0, 1).sort(0).values
            # torch.median takes the lower of the two in the middle; with few capsules that is not half.
            middle = ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]
            self.beta_a.copy_(0.5 * middle / self.gain)

    def _fit(
        self, votes: Tensor, activations: Tensor, iterations: int | None = None
    ) -> tuple[Routed, Tensor]:
        fields = None
        if self.windows is None:
            votes = votes.unsqueeze(1)
        else:
            fields = ReceptiveFields(self.windows, *self.counts)
        return em_routing(
            votes,
            activations,
            fields=fields,
            beta_u=self.beta_u,
            beta_a=self.gain * self.beta_a,
            inverse_temperature=self.inverse_temperatures[:iterations] * self.ramp,
            **self.options,
        )


def _cost_scale(
    cost_norm: int | float | None, in_caps: int, out_caps: int, fields: ReceptiveFields | None
) -> float:
    if cost_norm is None:
        return 1.0
    if fields is None:
        return cost_norm * out_caps / in_caps
    return cost_norm * len(fields.children) * out_caps / fields.connected


def _require_positive(**given: int | float) -> None:
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0, got {value}")
