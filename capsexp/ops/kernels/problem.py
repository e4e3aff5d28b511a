"""What the fused routings of matrix capsules share: one call of the C++, its sizes, its memory."""

import ctypes
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from capsexp.errors import UserError
from capsexp.ops.em_steps import InitialCoupling, Normalisation, initial_shares
from capsexp.ops.kernels import HAS_TRITON
from capsexp.ops.kernels.compiled import library_problem
from capsexp.ops.votes import MatrixVotes

NORMALISATIONS = get_args(Normalisation)
"""In the order of layer.h's `Normalisation`."""
SHAPES = ((2, 2), (3, 3), (4, 4), (1, 16))
"""Rows and columns of a pose, for which run.h has code."""
_COUNTS = "batch children positions places types matrices iterations rows side lanes doubles"
_SWITCHES = "normalisation keep detach threads"
READ = ("poses", "weight", "activations", "initial", "child", "matrix", "offsets", "bias")
SAVED = ("coupling", "mean", "variance", "stats")
FORWARD = ("out_poses", "out_scores")
GIVEN = ("g_poses", "g_scores", "g_coupling")
BACKWARD = ("d_poses", "d_weight", "d_activations", "d_bias")


class Problem(ctypes.Structure):
    """`Problem` of layer.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in f"{_COUNTS} {_SWITCHES}".split()),
        ("outlier", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*READ, *SAVED, "whole", *FORWARD, *GIVEN, *BACKWARD)),
    ]


def fields_of(numbers: str, tensors: str) -> Any:
    """Fields that an algorithm adds to `Problem`: names of numbers, then of tensors."""
    return [
        *((name, ctypes.c_double) for name in numbers.split()),
        *((name, ctypes.c_void_p) for name in tensors.split()),
    ]


def fused_reason(
    routing: str, device: str, dtype: torch.dtype, rows: int, side: int, *, slower: str, cuda: bool
) -> str | None:
    """Why there is no fused routing for these poses; None where there is one.

    A missing library is also reported on stderr, once.

    Args:
        routing: its name, for the message.
        device: of the poses.
        dtype: of the poses.
        rows: of a pose.
        side: columns of a pose.
        slower: how much slower the reference is, for the message about a missing library.
        cuda: whether there is one in Triton.
    """
    if device != "cpu" and not (cuda and device == "cuda"):
        return f"there is no fused {routing} for {device}"
    halves = (torch.bfloat16, torch.float16) if device == "cuda" else ()
    if dtype not in (torch.float32, torch.float64, *halves):
        return f"there is no fused {routing} in {dtype}"
    if (rows, side) not in SHAPES:
        return f"there is no fused {routing} for poses of {rows}x{side}"
    if device == "cuda":
        return None if HAS_TRITON else "Triton is not installed"
    return library_problem(f"{routing} takes the reference path, {slower} as slow")


def insist(implementation: str, reason: str | None) -> str | None:
    """Return the reason for the reference path, unless the config insists on the fused one.

    Args:
        implementation: of the config, "auto" or "fused".
        reason: why there is no fused routing; None where there is one.

    Raises:
        UserError: the implementation is "fused", and there is none.
    """
    if reason is not None and implementation == "fused":
        raise UserError(f"routing.implementation=fused: {reason}")
    return reason


def children_of(votes: MatrixVotes) -> Tensor:
    """Which child is at each place of each position, [P, K]; one position where every parent sees all."""
    if votes.fields is not None:
        return votes.fields.children
    return torch.arange(votes.poses.shape[1], device=votes.poses.device).unsqueeze(0)


def first_shares(votes: MatrixVotes, initial: InitialCoupling) -> Tensor:
    """R of the first iteration, the same for every type: [P, K]. See `initial_shares`."""
    positions = 1 if votes.fields is None else len(votes.fields.children)
    like = votes.poses.new_empty(1, positions, len(votes.matrices))
    return initial_shares(like, votes.weight.shape[1], votes.fields, initial).squeeze(0)


def last_coupling(coupling: Tensor, initial: Tensor, votes: MatrixVotes) -> Tensor:
    """R of the last iteration as `Routed` has it.

    Args:
        coupling: of iterations 1 …, [T - 1, B, P, K, Jp].
        initial: R of the first iteration, [P, K].
        votes: of the call.
    """
    types = votes.weight.shape[1]
    if len(coupling) == 0:
        last = initial.unsqueeze(2).expand(len(votes.poses), -1, -1, types)
    else:
        last = coupling[-1, ..., :types]
    return last if votes.fields is not None else last.squeeze(1)


def lanes(types: int, dtype: torch.dtype) -> int:
    """Types that a CPU computes at a time; those of a layer are padded to a multiple."""
    return 8 if dtype == torch.float64 or types <= 8 else 16


def padded_types(types: int) -> int:
    """Jp on CUDA: the size of a Triton block is a power of two."""
    return 1 << (types - 1).bit_length()


def empty_outputs(
    poses: Tensor, weight: Tensor, iterations: int, child: Tensor, *, saved: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what forward writes: `FORWARD`, then `SAVED`.

    Args:
        poses: of the call.
        weight: of the call.
        child: of the call.
        iterations: T.
        saved: numbers that the algorithm saves of each parent and iteration.
        keep: for the backward pass; False: the last iteration only.
    """
    batch, _, dim = poses.shape
    positions, places = child.shape
    types = weight.shape[1]
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
        (slots, batch, positions, saved, padded),
    )
    dtype = torch.promote_types(poses.dtype, torch.float32)
    return tuple(poses.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def zero_gradients(
    poses: Tensor, weight: Tensor, activations: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for `BACKWARD`: contiguous, whatever the strides of the inputs; nothing for a missing bias."""
    d_poses, d_weight, d_activations = (
        tensor.new_zeros(tensor.shape) for tensor in (poses, weight, activations)
    )
    return d_poses, d_weight, d_activations, poses.new_zeros(0 if bias is None else bias.shape)


def call(
    function: Callable[..., int],
    problem: type[Problem],
    read: dict[str, Tensor | None],
    written: dict[str, Tensor],
    *,
    iterations: int,
    normalisation: str,
    **options: bool | float,
) -> None:
    """Call the C++ on tensors, by the names of the fields of `problem`.

    Args:
        function: of the library.
        problem: the algorithm's `Problem`.
        read: tensors of any strides, or None.
        written: contiguous tensors.
        iterations: T.
        normalisation: one of `NORMALISATIONS`.
        options: the other switches and numbers.
    """
    # The names keep the copies that `contiguous` makes alive until the call returns.
    tensors = {name: tensor.contiguous() for name, tensor in read.items() if tensor is not None} | written
    poses, weight, child = tensors["poses"], tensors["weight"], tensors["child"]
    matrices, types, side, _ = weight.shape
    rows = poses.shape[2] // side
    fields = problem(
        batch=poses.shape[0],
        children=poses.shape[1],
        positions=child.shape[0],
        places=child.shape[1],
        types=types,
        matrices=matrices,
        iterations=iterations,
        rows=rows,
        side=side,
        lanes=lanes(types, poses.dtype),
        doubles=poses.dtype == torch.float64,
        normalisation=NORMALISATIONS.index(normalisation),
        threads=torch.get_num_threads(),
        **options,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    if function(ctypes.byref(fields)) != 0:
        raise ValueError(f"run.h has no code for poses of {rows}x{side}")
