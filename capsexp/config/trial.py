"""Try an optimizer of torch, whose constructors check few of their settings."""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from capsexp.errors import UserError, describe, first_line, is_in, is_number

if TYPE_CHECKING:
    from torch.optim import Optimizer

RANGES = {
    "momentum": "[0, 1)",
    "dampening": "[0, 1]",
    "weight_decay": "[0, inf)",
    "momentum_decay": "[0, 1)",
    "lr_decay": "[0, inf)",
    "eps": "(0, inf)",
    "alpha": "[0, 1)",
    "lambd": "[0, inf)",
    "rho": "[0, 1)",
    "betas": "[0, 1)",
}
"""Intervals of the settings of torch's optimizers, where a network can learn."""

LISTS_OF_OTHERS = ("Rprop", "Adafactor")  # their `eps`, `betas` or `etas` mean something else


def optimizer_problems(optimizer: "functools.partial[Optimizer]") -> Iterator[str]:
    """Yield the problems of an optimizer's settings: ranges first, then two steps on a small parameter.

    Args:
        optimizer: with all settings but `params` and `lr`.
    """
    name = getattr(optimizer.func, "__name__", "")
    problems = [] if name in LISTS_OF_OTHERS else list(_range_problems(optimizer.keywords))
    yield from problems
    if not problems and (problem := _trial_problem(optimizer)):
        yield problem


def _range_problems(settings: dict[str, Any]) -> Iterator[str]:
    for name, interval in RANGES.items():
        value = settings.get(name)
        numbers = value if isinstance(value, list | tuple) else [value]
        for number in filter(is_number, numbers):
            if not is_in(interval, number):
                place = f" (each of {value})" if isinstance(value, list | tuple) else ""
                yield f"{name} must be {describe(interval)}, got {number}{place}"
                break


def _trial_problem(optimizer: "Callable[..., Optimizer]") -> str:
    """Return why two steps fail, or leave no finite number; empty if they work."""
    import torch

    parameter = torch.nn.Parameter(torch.ones(2, 2))
    try:
        trial = optimizer([parameter], lr=1e-3)
        for _ in range(2):
            parameter.grad = torch.tensor([[0.0, 1e-3], [-1.0, 1.0]])  # a network has gradients of 0
            trial.step()
    except Exception as error:  # torch raises many kinds, such as AssertionError for `capturable`
        return str(error) if isinstance(error, UserError) else f"a step fails: {first_line(error)}"
    return "" if parameter.isfinite().all() else "a step leaves weights that are not finite"
