"""What a checkpoint holds: its structure, and whether it fits a network and an optimizer.

A checkpoint that passes its checksum may still come from another run, another version, or a stranger.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from capsexp.errors import UserError, is_integer, is_number
from capsexp.schedule import Step

LARGEST_COUNT = 2**53
SHOWN = 3
"""Differences between two networks that a message names."""
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "acc_delta")
"""What optimizers of torch store for each number of a parameter; some are null before the first step."""


def is_count(value: Any) -> bool:
    """Whether a value is a plausible number of steps, epochs or bytes."""
    return is_integer(value) and 0 <= value < LARGEST_COUNT


def _is_seconds(value: Any) -> bool:
    return is_number(value) and 0 <= value < LARGEST_COUNT


def _is_total(value: Any) -> bool:
    # Where time ends the run it is a float, and infinite before the first step.
    return is_count(value) or (isinstance(value, float) and value >= 0)


def _is_optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_accuracy(value: Any) -> bool:
    return is_number(value) and not math.isnan(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (1, 2) and all(map(_is_accuracy, value))


def _is_stop(value: Any) -> bool:
    checks = {"on": lambda text: isinstance(text, str), "accuracy": _is_accuracy, "step": is_count}
    return isinstance(value, dict) and all(key in value and checks[key](value[key]) for key in checks)


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    return (
        isinstance(groups, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        and all(is_count(index) and isinstance(entry, dict) for index, entry in value["state"].items())
    )


def _is_random(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1


def _is_cpu_random(value: Any) -> bool:
    return _is_random(value) and value.shape == torch.get_rng_state().shape


def _is_cuda_random(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_random, value))


def _is_random_of_others(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(state, dict)
        and _is_cpu_random(state.get("random"))
        and _is_cuda_random(state.get("random_cuda"))
        for state in value
    )


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (is_count, "a number of steps"),
    "epoch": (is_count, "a number of epochs"),
    "batch": (is_count, "a number of batches"),
    "recorded": (is_count, "a number of bytes"),
    "best_accuracy": (_is_accuracy, "an accuracy"),
    "best_step": (_is_optional(is_count), "a number of steps or null"),
    "model": (_is_weights, "tensors by name"),
    "optimizer": (_is_optimizer, "the state of an optimizer"),
    "average": (_is_optional(_is_weights), "tensors by name, or null"),
    "random": (_is_cpu_random, "the state of a random generator"),
    "random_cuda": (_is_cuda_random, "states of random generators"),
}
"""The keys of every checkpoint: a check of the value, and what it must be."""
LATER_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "total": (_is_total, "a number of steps"),
    "seconds": (_is_seconds, "a number of seconds"),
    "stopped": (_is_optional(_is_stop), "the accuracy that ended the training, or null"),
    "best_rank": (_is_optional(_is_rank), "numbers that order validation rounds, or null"),
    "unimproved": (is_count, "a number of validation rounds"),
    "random_others": (_is_random_of_others, "states of random generators"),
}
"""The keys that checkpoints of older versions, or of one process, lack."""


def problem(saved: Mapping[str, Any]) -> str | None:
    """Return why this is not the state of a run: the first key that is wrong; None if it is one."""
    for key, (is_right, meaning) in (CHECKS | LATER_CHECKS).items():
        if key not in saved:
            if key in CHECKS:
                return f"it has no {key!r}"
        elif not is_right(saved[key]):
            return f"its {key!r} is not {meaning}"
    return next(_not_finite(saved), None)


def _not_finite(saved: Mapping[str, Any]) -> Iterator[str]:
    for key in ("model", "average"):
        for name, tensor in (saved[key] or {}).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                yield f"its weights {name!r} are not finite (NaN or infinite)"


def restore_weights(module: nn.Module, weights: Mapping[str, Tensor], *, origin: str) -> None:
    """Load weights into a network, or into a moving average of one.

    Args:
        module: the network.
        weights: tensors by name.
        origin: where the weights are, for the message.

    Raises:
        UserError: they are of another network; the message names the first differences.
    """
    differences = list(_differences(module.state_dict(), weights))
    if differences:
        more = len(differences) - SHOWN
        shown = "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(f"the weights in {origin} are of another network: {shown}")
    module.load_state_dict(weights)


def _differences(own: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[str]:
    for name in [*own, *(name for name in weights if name not in own)]:
        if name not in weights:
            yield f"no {name}"
        elif name not in own:
            yield f"{name}, which this network does not have"
        elif isinstance(own[name], Tensor) and own[name].shape != weights[name].shape:
            sizes = f"{list(weights[name].shape)}, here {list(own[name].shape)}"
            yield f"size mismatch for {name}: {sizes}"


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], *, origin: str) -> None:
    """Load the state of an optimizer.

    Args:
        optimizer: the optimizer.
        saved: what its `state_dict` returned.
        origin: where the state is, for the message.

    Raises:
        UserError: it is of another optimizer; the message names the first difference.
    """
    difference = next(_optimizer_differences(optimizer.state_dict(), saved, _shapes(optimizer)), None)
    if difference is not None:
        name = type(optimizer).__name__
        raise UserError(f"the optimizer state in {origin} does not fit {name}: {difference}")
    optimizer.load_state_dict(saved)


def _shapes(optimizer: torch.optim.Optimizer) -> list[torch.Size]:
    return [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_differences(
    own: dict[str, Any], saved: dict[str, Any], shapes: list[torch.Size]
) -> Iterator[str]:
    groups, own_groups = saved["param_groups"], own["param_groups"]
    if [group["params"] for group in own_groups] != [group["params"] for group in groups]:
        yield "it has other parameters"
        return
    for own_group, group in zip(own_groups, groups, strict=True):
        for key, value in group.items():
            if key not in own_group:
                yield f"it has {key!r}"
            elif key != "params" and _kind(value) != _kind(own_group[key]):
                yield f"its {key!r} is {value!r}, here {own_group[key]!r}"
    for index, entry in saved["state"].items():
        for key, value in entry.items():
            # Moments have the shape of their parameter; other states are single numbers.
            shape = getattr(value, "shape", None)
            if index >= len(shapes) or (key in MOMENTS and value is not None and shape != shapes[index]):
                yield f"its {key!r} of parameter {index} does not fit"


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} numbers" if all(map(is_number, value)) else "something else"
    if value is None or isinstance(value, bool):
        return "switch"
    return "number" if is_number(value) else type(value).__name__


def process_count(saved: Mapping[str, Any]) -> int:
    """Return the number of processes of the run that saved this state."""
    return 1 + len(saved.get("random_others", ()))


def saved_position(saved: Mapping[str, Any], *, recorded: object = None) -> Step:
    """Return the step of a checkpoint, of its run's total.

    Args:
        saved: the checkpoint.
        recorded: the total in the run's status, for older checkpoints, which do not have it.
    """
    step, total = saved["step"], saved.get("total", recorded)
    return Step(step, total if is_number(total) and total >= step else step)


def trained_weights(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of a checkpoint to evaluate: their moving average where there is one."""
    if saved["average"] is None:
        return dict(saved["model"])
    module = "module."
    items = saved["average"].items()
    return {name.removeprefix(module): value for name, value in items if name.startswith(module)}
