"""Heinsen routing of a layer as an operator that makes the votes: C++ on a CPU."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import Routed
from capsexp.ops.kernels import problem
from capsexp.ops.kernels.compiled import library
from capsexp.ops.votes import MatrixVotes

_SAVED_NUMBERS = 2  # of each parent: mass, score
_READ = (*problem.READ, "beta_use", "beta_ign")
_BACKWARD = (*problem.BACKWARD, "d_beta_use", "d_beta_ign")


class _Problem(problem.Problem):
    """`HeinsenProblem` of heinsen.cpp."""

    _fields_ = problem.fields_of("variance_floor mass_epsilon", "beta_use beta_ign d_beta_use d_beta_ign")


def fused_heinsen_routing(
    votes: MatrixVotes,
    activations: Float[Tensor, "B I"],
    *,
    beta_use: Float[Tensor, "K J"],
    beta_ign: Float[Tensor, "K J"],
    iterations: int,
    variance_floor: int | float,
    mass_epsilon: int | float,
) -> Routed:
    """`heinsen_routing` of capsexp/routing/heinsen.py on votes that are computed as needed and never stored.

    Arguments and results: see `heinsen_routing`. No second derivatives.
    """
    places, types = len(votes.matrices), votes.weight.shape[1]
    betas = [beta.expand(places, types) for beta in (beta_use, beta_ign)]
    learned = [votes.poses, votes.weight, activations, *betas]
    if votes.bias is not None:
        learned.append(votes.bias)
    initial = problem.first_shares(votes, "paper")
    poses, scores, coupling, *_ = heinsen_routing_op(
        *learned[:3],
        initial,
        problem.children_of(votes),
        votes.matrices,
        votes.offsets,
        votes.bias,
        *betas,
        iterations,
        float(variance_floor),
        float(mass_epsilon),
        "paper" if votes.fields is not None else "types",  # one position: all parents compete
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned),
    )
    last = problem.last_coupling(coupling, initial, votes)
    return Routed(poses, scores.sigmoid(), last, votes.fields, scores)


def fused_reason(device: str, dtype: torch.dtype, rows: int, side: int) -> str | None:
    """Why `fused_heinsen_routing` is not available here; None where it is. See `problem.fused_reason`."""
    return problem.fused_reason(
        "Heinsen routing", device, dtype, rows, side, slower="10 to 20 times", cuda=False
    )


@torch.library.custom_op("capsexp::heinsen_routing", mutates_args=(), device_types="cpu")
def heinsen_routing_op(
    poses: Tensor,
    weight: Tensor,
    activations: Tensor,
    initial: Tensor,
    child: Tensor,
    matrix: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    beta_use: Tensor,
    beta_ign: Tensor,
    iterations: int,
    variance_floor: float,
    mass_epsilon: float,
    normalisation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route one layer: `fused_heinsen_routing`, as one operator for autograd and torch.compile.

    Shapes and `keep`: see `em_routing_op`; bias [matrices, J, D], betas [K, J].

    Returns: poses [B, P * J, D], scores [B, P * J]; and, with types padded to Jp, R of iterations 1 …
        [T - 1, B, P, K, Jp], means and variances [T, B, P, D, Jp], mass and score [T, B, P, 2, Jp].
    """
    given = [poses, weight, activations, initial, child, matrix, offsets, bias, beta_use, beta_ign]
    outputs = problem.empty_outputs(poses, weight, iterations, child, saved=_SAVED_NUMBERS, keep=keep)
    problem.call(
        library().heinsen_forward,
        _Problem,
        dict(zip(_READ, given, strict=True)),
        dict(zip(problem.FORWARD + problem.SAVED, outputs, strict=True)),
        iterations=iterations,
        normalisation=normalisation,
        variance_floor=variance_floor,
        mass_epsilon=mass_epsilon,
        keep=keep,
    )
    return outputs


@torch.library.custom_op("capsexp::heinsen_routing_backward", mutates_args=(), device_types="cpu")
def heinsen_routing_backward_op(
    g_poses: Tensor | None,
    g_scores: Tensor | None,
    g_coupling: Tensor | None,
    poses: Tensor,
    weight: Tensor,
    activations: Tensor,
    initial: Tensor,
    child: Tensor,
    matrix: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    beta_use: Tensor,
    beta_ign: Tensor,
    coupling: Tensor,
    mean: Tensor,
    variance: Tensor,
    stats: Tensor,
    iterations: int,
    variance_floor: float,
    mass_epsilon: float,
    normalisation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of poses, weight, activations, bias (empty without one), beta_use and beta_ign.

    g_coupling is that of the last R.
    """
    given = [poses, weight, activations, initial, child, matrix, offsets, bias, beta_use, beta_ign]
    saved, gradients = [coupling, mean, variance, stats], [g_poses, g_scores, g_coupling]
    outputs = _zero_gradients(poses, weight, activations, bias, beta_use)
    names = (*_READ, *problem.SAVED, *problem.GIVEN)
    problem.call(
        library().heinsen_backward,
        _Problem,
        dict(zip(names, [*given, *saved, *gradients], strict=True)),
        dict(zip(_BACKWARD, outputs, strict=True)),
        iterations=iterations,
        normalisation=normalisation,
        variance_floor=variance_floor,
        mass_epsilon=mass_epsilon,
        keep=True,
    )
    return outputs


@heinsen_routing_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    poses, weight, child, iterations, keep = (arguments[at] for at in (0, 1, 4, 10, -1))
    return problem.empty_outputs(poses, weight, iterations, child, saved=_SAVED_NUMBERS, keep=keep)


@heinsen_routing_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _zero_gradients(*arguments[3:6], *arguments[10:12])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[10:-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[:10], *output[2:])


def _backward(
    ctx: Any, g_poses: Tensor | None, g_scores: Tensor | None, g_coupling: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    last = None if g_coupling is None or len(g_coupling) == 0 else g_coupling[-1]
    tensors = ctx.saved_tensors
    *gradients, d_bias, d_use, d_ign = heinsen_routing_backward_op(
        g_poses, g_scores, last, *tensors, *ctx.options
    )
    return (*gradients, *([None] * 4), None if tensors[7] is None else d_bias, d_use, d_ign, *([None] * 5))


heinsen_routing_op.register_autograd(_backward, setup_context=_setup_context)


def _zero_gradients(
    poses: Tensor, weight: Tensor, activations: Tensor, bias: Tensor | None, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    betas = beta.new_zeros(beta.shape), beta.new_zeros(beta.shape)
    return *problem.zero_gradients(poses, weight, activations, bias), *betas
