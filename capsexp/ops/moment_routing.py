"""Heinsen routing without votes, where all children share one matrix per parent.

An iteration is two matrix products: of [J, I] by the features of the poses (see `moments`), and of these by
[f, J]. Nothing has the size of the votes. The backward pass computes the couplings again from sums over the
children, a few images at a time, so only the last couplings are ever stored.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from capsexp.capsules import Routed
from capsexp.ops.em_steps import SMALLEST_MASS
from capsexp.ops.moments import Fitted, Parents, features, fit, log_densities

CACHED = 2**20
"""Bytes of couplings that are computed at a time: with more they leave the cache between two passes."""


def moment_routing(
    poses: Float[Tensor, "B I D"],
    activations: Float[Tensor, "B I"],
    weight: Float[Tensor, "J n h"],
    *,
    bias: Float[Tensor, "J E"] | None = None,
    offsets: Float[Tensor, "I E"] | None = None,
    beta_use: Float[Tensor, " J"],
    beta_ign: Float[Tensor, " J"],
    iterations: int,
    variance_floor: float,
    mass_epsilon: float,
) -> Routed:
    """`heinsen_routing` on the votes M_i W_j + bias_j + offsets_i, which are never made.

    Differs from it in: rounding, which is smaller here.

    Args:
        poses: M_i, flat, with D / n rows of n numbers; E = D / n * h.
        activations: a_i.
        weight: W_j.
        bias: B_j; None for none.
        offsets: added to the votes of each child; None for none.
        beta_use: the same for all children; see `heinsen_routing`.
        beta_ign: likewise.
        iterations: T >= 1.
        variance_floor: see `heinsen_routing`.
        mass_epsilon: see `heinsen_routing`.
    Returns: see `heinsen_routing`. No second derivatives.
    """
    types, width, out_width = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, weight = poses.unflatten(2, (-1, width)).to(dtype), weight.to(dtype)
    if offsets is not None:  # a longer pose (M_i, o_i) under the matrix (W_j; 1)
        identity = torch.eye(out_width, dtype=dtype, device=weight.device)
        weight = torch.cat([weight, identity.expand(types, -1, -1)], 1)
        per_row = offsets.unflatten(1, (-1, out_width)).to(dtype)
        rows = torch.cat([rows, per_row.expand(len(rows), -1, -1, -1)], 3)
    if bias is None:
        bias = weight.new_zeros(types, rows.shape[2] * out_width)
    learned = [weight, bias.unflatten(1, (-1, out_width)), beta_use, beta_ign]
    options = (iterations, variance_floor, mass_epsilon)
    poses, scores, coupling = _MomentRouting.apply(
        rows, activations.to(dtype), *(tensor.to(dtype) for tensor in learned), options
    )
    return Routed(poses, scores.sigmoid(), coupling, None, scores)


def moments_problem(device: str) -> str | None:
    """Why `moment_routing` is not available on a device; None where it is."""
    return "routing by moments needs float64, which MPS lacks" if device == "mps" else None


class _Children:
    """Children of some images: features of their poses, sums of these, couplings.

    Args:
        rows: poses.
        activations: of the children.
    """

    def __init__(self, rows: Float[Tensor, "b I c m"], activations: Float[Tensor, "b I"]) -> None:
        self.rows, self.active = rows, activations.unsqueeze(2)
        with torch.no_grad():
            self.total = activations.sum(1)
            mean = torch.einsum("bi,bicm->bcm", activations, rows)
            # A constant: the result does not depend on it, but its rounding does.
            self.center = mean / self.total.clamp_min(SMALLEST_MASS).view(-1, 1, 1)
        self.graph = features(rows - self.center.unsqueeze(1))
        self.features = self.graph.detach()
        self.precise = self.features.double()
        self.weighted = self.active * self.features  # so that use = R a is never made

    def even_sums(self, types: int) -> Float[Tensor, "b J f"]:
        """Sums of the features weighted by use = a / J."""
        return (self.weighted.sum(1, keepdim=True) / types).expand(-1, types, -1)

    def sums(self, shares: Float[Tensor, "b I J"]) -> Float[Tensor, "b J f"]:
        """Sums of the features weighted by use = R a."""
        return torch.bmm(shares.transpose(1, 2), self.weighted)

    def shares(self, lines: Float[Tensor, "b J f"]) -> Float[Tensor, "b I J"]:
        """R of the E-step that `log_densities` begins."""
        return torch.bmm(self.precise, lines.transpose(1, 2)).to(self.features.dtype).softmax(2)


class _MomentRouting(torch.autograd.Function):
    """`moment_routing` for autograd."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows, activations, *learned, options = inputs
        router = _Router(learned, *options)
        batch, children, rows_of_pose, _ = rows.shape
        types, _, width = learned[0].shape
        poses = rows.new_empty(batch, types, rows_of_pose * width)
        scores, sums = rows.new_empty(batch, types), []
        coupling = rows.new_full((batch, children, types), 1 / types)
        for chunk in _chunks(coupling):
            some = _Children(rows[chunk], activations[chunk])
            states, shares = [some.even_sums(types)], coupling[chunk]
            for _ in range(router.iterations - 1):
                shares = some.shares(router.lines(states[-1], some))
                states.append(some.sums(shares))
            coupling[chunk] = shares
            fitted = router.fit(states[-1], some.total, some.center)
            poses[chunk], scores[chunk] = fitted.mean.transpose(0, 1).flatten(2), fitted.scores.T
            sums.append(torch.stack(states))
        ctx.options = options
        ctx.save_for_backward(rows, activations, *learned, torch.cat(sums, 1))
        ctx.set_materialize_grads(False)
        return poses, scores, coupling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, activations, *learned, sums = ctx.saved_tensors
        router = _Router(learned, *ctx.options)
        g_rows, g_activations = torch.empty_like(rows), torch.empty_like(activations)
        like = rows.new_empty(1, 1, 1).expand(len(rows), rows.shape[1], len(learned[0]))
        for chunk in _chunks(like):
            with torch.enable_grad():
                some = _Children(rows[chunk].requires_grad_(), activations[chunk])
            parts = [None if tensor is None else tensor[chunk] for tensor in given]
            g_rows[chunk], g_activations[chunk] = router.backward(some, sums[:, chunk], *parts)
        return g_rows, g_activations, *(total.to(rows.dtype) for total in router.gradients), None


def _chunks(coupling: Float[Tensor, "B I J"]) -> Iterator[slice]:
    """Slices of the batch whose couplings stay in the cache."""
    images = max(1, CACHED // max(1, coupling[:1].numel() * coupling.element_size()))
    return (slice(start, start + images) for start in range(0, len(coupling), images))


class _Router:
    """The parents, and the gradients of their parameters so far.

    Args:
        learned: W_j, B_j, beta_use, beta_ign.
        iterations, variance_floor, mass_epsilon: see `heinsen_routing`.
    """

    def __init__(
        self, learned: Sequence[Tensor], iterations: int, variance_floor: float, mass_epsilon: float
    ) -> None:
        self.iterations, self.variance_floor, self.mass_epsilon = iterations, variance_floor, mass_epsilon
        self.parents = Parents(*(tensor.detach().double().requires_grad_() for tensor in learned))
        self.gradients = [torch.zeros_like(tensor) for tensor in self.parents]

    def fit(self, sums: Tensor, total: Tensor, center: Tensor) -> Fitted:
        """See `moments.fit`."""
        return fit(
            sums,
            total,
            center,
            self.parents,
            variance_floor=self.variance_floor,
            mass_epsilon=self.mass_epsilon,
        )

    def lines(self, sums: Tensor, some: _Children, total: Tensor | None = None) -> Float[Tensor, "b J f"]:
        """The E-step that follows these sums; see `log_densities`."""
        fitted = self.fit(sums, some.total if total is None else total, some.center)
        return log_densities(fitted, self.parents.weight)

    def backward(
        self,
        some: _Children,
        sums: Float[Tensor, "T b J f"],
        g_poses: Tensor | None,
        g_scores: Tensor | None,
        g_coupling: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of poses and activations; add those of the parameters to `gradients`."""
        g_features, g_active = torch.zeros_like(some.features), torch.zeros_like(some.active)
        g_weighted = torch.zeros_like(some.features)  # of those that a multiplies
        g_sums, g_total = self._through_last(some, sums[-1], g_poses, g_scores)
        for number in reversed(range(self.iterations - 1)):
            leaves = _leaves(sums[number], some.total)
            with torch.enable_grad():
                lines = self.lines(leaves[0], some, leaves[1])
            shares = some.shares(lines.detach())
            by_share = torch.bmm(some.features, g_sums.transpose(1, 2)).mul_(shares)
            along = by_share.sum(2, keepdim=True)
            g_active += along
            g_logits = by_share.addcmul_(shares, along, value=-1)  # divided by a
            g_lines = torch.bmm(g_logits.transpose(1, 2), some.weighted)
            plain = lines.detach().to(shares.dtype)
            g_weighted.baddbmm_(shares, g_sums).baddbmm_(g_logits, plain)
            if number + 2 == self.iterations and g_coupling is not None:
                by_share = g_coupling * shares
                g_logits = by_share.addcmul_(shares, by_share.sum(2, keepdim=True), value=-1)
                g_features.baddbmm_(g_logits, plain)
                g_lines.baddbmm_(g_logits.transpose(1, 2), some.features)
            g_sums, more = self._grad([lines], leaves, [g_lines])
            g_total = g_total + more
        g_even = g_sums.sum(1, keepdim=True) / g_sums.shape[1]
        g_active += torch.bmm(some.features, g_even.transpose(1, 2)) + g_total.view(-1, 1, 1)
        g_features.addcmul_(some.active, g_weighted + g_even)
        (g_rows,) = torch.autograd.grad(some.graph, some.rows, g_features)
        return g_rows, g_active.squeeze(2)

    def _through_last(
        self, some: _Children, sums: Tensor, g_poses: Tensor | None, g_scores: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the last sums and of the total activation, from those of poses and scores."""
        leaves = _leaves(sums, some.total)
        with torch.enable_grad():
            fitted = self.fit(leaves[0], leaves[1], some.center)
            results = [(fitted.mean.transpose(0, 1).flatten(2), g_poses), (fitted.scores.T, g_scores)]
        known = [(result, gradient) for result, gradient in results if gradient is not None]
        if not known:
            return torch.zeros_like(sums), torch.zeros_like(some.total)
        outputs, gradients = zip(*known, strict=True)
        return self._grad(outputs, leaves, gradients)

    def _grad(
        self, results: Sequence[Tensor], leaves: Sequence[Tensor], given: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        given = [gradient.double() for gradient in given]
        g_sums, g_total, *more = torch.autograd.grad(
            results, [*leaves, *self.parents], given, materialize_grads=True
        )
        for total, part in zip(self.gradients, more, strict=True):
            total += part
        return g_sums, g_total


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]
