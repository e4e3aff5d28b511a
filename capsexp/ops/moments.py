"""Heinsen routing without votes, where all children share one matrix per parent.

A vote V_ij = M_i W_j + B_j is linear in the pose of the child. So a parent's mean and variance follow from
weighted sums of the entries of M_i and of their products, and the distance of a vote from a parent's mean is
a quadratic form of M_i. An iteration is two matrix products of [I, J] by the features of a pose: 1, its
entries and the products within each of its rows, 57 numbers for a pose of 4x4. Nothing has the size of the
votes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from capsexp.capsules import Routed
from capsexp.ops.em_steps import SMALLEST_MASS

CACHED = 2**21
"""Bytes of couplings that are computed at a time: larger ones leave the cache between two passes."""


class MomentOptions(NamedTuple):
    """What is constant. See `heinsen_routing`."""

    iterations: int
    variance_floor: float
    mass_epsilon: float


class _Parents(NamedTuple):
    """The learned numbers of a layer."""

    weight: Float[Tensor, "J m h"]
    bias: Float[Tensor, "J c h"]
    beta_use: Float[Tensor, " J"]
    beta_ign: Float[Tensor, " J"]


class _Fitted(NamedTuple):
    """Gaussians of the parents."""

    scores: Float[Tensor, "J b"]
    mean: Float[Tensor, "J b c h"]
    variance: Float[Tensor, "J b c h"]
    rest: Float[Tensor, "J b c h"]
    """The vote of a child whose pose is the center, less the mean."""


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

    Differs from it in: rounding. Sums of squares lose digits where the poses' spread is large beside the
    deviation of a parent's votes; poses are taken relative to their mean in each image to keep that small.

    Args:
        poses: M_i, flat, with D / n rows of n numbers; E = D / n * h.
        activations: a_i.
        weight: W_j.
        bias: B_j; None for none.
        offsets: added to the votes of each child; None for none.
        beta_use, beta_ign, iterations, variance_floor, mass_epsilon: see `heinsen_routing`.
    Returns: see `heinsen_routing`. No second derivatives.
    """
    types, width, out_width = weight.shape
    rows = poses.unflatten(2, (-1, width))
    if offsets is not None:  # a longer pose (M_i, o_i) under the matrix (W_j; 1)
        identity = torch.eye(out_width, dtype=weight.dtype, device=weight.device)
        weight = torch.cat([weight, identity.expand(types, -1, -1)], 1)
        per_row = offsets.unflatten(1, (-1, out_width)).to(rows.dtype)
        rows = torch.cat([rows, per_row.expand(len(rows), -1, -1, -1)], 3)
    if bias is None:
        bias = weight.new_zeros(types, rows.shape[2] * out_width)
    options = MomentOptions(iterations, variance_floor, mass_epsilon)
    mean, scores, coupling = _MomentRouting.apply(
        rows, activations, weight, bias.unflatten(1, (-1, out_width)), beta_use, beta_ign, options
    )
    return Routed(mean, scores.sigmoid(), coupling, None, scores)


class _MomentRouting(torch.autograd.Function):
    """Routing some images at a time; the backward pass computes the couplings again from the sums."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, "B I c m"],
        activations: Float[Tensor, "B I"],
        weight: Float[Tensor, "J m h"],
        bias: Float[Tensor, "J c h"],
        beta_use: Float[Tensor, " J"],
        beta_ign: Float[Tensor, " J"],
        options: MomentOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parents = _Parents(weight, bias, beta_use, beta_ign)
        batch, children, types = len(rows), rows.shape[1], len(weight)
        means = rows.new_empty(batch, types, rows.shape[2] * weight.shape[2])
        scores = rows.new_empty(batch, types)
        coupling = rows.new_full((batch, children, types), 1 / types)
        sums = []
        for chunk in _chunks(rows, types):
            image = _Images(rows[chunk], activations[chunk])
            states = [image.even_sums(types)]
            for _ in range(options.iterations - 1):
                line = _lines(_fit(states[-1], image.total, image.center, parents, options), parents)
                shares = image.shares(line, out=coupling[chunk])
                states.append(image.sums(shares))
            fitted = _fit(states[-1], image.total, image.center, parents, options)
            means[chunk] = fitted.mean.transpose(0, 1).flatten(2)
            scores[chunk] = fitted.scores.T
            sums.append(torch.stack(states))
        ctx.options = options
        ctx.save_for_backward(rows, activations, *parents, torch.cat(sums, 1))
        ctx.set_materialize_grads(False)
        return means, scores, coupling

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_means: Tensor | None, g_scores: Tensor | None, g_coupling: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows, activations, *learned, sums = ctx.saved_tensors
        parents = _Parents(*learned)
        g_rows, g_activations = torch.empty_like(rows), torch.empty_like(activations)
        g_parents = [torch.zeros_like(tensor) for tensor in parents]
        given = (g_means, g_scores, g_coupling)
        for chunk in _chunks(rows, len(parents.weight)):
            with torch.enable_grad():
                image = _Images(rows[chunk].requires_grad_(), activations[chunk])
            parts = [None if tensor is None else tensor[chunk] for tensor in given]
            g_rows[chunk], g_activations[chunk], *more = _backward(
                image, sums[:, chunk], parents, ctx.options, *parts
            )
            for total, part in zip(g_parents, more, strict=True):
                total += part
        return g_rows, g_activations, *g_parents, None


def _chunks(rows: Float[Tensor, "B I c m"], types: int) -> Iterator[slice]:
    """Slices of the batch whose couplings stay in the cache."""
    images = max(1, CACHED // max(1, rows.shape[1] * types * rows.element_size()))
    return (slice(start, start + images) for start in range(0, len(rows), images))


class _Images:
    """Children of some images: the features of their poses, and sums of these.

    Args:
        rows: poses.
        activations: of the children.
    """

    def __init__(self, rows: Float[Tensor, "b I c m"], activations: Float[Tensor, "b I"]) -> None:
        self.rows, self.active = rows, activations.unsqueeze(2)
        with torch.no_grad():
            self.total = activations.sum(1)
            mean = torch.einsum("bi,bicm->bcm", activations, rows)
            # A constant: the result does not depend on it. Silent children do not move it.
            self.center = mean / self.total.clamp_min(SMALLEST_MASS).view(-1, 1, 1)
        self.features = _features(rows - self.center.unsqueeze(1))

    def even_sums(self, types: int) -> Float[Tensor, "b J f"]:
        """Sums of the features weighted by use = a / J."""
        even = self.active.transpose(1, 2) @ self.features.detach() / types
        return even.expand(-1, types, -1)

    def shares(self, line: Float[Tensor, "b J f"], *, out: Tensor | None = None) -> Float[Tensor, "b I J"]:
        """R = softmax over the parents of line · features."""
        logits = torch.bmm(self.features.detach(), line.transpose(1, 2))
        return logits.softmax(2) if out is None else torch.softmax(logits, 2, out=out)

    def sums(self, shares: Float[Tensor, "b I J"]) -> Float[Tensor, "b J f"]:
        """Sums of the features weighted by use = R a."""
        return torch.bmm((shares * self.active).transpose(1, 2), self.features.detach())


def _fit(
    sums: Float[Tensor, "b J f"],
    total: Float[Tensor, " b"],
    center: Float[Tensor, "b c m"],
    parents: _Parents,
    options: MomentOptions,
) -> _Fitted:
    """The M-step: scores and Gaussians from the sums of the features."""
    weight = parents.weight
    count = center[0].numel()
    by_parent = sums.transpose(0, 1)  # [J, b, f]: each parent has matrices of its own
    mass = by_parent[..., 0]
    scores = (parents.beta_use + parents.beta_ign)[:, None] * mass - parents.beta_ign[:, None] * total
    moments = by_parent[..., 1:] / (mass + options.mass_epsilon).clamp_min(SMALLEST_MASS).unsqueeze(2)
    first = moments[..., :count].unflatten(2, center.shape[1:])
    second = moments[..., count:].unflatten(2, (center.shape[1], -1))
    share = (mass / (mass + options.mass_epsilon).clamp_min(SMALLEST_MASS))[..., None, None]  # nearly 1
    at_center = _per_parent(center.expand(len(weight), -1, -1, -1), weight) + parents.bias.unsqueeze(1)
    first_vote = _per_parent(first, weight)
    rest = (1 - share) * at_center - first_vote
    squares = _per_parent(second - _products(first, 3), _square(weight))
    # The last two terms are 0 where the mass is the divisor.
    variance = squares + ((1 - share) * at_center).square() - (1 - share) * rest.square()
    return _Fitted(
        scores, first_vote + share * at_center, variance.clamp_min(0) + options.variance_floor, rest
    )


def _lines(fitted: _Fitted, parents: _Parents) -> Float[Tensor, "b J f"]:
    """The E-step: the vectors whose product with the features of a child is log(sigmoid(x_j) p_j)."""
    precision = 0.5 / fitted.variance
    tilted = precision * fitted.rest
    height = F.logsigmoid(fitted.scores) - 0.5 * fitted.variance.log().sum((2, 3))
    constant = height - (tilted * fitted.rest).sum((2, 3))
    linear = -2 * _per_parent(tilted, parents.weight.transpose(1, 2))
    quadratic = -_per_parent(precision, _square(parents.weight).transpose(1, 2))
    line = torch.cat([constant.unsqueeze(2), linear.flatten(2), quadratic.flatten(2)], 2)
    return line.transpose(0, 1)


def _backward(
    image: _Images,
    sums: Float[Tensor, "T b J f"],
    parents: _Parents,
    options: MomentOptions,
    g_means: Tensor | None,
    g_scores: Tensor | None,
    g_coupling: Tensor | None,
) -> list[Tensor]:
    """Gradients of poses, activations and the learned numbers, from those of the results."""
    features, types = image.features.detach(), len(parents.weight)
    g_features, g_active = torch.zeros_like(features), torch.zeros_like(image.active)
    given = [*(torch.zeros_like(tensor) for tensor in (sums[0], image.total, *parents))]
    leaves = _leaves(sums[-1], image.total, parents)
    with torch.enable_grad():
        fitted = _fit(leaves[0], leaves[1], image.center, _Parents(*leaves[2:]), options)
        results = [(fitted.mean.transpose(0, 1).flatten(2), g_means), (fitted.scores.T, g_scores)]
    results = [pair for pair in results if pair[1] is not None]
    if results:
        given = _grad([pair[0] for pair in results], leaves, [pair[1] for pair in results])
    g_sums, others = given[0], given[1:]
    for number in reversed(range(options.iterations - 1)):
        leaves = _leaves(sums[number], image.total, parents)
        with torch.enable_grad():
            learned = _Parents(*leaves[2:])
            line = _lines(_fit(leaves[0], leaves[1], image.center, learned, options), learned)
        shares = image.shares(line.detach())
        by_share = torch.bmm(features, g_sums.transpose(1, 2)).mul_(shares)
        along = by_share.sum(2, keepdim=True)
        g_active += along
        g_logits = by_share.sub_(shares * along).mul_(image.active)
        if number + 2 == options.iterations and g_coupling is not None:
            by_share = g_coupling * shares
            g_logits += by_share - shares * by_share.sum(2, keepdim=True)
        g_features.baddbmm_(shares.mul_(image.active), g_sums).baddbmm_(g_logits, line.detach())
        g_sums, *more = _grad([line], leaves, [torch.bmm(g_logits.transpose(1, 2), features)])
        others = [total + part for total, part in zip(others, more, strict=True)]
    g_even = g_sums.sum(1, keepdim=True) / types
    g_active += torch.bmm(features, g_even.transpose(1, 2))
    g_features += image.active * g_even
    (g_rows,) = _grad([image.features], [image.rows], [g_features])
    return [g_rows, g_active.squeeze(2) + others[0].unsqueeze(1), *others[1:]]


def _leaves(sums: Tensor, total: Tensor, parents: _Parents) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in (sums, total, *parents)]


def _grad(results: list[Tensor], leaves: list[Tensor], given: list[Any]) -> list[Tensor]:
    return [*torch.autograd.grad(results, leaves, given, materialize_grads=True)]


def _features(rows: Float[Tensor, "b I c m"]) -> Float[Tensor, "b I f"]:
    """1, the entries of a pose, and the products of two entries of one row."""
    one = rows.new_ones(1).expand(*rows.shape[:2], 1)
    return torch.cat([one, rows.flatten(2), _products(rows, 3).flatten(2)], 2)


def _products(tensor: Tensor, dim: int) -> Tensor:
    """Products of two entries along an axis: (0, 0), (0, 1), …, (1, 1), …"""
    width = tensor.shape[dim]
    parts = [tensor.narrow(dim, k, 1) * tensor.narrow(dim, k, width - k) for k in range(width)]
    return torch.cat(parts, dim)


def _square(weight: Float[Tensor, "J m h"]) -> Float[Tensor, "J t h"]:
    """The quadratic form (x W)_h^2 as a linear map of the products of x; each product of two counts twice."""
    width = weight.shape[1]
    counts = torch.tensor([1.0 if a == b else 2.0 for a in range(width) for b in range(a, width)])
    return _products(weight, 1) * counts.to(weight)[:, None]


def _per_parent(rows: Float[Tensor, "J b c m"], weight: Float[Tensor, "J m h"]) -> Float[Tensor, "J b c h"]:
    return torch.bmm(rows.flatten(1, 2), weight).unflatten(1, rows.shape[1:3])
