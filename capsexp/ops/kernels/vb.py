"""Variational Bayes routing of a layer as an operator that makes the votes: C++ on a CPU."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import Routed
from capsexp.ops.kernels import problem
from capsexp.ops.kernels.compiled import library
from capsexp.ops.vb_steps import VBOptions
from capsexp.ops.votes import MatrixVotes

_SAVED_NUMBERS = 3  # of each parent: mass, log share, log precision
_NUMBERS = ("counts", "strength", "degrees", "inverse_scale", "outlier")


class _Problem(problem.Problem):
    """`VBProblem` of vb.cpp."""

    _fields_ = problem.fields_of("counts strength degrees inverse_scale", "")


def fused_vb_routing(
    votes: MatrixVotes,
    activations: Float[Tensor, "B I"],
    *,
    initial: Float[Tensor, "P K"],
    iterations: int,
    beta_a: Float[Tensor, " J"] | int | float,
    beta_u: Float[Tensor, " J"] | int | float,
    options: VBOptions,
) -> Routed:
    """`vb_routing` of capsexp/routing/vb.py on votes that are computed as needed and never stored.

    `initial` is R of the first iteration, the same for every type; `options.initial_coupling` has no effect.
    The other arguments are those of `vb_routing`.

    Returns: see `vb_routing`. No second derivatives.
    """
    fields, types, dim = votes.fields, votes.weight.shape[1], votes.poses.shape[2]
    given = [votes.poses, votes.weight, activations]
    learned = given if votes.bias is None else [*given, votes.bias]
    poses, evidence, coupling, *_ = vb_routing_op(
        *given,
        initial,
        problem.children_of(votes),
        votes.matrices,
        votes.offsets,
        votes.bias,
        iterations,
        float(options.prior_counts),
        float(options.prior_strength),
        options.degrees(dim),
        1 / float(options.prior_scale),
        float(options.outlier or 0),
        options.normalisation if fields is not None else "types",  # one position: all parents compete
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned),
    )
    scores = (evidence.unflatten(1, (-1, types)) + (beta_a - beta_u)).flatten(1)
    last = problem.last_coupling(coupling, initial, votes)
    return Routed(poses, scores.sigmoid(), last, fields, scores)


def fused_reason(device: str, dtype: torch.dtype, rows: int, side: int) -> str | None:
    """Why `fused_vb_routing` is not available here; None where it is. See `problem.fused_reason`."""
    name = "variational Bayes routing"
    return problem.fused_reason(name, device, dtype, rows, side, slower="10 to 20 times", cuda=False)


@torch.library.custom_op("capsexp::vb_routing", mutates_args=(), device_types="cpu")
def vb_routing_op(
    poses: Tensor,
    weight: Tensor,
    activations: Tensor,
    initial: Tensor,
    child: Tensor,
    matrix: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    iterations: int,
    counts: float,
    strength: float,
    degrees: float,
    inverse_scale: float,
    outlier: float,
    normalisation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route one layer: `fused_vb_routing`, as one operator for autograd and torch.compile.

    Shapes and `keep`: see `em_routing_op`. Priors: alpha_0, kappa_0, nu_0, 1 / Psi_0; outlier 0 for none.

    Returns: poses [B, P * J, D], evidence [B, P * J]; and, with types padded to Jp, R of iterations 1 …
        [T - 1, B, P, K, Jp], m and psi [T, B, P, D, Jp], mass, log share and log precision
        [T, B, P, 3, Jp], and, with `outlier`, whether the R of a child sum to 1.
    """
    given = [poses, weight, activations, initial, child, matrix, offsets, bias]
    outputs = _empty_outputs(poses, weight, child, iterations, outlier, normalisation, keep)
    problem.call(
        library().vb_forward,
        _Problem,
        dict(zip(problem.READ, given, strict=True)),
        dict(zip((*problem.FORWARD, *problem.SAVED, "whole"), outputs, strict=True)),
        iterations=iterations,
        normalisation=normalisation,
        keep=keep,
        **dict(zip(_NUMBERS, (counts, strength, degrees, inverse_scale, outlier), strict=True)),
    )
    return outputs


@torch.library.custom_op("capsexp::vb_routing_backward", mutates_args=(), device_types="cpu")
def vb_routing_backward_op(
    g_poses: Tensor | None,
    g_evidence: Tensor | None,
    g_coupling: Tensor | None,
    poses: Tensor,
    weight: Tensor,
    activations: Tensor,
    initial: Tensor,
    child: Tensor,
    matrix: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    coupling: Tensor,
    mean: Tensor,
    scale: Tensor,
    stats: Tensor,
    whole: Tensor,
    iterations: int,
    counts: float,
    strength: float,
    degrees: float,
    inverse_scale: float,
    outlier: float,
    normalisation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of poses, weight, activations and bias (empty without one).

    g_coupling is that of the last R.
    """
    given = [poses, weight, activations, initial, child, matrix, offsets, bias]
    saved, gradients = [coupling, mean, scale, stats, whole], [g_poses, g_evidence, g_coupling]
    outputs = problem.zero_gradients(poses, weight, activations, bias)
    names = (*problem.READ, *problem.SAVED, "whole", *problem.GIVEN)
    problem.call(
        library().vb_backward,
        _Problem,
        dict(zip(names, [*given, *saved, *gradients], strict=True)),
        dict(zip(problem.BACKWARD, outputs, strict=True)),
        iterations=iterations,
        normalisation=normalisation,
        keep=True,
        **dict(zip(_NUMBERS, (counts, strength, degrees, inverse_scale, outlier), strict=True)),
    )
    return outputs


@vb_routing_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    poses, weight, _, _, child, _, _, _, iterations, *_, outlier, normalisation, keep = arguments
    return _empty_outputs(poses, weight, child, iterations, outlier, normalisation, keep)


@vb_routing_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    poses, weight, activations, *_ = arguments[3:]
    return problem.zero_gradients(poses, weight, activations, arguments[10])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[8:-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[:8], *output[2:])


def _backward(
    ctx: Any, g_poses: Tensor | None, g_evidence: Tensor | None, g_coupling: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    last = None if g_coupling is None or len(g_coupling) == 0 else g_coupling[-1]
    tensors = ctx.saved_tensors
    *gradients, d_bias = vb_routing_backward_op(g_poses, g_evidence, last, *tensors, *ctx.options)
    return (*gradients, *([None] * 4), None if tensors[7] is None else d_bias, *([None] * 8))


vb_routing_op.register_autograd(_backward, setup_context=_setup_context)


def _empty_outputs(
    poses: Tensor,
    weight: Tensor,
    child: Tensor,
    iterations: int,
    outlier: float,
    normalisation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = problem.empty_outputs(poses, weight, iterations, child, saved=_SAVED_NUMBERS, keep=keep)
    groups = child.numel() if normalisation == "types" else poses.shape[1]
    steps = len(outputs[2]) if outlier > 0 else 0
    return (*outputs, poses.new_empty(steps, len(poses), groups))
