"""EM routing of a layer as an operator that makes the votes: C++ on a CPU, Triton on CUDA."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import Routed
from capsexp.ops.em_steps import EMOptions
from capsexp.ops.kernels import problem
from capsexp.ops.kernels.compiled import library
from capsexp.ops.votes import MatrixVotes

FUSED_ACTIVATION = "logistic"
"""The only activation with a fused implementation."""
_SAVED_NUMBERS = 3  # of each parent: mass, sum of log deviations, logit
_OWN = ("beta_u", "beta_a", "temperatures")
_READ = ("poses", "weight", "activations", *_OWN, "initial", "child", "matrix", "offsets")
_BACKWARD = ("d_poses", "d_weight", "d_activations", "d_beta_u", "d_beta_a")


class _Problem(problem.Problem):
    """`EMProblem` of em.cpp."""

    _fields_ = problem.fields_of(
        "variance_floor cost_scale mean_smoothing", "beta_u beta_a temperatures d_beta_u d_beta_a"
    )


def fused_em_routing(
    votes: MatrixVotes,
    activations: Float[Tensor, "B I"],
    *,
    initial: Float[Tensor, "P K"],
    beta_u: Float[Tensor, " J"],
    beta_a: Float[Tensor, " J"],
    inverse_temperature: Float[Tensor, " T"],
    options: EMOptions,
) -> Routed:
    """`em_routing` of capsexp/routing/em.py on votes that are computed as needed and never stored.

    `initial` is R of the first iteration, the same for every type; `options.initial_coupling` has no effect.
    The activation is `FUSED_ACTIVATION`. The other arguments are those of `em_routing`.

    Returns: see `em_routing`. No second derivatives.
    """
    fields = votes.fields
    given = [votes.poses, votes.weight, activations, beta_u, beta_a]
    poses, parents, coupling, *_ = em_routing_op(
        *given,
        inverse_temperature,
        initial,
        problem.children_of(votes),
        votes.matrices,
        votes.offsets,
        float(options.variance_floor),
        float(options.cost_scale),
        float(options.mean_smoothing),
        options.normalisation if fields is not None else "types",  # one position: all parents compete
        options.detach,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given),
    )
    return Routed(poses, parents, problem.last_coupling(coupling, initial, votes), fields)


def fused_reason(device: str, dtype: torch.dtype, rows: int, side: int) -> str | None:
    """Why `fused_em_routing` is not available here; None where it is. See `problem.fused_reason`."""
    return problem.fused_reason("EM routing", device, dtype, rows, side, slower="10 to 20 times", cuda=True)


@torch.library.custom_op("capsexp::em_routing", mutates_args=(), device_types="cpu")
def em_routing_op(
    poses: Tensor,
    weight: Tensor,
    activations: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    temperatures: Tensor,
    initial: Tensor,
    child: Tensor,
    matrix: Tensor,
    offsets: Tensor | None,
    variance_floor: float,
    cost_scale: float,
    mean_smoothing: float,
    normalisation: str,
    detach: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route one layer: `fused_em_routing`, as one operator for autograd and torch.compile.

    Shapes: poses [B, I, D], weight [matrices, J, n, n], activations [B, I], betas [J], temperatures [T],
    initial [P, K], child (which child is at each place) and matrix (which matrices it votes with) int64
    [P, K] and [K], offsets [K, D]. `keep`: save what the backward pass needs; without it the saved tensors
    hold the last iteration only.

    Returns: poses [B, P * J, D], activations [B, P * J]; and, with types padded to Jp, R of iterations 1 …
        [T - 1, B, P, K, Jp], means and variances [T, B, P, D, Jp], and mass, sum of log deviations and logit
        [T, B, P, 3, Jp].
    """
    given = [poses, weight, activations, beta_u, beta_a, temperatures, initial, child, matrix, offsets]
    outputs = _empty_outputs(poses, weight, temperatures, child, keep)
    problem.call(
        library().em_forward,
        _Problem,
        dict(zip(_READ, given, strict=True)),
        dict(zip(problem.FORWARD + problem.SAVED, outputs, strict=True)),
        iterations=len(temperatures),
        normalisation=normalisation,
        variance_floor=variance_floor,
        cost_scale=cost_scale,
        mean_smoothing=mean_smoothing,
        detach=detach,
        keep=keep,
    )
    return outputs


@em_routing_op.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from capsexp.ops.kernels.em_triton import em_forward

    return em_forward(*arguments)


@torch.library.custom_op("capsexp::em_routing_backward", mutates_args=(), device_types="cpu")
def em_routing_backward_op(
    g_poses: Tensor | None,
    g_activations: Tensor | None,
    g_coupling: Tensor | None,
    poses: Tensor,
    weight: Tensor,
    activations: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    temperatures: Tensor,
    initial: Tensor,
    child: Tensor,
    matrix: Tensor,
    offsets: Tensor | None,
    coupling: Tensor,
    mean: Tensor,
    variance: Tensor,
    stats: Tensor,
    variance_floor: float,
    cost_scale: float,
    mean_smoothing: float,
    normalisation: str,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of poses, weight, activations, beta_u and beta_a; g_coupling is that of the last R."""
    given = [poses, weight, activations, beta_u, beta_a, temperatures, initial, child, matrix, offsets]
    saved, gradients = [coupling, mean, variance, stats], [g_poses, g_activations, g_coupling]
    outputs = tuple(tensor.new_zeros(tensor.shape) for tensor in (poses, weight, activations, beta_u, beta_a))
    names = (*_READ, *problem.SAVED, *problem.GIVEN)
    problem.call(
        library().em_backward,
        _Problem,
        dict(zip(names, [*given, *saved, *gradients], strict=True)),
        dict(zip(_BACKWARD, outputs, strict=True)),
        iterations=len(temperatures),
        normalisation=normalisation,
        variance_floor=variance_floor,
        cost_scale=cost_scale,
        mean_smoothing=mean_smoothing,
        detach=detach,
        keep=True,
    )
    return outputs  # type: ignore[return-value]


@em_routing_backward_op.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from capsexp.ops.kernels.em_triton import em_backward

    return em_backward(*arguments)


@em_routing_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    poses, weight, _, _, _, temperatures, _, child, *_, keep = arguments
    return _empty_outputs(poses, weight, temperatures, child, keep)


@em_routing_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    # Contiguous, whatever the strides of the inputs.
    return tuple(tensor.new_empty(tensor.shape) for tensor in arguments[3:8])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, floor, scale, smoothing, normalisation, detach, _ = inputs
    ctx.options = (floor, scale, smoothing, normalisation, detach)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(
    ctx: Any, g_poses: Tensor | None, g_activations: Tensor | None, g_coupling: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    last = None if g_coupling is None or len(g_coupling) == 0 else g_coupling[-1]
    gradients = em_routing_backward_op(g_poses, g_activations, last, *ctx.saved_tensors, *ctx.options)
    return (*gradients, *([None] * 11))


em_routing_op.register_autograd(_backward, setup_context=_setup_context)


def _empty_outputs(
    poses: Tensor, weight: Tensor, temperatures: Tensor, child: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    iterations, saved = temperatures.shape[0], _SAVED_NUMBERS
    return problem.empty_outputs(poses, weight, iterations, child, saved=saved, keep=keep)
