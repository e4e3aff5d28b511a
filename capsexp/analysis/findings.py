"""What a study returns: numbers, figures, a table."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor


class Findings(NamedTuple):
    """What a study comes to."""

    numbers: dict[str, Any]
    """Plain values; those that are numbers also become scalars."""
    figures: dict[str, Any]
    """Figures of matplotlib by name."""
    table: Table | None = None
    """To be printed."""


def visible(picture: Float[Tensor, "C H W"]) -> Any:
    """A picture as matplotlib takes it; of other channel counts than 1 and 3, such as stereo, the first."""
    shown = picture.detach().cpu().clamp(0, 1)
    return torch.movedim(shown, 0, 2).numpy() if len(shown) == 3 else shown[0].numpy()
