"""Dynamic routing of a layer as an operator that makes the votes: C++ on a CPU."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capsexp.ops.kernels.compiled import library

NARROWEST = 4
"""dynamic.cpp has code for poses whose size is a multiple of this."""
_COUNTS = "batch children numbers parents dim iterations doubles leaky first chunk threads"
_READ = "inputs weight prior bias"
_SAVED = "coupling total poses"
_BACKWARD = "g_poses g_coupling d_inputs d_weight d_logits d_total"


class _Passes(ctypes.Structure):
    """`Passes` of dynamic.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _COUNTS.split()),
        *((name, ctypes.c_void_p) for name in f"{_READ} {_SAVED} {_BACKWARD}".split()),
    ]


@torch.library.custom_op("capsexp::dynamic_routing", mutates_args=(), device_types="cpu")
def dynamic_routing_op(
    inputs: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    bias: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the votes, of `chunk` images at a time, and route them; prior is [I, J], bias [J, D].

    Returns, of every pass: coupling [T, B, I, J], sums s_j and poses [T, B, J, D].
    """
    passes = _empty_passes(inputs, weight, iterations)
    tensors = dict(zip(_READ.split(), [inputs, weight, prior, bias], strict=True))
    saved = dict(zip(_SAVED.split(), passes, strict=True))
    _call(library().dynamic_forward, tensors, saved, first=0, leaky=leaky, chunk=chunk)
    return passes


@torch.library.custom_op("capsexp::dynamic_routing_backward", mutates_args=(), device_types="cpu")
def dynamic_routing_backward_op(
    g_poses: Tensor | None,
    g_coupling: Tensor | None,
    inputs: Tensor,
    weight: Tensor,
    coupling: Tensor,
    total: Tensor,
    poses: Tensor,
    for_prior: bool,
    detach: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs, weight, prior (empty without `for_prior`) and bias.

    g_poses [B, J, D] and g_coupling [B, I, J] are those of the last pass; with `detach` no other pass counts.
    """
    batch, children, _ = inputs.shape
    parents, dim = weight.shape[2:]
    d_logits = inputs.new_zeros(batch if for_prior else 0, children, parents)
    d_total = inputs.new_zeros(batch, parents, dim)
    d_inputs, d_weight = inputs.new_zeros(inputs.shape), weight.new_zeros(weight.shape)
    read = {"inputs": inputs, "weight": weight, "g_poses": g_poses, "g_coupling": g_coupling}
    saved = {"coupling": coupling, "total": total, "poses": poses, "d_inputs": d_inputs, "d_weight": d_weight}
    written = {**saved, "d_total": d_total, **({"d_logits": d_logits} if for_prior else {})}
    first = len(coupling) - 1 if detach else 0
    _call(library().dynamic_backward, read, written, first=first, leaky=False, chunk=chunk)
    return d_inputs, d_weight, d_logits.sum(0), d_total.sum(0)


@dynamic_routing_op.register_fake
def _(inputs: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _empty_passes(inputs, weight, rest[2])


@dynamic_routing_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, weight = arguments[2:4]
    children, _, parents, dim = weight.shape
    shapes = (inputs.shape, weight.shape, (children, parents), (parents, dim))
    return tuple(weight.new_empty(shape) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[6:]
    ctx.given = [tensor is not None for tensor in inputs[2:4]]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], *output)


def _backward(
    ctx: Any, g_coupling: Tensor | None, _: None, g_poses: Tensor | None
) -> tuple[Tensor | None, ...]:
    last = (None if tensor is None else tensor[-1] for tensor in (g_poses, g_coupling))
    prior, bias = ctx.given
    gradients = dynamic_routing_backward_op(*last, *ctx.saved_tensors, prior, *ctx.options)
    d_inputs, d_weight, d_prior, d_bias = gradients
    return d_inputs, d_weight, d_prior if prior else None, d_bias if bias else None, *[None] * 4


dynamic_routing_op.register_autograd(_backward, setup_context=_setup_context)


def _empty_passes(inputs: Tensor, weight: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, children, _ = inputs.shape
    parents, dim = weight.shape[2:]
    return (
        inputs.new_empty(iterations, batch, children, parents),
        inputs.new_empty(iterations, batch, parents, dim),
        inputs.new_empty(iterations, batch, parents, dim),
    )


def _call(
    function: Callable[..., int],
    read: dict[str, Tensor | None],
    written: dict[str, Tensor],
    *,
    first: int,
    leaky: bool,
    chunk: int,
) -> None:
    # The names keep the copies that `contiguous` makes alive until the call returns.
    tensors = {name: tensor.contiguous() for name, tensor in read.items() if tensor is not None} | written
    inputs, weight = tensors["inputs"], tensors["weight"]
    passes = _Passes(
        batch=inputs.shape[0],
        children=inputs.shape[1],
        numbers=inputs.shape[2],
        parents=weight.shape[2],
        dim=weight.shape[3],
        iterations=tensors["coupling"].shape[0],
        doubles=weight.dtype == torch.float64,
        leaky=leaky,
        first=first,
        chunk=chunk,
        threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    if function(ctypes.byref(passes)) != 0:
        raise ValueError(f"dynamic.cpp has no code for poses of size {weight.shape[3]}")
