"""Batch normalization whose statistics cover the slices of all processes of a distributed run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from capsexp.ops.processes import detect_lost_process

_shared = False


@contextlib.contextmanager
def shared_statistics(enabled: bool) -> Iterator[None]:
    """Let `batch_norm` in training take the statistics of the slices of all processes, inside this context.

    All processes must normalize the same layers in the same order, forward and backward.

    Args:
        enabled: whether there are several processes; otherwise nothing changes.
    """
    global _shared
    before, _shared = _shared, enabled
    try:
        yield
    finally:
        _shared = before


def batch_norm(
    values: Float[Tensor, "B C L"],
    running_mean: Float[Tensor, " C"] | None,
    running_var: Float[Tensor, " C"] | None,
    weight: Float[Tensor, " C"] | None,
    bias: Float[Tensor, " C"] | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
) -> Float[Tensor, "B C L"]:
    """Normalize each channel, as `torch.nn.functional.batch_norm` does; its arguments have the same meaning.

    Inside `shared_statistics`, mean, variance and running means are those of all processes together, and
    gradients flow through them: with the gradients summed over processes the result is that of one process,
    up to rounding.
    Differs from it in: a channel with a single value becomes 0, or the bias, and leaves the running means
    alone, where PyTorch raises an error. If a batch has fewer images than there are processes, each process
    normalizes all of them, and the unbiased variance for the running one counts their values several times.
    """
    if training and not _shared and values.shape[0] * values.shape[2] == 1:  # a variance needs two values
        return torch.zeros_like(values) if bias is None else torch.zeros_like(values) + bias[:, None]
    if not (training and _shared):
        return F.batch_norm(values, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, variance, count = _moments(values)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1).clamp_min(1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    normal = (values - mean[:, None]) * (variance + eps).rsqrt()[:, None]
    normal = normal if weight is None else normal * weight[:, None]
    return normal if bias is None else normal + bias[:, None]


class _Moments(torch.autograd.Function):
    """Mean and biased variance of each channel over the values of all processes, and their number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own_mean = values.mean((0, 2))
        own_squares = (values - own_mean[:, None]).square().sum((0, 2))
        own_count = own_mean.new_full((1,), values.shape[0] * values.shape[2])
        own = torch.cat([own_mean, own_squares, own_count])
        # All processes add the same numbers in the same order, so all get the same moments.
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        with detect_lost_process():
            dist.all_gather(every, own)
        channels = len(own_mean)
        means, squares, counts = torch.stack(every).split([channels, channels, 1], dim=1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        # Squares around the own means, plus those of the means: the difference of large sums would cancel.
        variance = (squares + counts * (means - mean).square()).sum(0) / count
        ctx.save_for_backward(values, mean, count)
        ctx.mark_non_differentiable(count)
        return mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        values, mean, count = ctx.saved_tensors
        # The loss of each process depends on the moments, so their gradient is the sum over processes.
        total = torch.stack(gradients[:2])
        with detect_lost_process():
            dist.all_reduce(total)
        of_mean, of_variance = (total / count)[:, :, None]
        return of_mean + 2 * of_variance * (values - mean[:, None])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moments: tuple[Tensor, Tensor, Tensor] = _Moments.apply(values)
    return moments
