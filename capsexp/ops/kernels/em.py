"""EM routing of a layer as an operator that makes the votes: C++ on a CPU, Triton on CUDA."""

import ctypes
from collections.abc import Callable
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import Routed
from capsexp.ops.em_steps import EMOptions, Normalisation
from capsexp.ops.kernels import HAS_TRITON
from capsexp.ops.kernels.compiled import library, library_problem
from capsexp.ops.votes import MatrixVotes

FUSED_ACTIVATION = "logistic"
"""The only activation with a fused implementation."""
NORMALISATIONS = get_args(Normalisation)
"""In the order of em.cpp's `Normalisation`."""
SHAPES = ((2, 2), (3, 3), (4, 4), (1, 16))
"""Rows and columns of a pose, for which em.cpp has code."""
_COUNTS = "batch children positions places types matrices iterations rows side lanes doubles"
_SWITCHES = "normalisation keep detach threads"
_NUMBERS = "variance_floor cost_scale mean_smoothing"
_READ = "poses weight activations beta_u beta_a temperatures initial child matrix offsets"
_SAVED = "coupling mean variance stats"
_FORWARD = "out_poses out_activations"
_GIVEN = "g_poses g_activations g_coupling"
_BACKWARD = "d_poses d_weight d_activations d_beta_u d_beta_a"


class _Problem(ctypes.Structure):
    """`Problem` of em.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in f"{_COUNTS} {_SWITCHES}".split()),
        *((name, ctypes.c_double) for name in _NUMBERS.split()),
        *((name, ctypes.c_void_p) for name in f"{_READ} {_SAVED} {_FORWARD} {_GIVEN} {_BACKWARD}".split()),
    ]


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
    fields, types, normalisation = votes.fields, votes.weight.shape[1], options.normalisation
    if fields is None:  # one position: all parents compete under every normalisation
        normalisation = "types"
        child = torch.arange(votes.poses.shape[1], device=votes.poses.device).unsqueeze(0)
    else:
        child = fields.children
    given = [votes.poses, votes.weight, activations, beta_u, beta_a]
    poses, parents, coupling, *_ = em_routing_op(
        *given,
        inverse_temperature,
        initial,
        child,
        votes.matrices,
        votes.offsets,
        float(options.variance_floor),
        float(options.cost_scale),
        float(options.mean_smoothing),
        normalisation,
        options.detach,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given),
    )
    if len(inverse_temperature) == 1:
        last = initial.unsqueeze(2).expand(len(poses), -1, -1, types)
    else:
        last = coupling[-1, ..., :types]
    return Routed(poses, parents, last if fields is not None else last.squeeze(1), fields)


def fused_reason(device: str, dtype: torch.dtype, rows: int, side: int) -> str | None:
    """Why `fused_em_routing` is not available here; None where it is.

    A missing library is also reported on stderr, once.
    """
    if device not in ("cpu", "cuda"):
        return f"there is no fused EM routing for {device}"
    halves = (torch.bfloat16, torch.float16) if device == "cuda" else ()
    if dtype not in (torch.float32, torch.float64, *halves):
        return f"there is no fused EM routing in {dtype}"
    if (rows, side) not in SHAPES:
        return f"there is no fused EM routing for poses of {rows}x{side}"
    if device == "cuda":
        return None if HAS_TRITON else "Triton is not installed"
    return library_problem("EM routing takes the reference path, 10 to 20 times as slow")


def lanes(types: int, dtype: torch.dtype) -> int:
    """Types that a CPU computes at a time; those of a layer are padded to a multiple."""
    return 8 if dtype == torch.float64 or types <= 8 else 16


def padded_types(types: int) -> int:
    """Jp on CUDA: the size of a Triton block is a power of two."""
    return 1 << (types - 1).bit_length()


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
    _call(
        library().em_forward,
        dict(zip(_READ.split(), given, strict=True)),
        dict(zip(f"{_FORWARD} {_SAVED}".split(), outputs, strict=True)),
        normalisation,
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
    _call(
        library().em_backward,
        dict(zip(f"{_READ} {_SAVED} {_GIVEN}".split(), [*given, *saved, *gradients], strict=True)),
        dict(zip(_BACKWARD.split(), outputs, strict=True)),
        normalisation,
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
    batch, _, dim = poses.shape
    positions, places = child.shape
    types, iterations = weight.shape[1], temperatures.shape[0]
    if poses.device.type == "cuda":
        padded = padded_types(types)
    else:
        width = lanes(types, poses.dtype)
        padded = -(-types // width) * width
    slots, steps = (iterations, iterations - 1) if keep else (1, min(1, iterations - 1))
    shapes = (
        (batch, positions * types, dim),
        (batch, positions * types),
        (steps, batch, positions, places, padded),
        (slots, batch, positions, dim, padded),
        (slots, batch, positions, dim, padded),
        (slots, batch, positions, 3, padded),
    )
    dtype = torch.promote_types(poses.dtype, torch.float32)
    return tuple(poses.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def _call(
    function: Callable[..., int],
    read: dict[str, Tensor | None],
    written: dict[str, Tensor],
    normalisation: str,
    **options: bool | float,
) -> None:
    # The names keep the copies that `contiguous` makes alive until the call returns.
    tensors = {name: tensor.contiguous() for name, tensor in read.items() if tensor is not None} | written
    poses, weight, child = tensors["poses"], tensors["weight"], tensors["child"]
    matrices, types, side, _ = weight.shape
    rows = poses.shape[2] // side
    problem = _Problem(
        batch=poses.shape[0],
        children=poses.shape[1],
        positions=child.shape[0],
        places=child.shape[1],
        types=types,
        matrices=matrices,
        iterations=tensors["temperatures"].shape[0],
        rows=rows,
        side=side,
        lanes=lanes(types, poses.dtype),
        doubles=poses.dtype == torch.float64,
        normalisation=NORMALISATIONS.index(normalisation),
        threads=torch.get_num_threads(),
        **options,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    if function(ctypes.byref(problem)) != 0:
        raise ValueError(f"em.cpp has no code for poses of {rows}x{side}")
