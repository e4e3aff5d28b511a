"""The running means and variances of batch norms, in a run."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

RUNNING = ("running_mean", "running_var")
"""Names of these buffers in torch and in capsexp."""


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of all batch norms of a network."""
    buffers = (module._buffers.get(name) for module in model.modules() for name in RUNNING)
    return [buffer for buffer in buffers if buffer is not None]


@contextlib.contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Let a forward pass in training mode leave the running means and variances as they are."""
    before = [statistic.clone() for statistic in running_statistics(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for statistic, value in zip(running_statistics(model), before, strict=True):
                statistic.copy_(value)


class MovingAverage(AveragedModel):
    """A copy of a network that follows its weights as an exponential moving average.

    Running means and variances of batch norms are averaged like the weights: those of the newest weights
    would not fit the averaged ones. Other buffers are copied: some hold indices, such as those of a layer's
    windows, or the position of a schedule.

    Args:
        model: the network.
        decay: weight of the past, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)
        self.decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        """Take one more step of the network into the average; the first one is copied."""
        before = [statistic.clone() for statistic in running_statistics(self.module)]
        is_first = len(before) > 0 and bool(self.n_averaged == 0)
        super().update_parameters(model)
        if is_first:
            return
        with torch.no_grad():
            for statistic, value in zip(running_statistics(self.module), before, strict=True):
                statistic.lerp_(value, self.decay)


def describe_statistics(model: nn.Module, *, accumulate: int) -> list[str]:
    """Return a line if pieces of a batch change what its batch norms compute.

    Args:
        model: the network.
        accumulate: `trainer.accumulate`.
    """
    if accumulate == 1 or not running_statistics(model):
        return []
    line = f"each of the {accumulate} pieces of a batch has its own means in the batch norms"
    return [f"trainer.accumulate: {line}, so the result differs from that of accumulate=1"]
