"""The weights of another run as the start of a new one: `model.init_from`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from capsexp.errors import UserError
from capsexp.text import a_few
from capsexp.training import checkpoint
from capsexp.training.saved_state import trained_weights


def load_initial_weights(model: nn.Module, folder: str) -> str:
    """Copy the weights of a run into a network, where name and shape are equal.

    They are the weights that the run tests: the best ones where there are, and their moving average.

    Args:
        model: the network of a new run.
        folder: the other run's directory.

    Returns:
        A line that says how many fit, and names those that do not.

    Raises:
        UserError: no run, no usable checkpoint, or nothing fits.
    """
    saved = _read(Path(folder).expanduser())
    weights, own = trained_weights(saved), model.state_dict()
    fitting = {name: weights[name] for name in own if _fits(own[name], weights.get(name))}
    origin = f"{folder} at step {saved['step']}"
    if not fitting:
        raise UserError(f"model.init_from: none of the weights of {origin} fits this network")
    model.load_state_dict(fitting, strict=False)
    line = f"init_from: {len(fitting)} of {len(own)} tensors are those of {origin}"
    return "; ".join([line, *_misfits(own, weights)])


def _read(folder: Path) -> dict[str, Any]:
    """Load the checkpoint that a run tests, or its newest one."""
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        raise UserError(f"model.init_from: {folder} is no run directory: it has no checkpoints")
    best = checkpoints / "best.pt"
    saved = checkpoint.load(best) if best.exists() else checkpoint.load_newest(checkpoints, report=_ignore)
    if saved is None:
        raise UserError(f"model.init_from: {folder} has no checkpoint yet")
    return saved


def _fits(own: Tensor, other: Tensor | None) -> bool:
    return other is not None and other.shape == own.shape


def _misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the names that exist on one side only, and those of another shape."""
    reshaped = [
        f"{name} ({list(weights[name].shape)} there, {list(own[name].shape)} here)"
        for name in own
        if name in weights and not _fits(own[name], weights[name])
    ]
    lists = {
        "of another shape": reshaped,
        "only in this network": [name for name in own if name not in weights],
        "only in that run": [name for name in weights if name not in own],
    }
    yield from (f"{kind}: {a_few(names)}" for kind, names in lists.items() if names)


def _ignore(line: str) -> None:
    """Take a line about a refused checkpoint; an older one will do."""
