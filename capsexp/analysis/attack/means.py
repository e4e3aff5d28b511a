"""Means over the images of all batches."""

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


class Means:
    """Sums over the images of all batches, by name; `over` turns them into means."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Shaped[Tensor, "*E B"], *, factor: int | float = 1) -> None:
        """Add a number or a boolean for each image of a batch, or rows of them; times a factor."""
        # float64, on the CPU, because not every device has it.
        total = values.cpu().double().sum(-1) * factor
        self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total

    def over(self, images: int) -> dict[str, Any]:
        """Return the mean over the images by name; a list for rows."""
        return {name: (total / images).tolist() for name, total in self._sums.items()}
