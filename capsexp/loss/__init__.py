"""One loss per file: a function of plain tensors, and the class that a config builds."""

from typing import Protocol

from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.schedule import Step


class Loss(Protocol):
    """The interface that the training loop uses.

    `multi_label = True` says that an image may show several classes. Without it, an image shows one class.
    """

    def __call__(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Return the terms of the loss, scalars that add up to it."""

    def scheduled(self, step: Step) -> dict[str, float]:
        """Return the current value of everything that follows a schedule."""
