"""One loss per file: loss(output, batch, step) -> {term: scalar}; the terms add up to the loss."""

from typing import Protocol

from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.schedule import Step


class Loss(Protocol):
    """What the training loop asks of a loss.

    A loss that accepts several classes per image also sets `takes_several = True`.
    """

    def __call__(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Return the terms of the loss, scalars that add up to it."""

    def scheduled(self, step: Step) -> dict[str, float]:
        """Return the current value of everything that follows a schedule."""
