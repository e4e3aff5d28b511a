"""Terms that any loss may add: reconstruction and weight decay."""

import torch
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.schedule import Schedule, as_schedule


def reconstruction_term(output: Output, batch: Batch, weight: float) -> dict[str, Tensor]:
    """The weighted sum of squared errors over a picture, mean over the batch; nothing without a decoder.

    Of several classes in each picture, the sum over all that were decoded: twice as much for MultiMNIST.
    """
    if output.reconstruction is None:
        return {}
    error = output.reconstruction.float() - batch.pixels
    return {"reconstruction": weight * error.square().flatten(1).sum(1).mean()}


def weight_decay_term(output: Output, weight: float) -> dict[str, Tensor]:
    """The weighted half sum of all squared weights; nothing for a weight of 0.

    Raises:
        ValueError: the network does not say what its weights are.
    """
    if weight == 0:
        return {}
    if not output.weights:
        raise ValueError("weight_decay needs a network that returns its weights (Output.weights)")
    squares = [parameter.float().square().sum() for parameter in output.weights]
    return {"weight_decay": 0.5 * weight * torch.stack(squares).sum()}


def weight_schedule(weight: Schedule | int | float) -> Schedule:
    """`as_schedule` for a value named reconstruction_weight, which a plain number must not make negative."""
    if callable(weight):
        return weight
    if weight < 0:
        raise ValueError(f"reconstruction_weight must be >= 0, got {weight}")
    return as_schedule(float(weight))


def checked_decay(weight_decay: int | float) -> float:
    """A weight decay that is not negative."""
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    return float(weight_decay)
