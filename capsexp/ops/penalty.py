"""The terms that every loss may add to its own: weight decay and reconstruction error."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.errors import require_not_negative
from capsexp.schedule import Schedule, Step, schedule_in


class PenalisedLoss(ABC):
    """A loss with weight decay and, for a network with a decoder, the reconstruction as a regulariser.

    Args:
        weight_decay: factor on half the sum of all squared weights; 0 for none.
        reconstruction_weight: factor on the sum of squared errors over the pixels; a number or a schedule.
    Raises: ValueError: a negative weight.
    """

    multi_label: bool
    """Whether an image may show several classes."""

    def __init__(self, *, weight_decay: int | float, reconstruction_weight: Schedule | int | float) -> None:
        require_not_negative(weight_decay=weight_decay)
        self.weight_decay = float(weight_decay)
        self.reconstruction_weight = schedule_in("[0, inf)", reconstruction_weight=reconstruction_weight)

    def __call__(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms of the loss, by name: its own, and "weight_decay" and "reconstruction" where they apply."""
        return {
            **self._mixed_term(output, batch, step),
            **weight_decay_term(output, self.weight_decay),
            **reconstruction_term(output, batch, self.reconstruction_weight(step)),
        }

    def scheduled(self, step: Step) -> dict[str, float]:
        """The values at this step of what may change during training."""
        return {"reconstruction_weight": self.reconstruction_weight(step)}

    def _mixed_term(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The own term; for mixed images the mean of the terms for both labels, by their shares."""
        first = self.own_term(output, batch, step)
        if batch.mixed is None:
            return first
        second = self.own_term(output, batch._replace(labels=batch.mixed.labels), step)
        share = batch.mixed.share
        return {name: share * term + (1 - share) * second[name] for name, term in first.items()}

    @abstractmethod
    def own_term(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The term of this loss itself, by its name; a mean over the batch."""


def reconstruction_term(output: Output, batch: Batch, weight: float) -> dict[str, Tensor]:
    """The weighted sum of squared errors over an image, mean over the batch; empty without a decoder.

    For images with several classes it is the sum over all decoded images: twice as much for MultiMNIST.
    """
    if output.reconstruction is None:
        return {}
    error = output.reconstruction.float() - batch.pixels
    return {"reconstruction": weight * error.square().flatten(1).sum(1).mean()}


def weight_decay_term(output: Output, weight: float) -> dict[str, Tensor]:
    """The weighted half sum of all squared weights; empty for a weight of 0.

    Raises:
        ValueError: the network returns no weights.
    """
    if weight == 0:
        return {}
    if not output.weights:
        raise ValueError("weight_decay needs a network that returns its weights (Output.weights)")
    squares = [parameter.float().square().sum() for parameter in output.weights]
    return {"weight_decay": 0.5 * weight * torch.stack(squares).sum()}
