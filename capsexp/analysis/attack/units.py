"""From the units of the network's input to those of pixels, picture by picture."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from capsexp.analysis.attack.methods import Ball
from capsexp.capsules import Batch
from capsexp.errors import UserError

Units = Literal["input", "pixel"]

WHITE = 255
"""A pixel's range in the unit `pixel`."""


class Scale(NamedTuple):
    """input = slope * pixel + offset, for pixels in [0, 1]; the slope is 1 / deviation if standardised."""

    slope: Float64[Tensor, " B"]
    offset: Float64[Tensor, " B"]
    known: Bool[Tensor, " B"]
    """False for a picture of one colour, which tells no scale: its slope is NaN."""

    def epsilon(self, value: int | float, *, given: Units, wanted: Units) -> Float64[Tensor, " B"]:
        """A distance in other units, for each picture; NaN where its scale is not known."""
        factor = {"input": torch.ones_like(self.slope), "pixel": WHITE / self.slope}
        return value * factor[wanted] / factor[given]


def scale_of(batch: Batch) -> Scale:
    """The scale of each picture, by least squares.

    Raises:
        UserError: the network's pictures are not the pixels at another scale.
    """
    # On the CPU: not every device has float64.
    images, pixels = (one.flatten(1).double().cpu() for one in (batch.images, batch.pixels))
    if torch.equal(images, pixels):
        ones = torch.ones(len(images), dtype=torch.float64)
        return Scale(ones, 0 * ones, ones.bool())
    middle, level = pixels.mean(1), images.mean(1)
    across, up = pixels - middle[:, None], images - level[:, None]
    variance = across.square().mean(1)
    # A quarter of what one pixel that is 1/255 away from all the others comes to.
    known = variance > 0.25 / WHITE**2 / pixels.shape[1]
    slope = torch.where(known, (across * up).mean(1) / variance, torch.nan)
    left_over = (up - slope[:, None] * across).square().mean(1).sqrt()
    if (left_over[known] > 1e-3 * slope[known] * variance[known].sqrt()).any():
        raise UserError("the network's pictures are not the pixels times a number plus a number: no units")
    return Scale(slope, level - slope * middle, known)


def ball_of(batch: Batch, scale: Scale, epsilon: int | float, *, units: Units, clip: bool) -> Ball:
    """The ball around each picture; where the scale is not known, without bounds, and empty in pixels.

    Args:
        batch: the pictures.
        scale: theirs.
        epsilon: the radius.
        units: of the radius.
        clip: whether pixels stay in [0, 1].
    """
    radius = scale.epsilon(epsilon, given=units, wanted="input")
    if units == "pixel":
        radius = radius.nan_to_num(0)  # NaN marks the scales that are not known
    low = torch.full_like(scale.slope, -torch.inf)
    high = torch.full_like(scale.slope, torch.inf)
    if clip:
        # The pictures themselves are valid, whatever the last digit of the scale is.
        flat = batch.images.flatten(1).double().cpu()
        low = torch.where(scale.known, torch.minimum(scale.offset, flat.amin(1)), low)
        high = torch.where(scale.known, torch.maximum(scale.offset + scale.slope, flat.amax(1)), high)
    radius, low, high = (one.to(batch.images)[:, None, None, None] for one in (radius, low, high))
    return Ball(batch.images, radius, low=low, high=high)


def as_pixels(images: Float[Tensor, "B C H W"], scale: Scale) -> Float[Tensor, "B C H W"]:
    """The network's pictures in [0, 1] again; one of unknown scale in the middle grey."""
    slope, offset = (one[:, None, None, None] for one in (scale.slope, scale.offset))
    pixels = (images.double().cpu() - offset) / slope
    return torch.where(scale.known[:, None, None, None], pixels, 0.5).float()
