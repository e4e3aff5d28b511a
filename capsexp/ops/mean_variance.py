"""Mean and variance over one axis of a large tensor, written once."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def mean_and_variance(
    values: Float[Tensor, "B I K *rest"],
) -> tuple[Float[Tensor, "B I *rest"], Float[Tensor, "B I *rest"]]:
    """Mean and population variance over the third axis.

    Plain PyTorch writes tensors of the size of the values: the distances from the mean, and their squares.
    Here only the mean is stored for the gradient, beside the values. `torch.var_mean` is more than ten times
    slower on a CPU. There are no second derivatives.
    """
    if torch.compiler.is_compiling():  # the compiler writes no tensors between these operations
        mean = values.mean(2)
        return mean, (values - mean.unsqueeze(2)).square().mean(2)
    mean, variance = _Moments.apply(values)
    return mean, variance


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        mean = values.mean(2)
        variance = torch.zeros_like(mean)
        for value in values.unbind(2):
            distance = value - mean
            variance.addcmul_(distance, distance)
        ctx.save_for_backward(values, mean)
        return mean, variance.div_(values.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        values, mean = ctx.saved_tensors
        of_mean, of_variance = of_mean / values.shape[2], of_variance * (2 / values.shape[2])
        gradient = torch.empty_like(values)
        for place, value in zip(gradient.unbind(2), values.unbind(2), strict=True):
            torch.addcmul(of_mean, of_variance, value - mean, out=place)
        return gradient
