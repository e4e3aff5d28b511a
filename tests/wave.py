"""Fixed numbers for examples whose results were computed elsewhere, in float64."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def wave(shape: Sequence[int], phase: float = 0.0, scale: float = 1.0) -> Tensor:
    """scale * sin(1 + 0.7 k + ((0.3 k^2) mod 5) + phase) for k = 0, 1, 2, … in C order."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(1 + 0.7 * k + (0.3 * k * k) % 5 + phase)).view(*shape)
