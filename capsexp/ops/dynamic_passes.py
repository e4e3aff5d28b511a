"""The passes of dynamic routing as tensor functions, with the gradient by hand.

Votes have the order [B J I D] here, the order of the memory that `make_votes` writes.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from capsexp.ops.kernels import HAS_TRITON
from capsexp.ops.squash import squash, squash_backward


def softmax_over_parents(logits: Tensor, *, dim: int, leaky: bool) -> Tensor:
    """Softmax over `dim`; leaky: with one more logit, always 0, whose share is dropped."""
    if not leaky:
        return logits.softmax(dim)
    parents = logits.shape[dim]
    none_of_them = logits.new_zeros(()).expand_as(logits.narrow(dim, 0, 1))
    return torch.cat([logits, none_of_them], dim).softmax(dim).narrow(dim, 0, parents)


class FusedDynamicRouting(torch.autograd.Function):
    """All passes on votes ordered [B J I D], with the gradient by hand.

    Saves for the backward pass the votes and, per pass, the coupling, the sum s_j and the pose; plain
    autograd saves several tensors of the votes' size per pass. With L_t the logits of pass t, g' the gradient
    of g, and G_t = sum of L_k' over k >= t, the gradient of the agreement of pass t-1:

        c_t' = û · s_t'  (+ the coupling's own gradient, t = r)      L_t' = softmax backward of c_t'
        p_t' = sum_i G_{t+1} û  (t < r; for t = r given)             s_t' = squash backward of p_t'
        û'   = sum_t c_t s_t' + sum_{t<r} G_{t+1} p_t                one batched product of rank 2r - 1
    """

    @staticmethod
    def forward(
        ctx: Any,
        votes: Float[Tensor, "B J I D"],
        prior: Float[Tensor, "I J"] | None,
        bias: Float[Tensor, "J D"] | None,
        iterations: int,
        leaky: bool,
        detach: bool,
    ) -> tuple[Float[Tensor, "B J D"], Float[Tensor, "B J I"]]:
        """Poses and coupling of the last pass."""
        votes = votes.contiguous()  # no copy of the votes that `make_votes` makes
        if has_kernels(votes):
            from capsexp.ops.kernels.dynamic_triton import dynamic_forward

            passes = dynamic_forward(votes, prior, bias, iterations, leaky)
        else:
            passes = routing_passes(votes, prior, bias, iterations, leaky)
        ctx.save_for_backward(votes, *(passes[-3:] if detach else passes))
        ctx.set_materialize_grads(False)
        return passes[-1], passes[-3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_poses: Tensor | None, d_coupling: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of votes, prior and bias."""
        votes, *saved = ctx.saved_tensors
        if has_kernels(votes):
            from capsexp.ops.kernels.dynamic_triton import dynamic_backward

            for_prior, for_bias = ctx.needs_input_grad[1:3]
            gradients = dynamic_backward(votes, saved, d_poses, d_coupling, for_prior)
            return *gradients[:-1], gradients[-1] if for_bias else None, None, None, None
        passes = list(zip(saved[0::3], saved[1::3], saved[2::3], strict=True))
        d_logits: Tensor | None = None  # G of the pass after this one
        d_totals: list[Tensor] = []
        left: list[Tensor] = []
        right: list[Tensor] = []
        for coupling, total, poses in reversed(passes):
            if d_logits is not None:
                d_poses = _weighted_sum(d_logits, votes)
                left, right = [*left, d_logits], [*right, poses]
            d_totals.append(_backward_or_zero(total, d_poses))
            left, right = [*left, coupling], [*right, d_totals[-1]]
            if poses is passes[0][2] and not ctx.needs_input_grad[1]:
                break  # the logits before this pass are constants
            d_own = vote_agreement(votes, d_totals[-1])
            d_own = d_own if d_coupling is None or d_logits is not None else d_own + d_coupling
            d_own = coupling * (d_own - (coupling * d_own).sum(1, keepdim=True))  # softmax backward
            d_logits = d_own if d_logits is None else d_logits + d_own
        d_votes = torch.matmul(torch.stack(left, 2).transpose(2, 3), torch.stack(right, 2))
        d_prior = d_logits.sum(0).T if ctx.needs_input_grad[1] and d_logits is not None else None
        d_bias = torch.stack(d_totals).sum((0, 1)) if ctx.needs_input_grad[2] else None
        return d_votes, d_prior, d_bias, None, None, None


def routing_passes(
    votes: Float[Tensor, "B J I D"],
    prior: Float[Tensor, "I J"] | None,
    bias: Float[Tensor, "J D"] | None,
    iterations: int,
    leaky: bool,
) -> list[Tensor]:
    """Coupling, sum s_j and pose of the first pass, then of the second, and so on."""
    logits = None if prior is None else prior.T.expand(votes.shape[:3])
    passes: list[Tensor] = []
    for iteration in range(iterations):
        if iteration > 0:
            agreement = vote_agreement(votes, passes[-1])
            logits = agreement if logits is None else logits + agreement
        coupling = _coupling(logits, votes, leaky=leaky)
        total = _weighted_sum(coupling, votes)
        total = total if bias is None else total + bias
        passes += [coupling, total, squash(total)]
    return passes


def has_kernels(votes: Tensor) -> bool:
    """Whether Triton kernels route these votes."""
    return votes.is_cuda and HAS_TRITON


def _weighted_sum(weights: Float[Tensor, "B J I"], votes: Float[Tensor, "B J I D"]) -> Float[Tensor, "B J D"]:
    return torch.matmul(weights.unsqueeze(2), votes).squeeze(2)


def vote_agreement(votes: Float[Tensor, "B J I D"], poses: Float[Tensor, "B J D"]) -> Float[Tensor, "B J I"]:
    """û_j|i · v_j of every vote."""
    # A row vector times a transposed matrix: on a CPU two to four times as fast as the matrix times a column,
    # or as multiplying and summing.
    return torch.matmul(poses.unsqueeze(2), votes.transpose(2, 3)).squeeze(2)


def _coupling(logits: Tensor | None, votes: Tensor, *, leaky: bool) -> Tensor:
    if logits is not None:
        return softmax_over_parents(logits, dim=1, leaky=leaky)
    return votes.new_full(votes.shape[:3], 1 / (votes.shape[1] + leaky))


def _backward_or_zero(total: Tensor, d_poses: Tensor | None) -> Tensor:
    """`squash_backward`; zeros where a loss on the coupling alone gives the last poses no gradient."""
    return torch.zeros_like(total) if d_poses is None else squash_backward(total, d_poses)
