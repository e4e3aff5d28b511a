"""The state that a run starts with: new, or restored from a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from capsexp.config.components import Components
from capsexp.data.batches import Batches
from capsexp.data.seeds import derive_seed
from capsexp.routing import advance
from capsexp.training import checkpoint
from capsexp.training.budget import Budget
from capsexp.training.initial_weights import load_initial_weights
from capsexp.training.parallel import ProcessGroup
from capsexp.training.running_statistics import MovingAverage, kept_statistics
from capsexp.training.state import State


def start_state(
    components: Components,
    training: Batches,
    processes: ProcessGroup,
    *,
    is_new: bool,
    report: Callable[[str], None],
) -> State:
    """Build network, optimizer and moving average, with the same weights in all processes.

    Args:
        components: of the run.
        training: its training images.
        processes: that train together.
        is_new: whether no checkpoint follows: the network is calibrated, and may start with weights of
            another run.
        report: takes a line about these weights.
    """
    settings = components.trainer
    budget = Budget(settings.total_steps(len(training)), settings.max_seconds)
    position = budget.position(0, 0.0)
    model = components.device.place(components.new_model())
    advance(model, position)
    optimizer = components.new_optimizer(model.parameters(), lr=components.learning_rate(position))
    if is_new:
        _calibrate(model, training)
        if components.init_from is not None:
            report(load_initial_weights(model, components.init_from))
    processes.broadcast_parameters(model)
    return State(model, optimizer, moving_average(model, settings.ema_decay), budget=budget)


def resume_state(
    state: State, saved: dict[str, Any] | None, components: Components, processes: ProcessGroup
) -> None:
    """Restore the state from a checkpoint, if there is one, and the random state of this process."""
    if processes.rank > 0:  # each process has other images, so its dropout needs other masks
        start = 0 if saved is None else saved["step"]
        torch.manual_seed(derive_seed(components.seed, start, processes.rank, "process"))
    if saved is not None:
        state.restore(saved, rank=processes.rank)
    if state.stopped is not None and not components.trainer.ends_at(state.stopped):
        state.stopped = None  # resume=force with another stop_accuracy


def require_resumable(components: Components, folder: Path) -> None:
    """Check that the checkpoint which a run would resume from fits its network and optimizer.

    Call it before a new config replaces that of the run.

    Args:
        components: built from the new config.
        folder: the run's `checkpoints` folder.

    Raises:
        UserError: the checkpoint is of another network or optimizer, or none is usable.
    """
    saved = checkpoint.load_newest(folder, report=lambda line: None)
    if saved is None:
        return
    with torch.random.fork_rng(devices=()):
        model = components.new_model()
        optimizer = components.new_optimizer(model.parameters(), lr=1.0)
        average = moving_average(model, components.trainer.ema_decay)
        State(model, optimizer, average, budget=Budget(saved["step"])).restore(saved)


def _calibrate(model: nn.Module, batches: Batches) -> None:
    """Calibrate a network that supports it on the first training batch."""
    if (calibrate := getattr(model, "calibrate", None)) is not None:
        with kept_statistics(model):
            calibrate(next(batches.training(0)).images)


def moving_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Return a copy of the network that follows its weights as an exponential moving average."""
    if decay is None:
        return None
    return MovingAverage(model, decay)
