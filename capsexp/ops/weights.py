"""Which parameters weight decay applies to."""

from torch import Tensor, nn


def kernels_and_matrices(module: nn.Module) -> tuple[Tensor, ...]:
    """The parameters named `weight` with two axes or more. The parameters of a routing are not among them."""
    return tuple(
        parameter
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] == "weight" and parameter.ndim >= 2
    )
