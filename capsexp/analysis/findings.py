"""What a study returns: numbers, figures, a table."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from capsexp.data.image_ops import displayable
from capsexp.terminal import Table

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


def as_matplotlib(image: Float[Tensor, "C H W"]) -> NDArray[Any]:
    """Return an image as matplotlib's `imshow` takes it: [H, W, 3] or [H, W]. See `displayable`."""
    pixels = displayable(image.detach().cpu().clamp(0, 1))
    return torch.movedim(pixels, 0, 2).numpy() if len(pixels) == 3 else pixels[0].numpy()
