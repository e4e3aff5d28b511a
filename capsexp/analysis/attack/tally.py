"""Means over the pictures of all batches."""

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


class Tally:
    """Means over all pictures, by name.

    Args:
        counted: the name that comes once with each batch: its values are the pictures.
    """

    def __init__(self, *, counted: str) -> None:
        self.pictures = 0
        self._counted = counted
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Shaped[Tensor, "*E B"], *, factor: int | float = 1) -> None:
        """A number or truth value of each picture of a batch, or rows of them; times a factor."""
        # float64, on the CPU, because not every device has it.
        total = values.cpu().double().sum(-1) * factor
        self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total
        if name == self._counted:
            self.pictures += values.shape[-1]

    def mean(self, name: str) -> Any:
        """Over the pictures; a list for rows."""
        return (self._sums[name] / self.pictures).tolist()

    def means(self, prefix: str) -> dict[str, Any]:
        """Of all that is named PREFIX/NAME, by NAME."""
        names = [name for name in self._sums if name.startswith(f"{prefix}/")]
        return {name.removeprefix(f"{prefix}/"): self.mean(name) for name in names}
