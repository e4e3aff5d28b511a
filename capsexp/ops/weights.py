"""Which parameters count as weights."""

from torch import Tensor, nn


def kernels_and_matrices(module: nn.Module) -> tuple[Tensor, ...]:
    """The parameters with two axes or more that are named `weight`; what a routing learns is none of them."""
    return tuple(
        parameter
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] == "weight" and parameter.ndim >= 2
    )
