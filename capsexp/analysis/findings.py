"""What a study returns: numbers, figures, a table."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Findings(NamedTuple):
    """The result of a study."""

    numbers: dict[str, Any]
    """Plain values by name. Those that are numbers are also written as TensorBoard scalars."""
    figures: dict[str, "Figure"]
    """Matplotlib figures by name."""
    table: Table | None = None
    """Printed after the study."""


def displayable(image: Float[Tensor, "C H W"]) -> NDArray[Any]:
    """Return an image as matplotlib takes it.

    Of an image that has neither 1 nor 3 channels, such as a stereo pair, it is the first channel.
    """
    pixels = image.detach().cpu().clamp(0, 1)
    return torch.movedim(pixels, 0, 2).numpy() if len(pixels) == 3 else pixels[0].numpy()
