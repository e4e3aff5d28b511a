"""Conversion between the units of the network's input and pixels, image by image."""

from collections.abc import Sequence
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
    """False for an image of a single color, from which no scale can be computed: its slope is NaN."""

    def epsilon(self, value: int | float, *, units: Units, to: Units) -> Float64[Tensor, " B"]:
        """Convert a distance to other units, for each image; NaN where its scale is not known."""
        factor = {"input": torch.ones_like(self.slope), "pixel": WHITE / self.slope}
        return value * factor[to] / factor[units]


class Radii(NamedTuple):
    """The radii of an attack, smallest first, and for each the balls around the images of a batch."""

    epsilons: Sequence[int | float]
    balls: Sequence[Ball]


def scale_of(batch: Batch) -> Scale:
    """Return the scale of each image, by least squares.

    Raises:
        UserError: the network's input is not a linear function of the pixels.
    """
    # On the CPU: not every device has float64.
    images, pixels = (field.flatten(1).double().cpu() for field in (batch.images, batch.pixels))
    if torch.equal(images, pixels):
        slope = torch.ones(len(images), dtype=torch.float64)
        return Scale(slope, 0 * slope, slope.bool())
    mean_pixel, mean_input = pixels.mean(1), images.mean(1)
    centered_pixels, centered_inputs = pixels - mean_pixel[:, None], images - mean_input[:, None]
    variance = centered_pixels.square().mean(1)
    # A quarter of the variance of an image in which one pixel differs from all others by 1/255.
    known = variance > 0.25 / WHITE**2 / pixels.shape[1]
    slope = torch.where(known, (centered_pixels * centered_inputs).mean(1) / variance, torch.nan)
    residual = (centered_inputs - slope[:, None] * centered_pixels).square().mean(1).sqrt()
    if (residual[known] > 1e-3 * slope[known] * variance[known].sqrt()).any():
        raise UserError(
            "the network's input is not a multiple of the pixels plus a constant, so epsilon has no units"
        )
    return Scale(slope, mean_input - slope * mean_pixel, known)


def ball_of(batch: Batch, scale: Scale, epsilon: int | float, *, units: Units, clip: bool) -> Ball:
    """Return the ball around each image. If its scale is not known: without bounds, and empty in pixels.

    Args:
        batch: the images.
        scale: of these images.
        epsilon: the radius.
        units: of the radius.
        clip: whether pixels stay in [0, 1].
    """
    radius = scale.epsilon(epsilon, units=units, to="input")
    if units == "pixel":
        radius = radius.nan_to_num(0)  # NaN marks the scales that are not known
    low = torch.full_like(scale.slope, -torch.inf)
    high = torch.full_like(scale.slope, torch.inf)
    if clip:
        # The clean images themselves are valid, whatever the rounding of the scale.
        flat = batch.images.flatten(1).double().cpu()
        low = torch.where(scale.known, torch.minimum(scale.offset, flat.amin(1)), low)
        high = torch.where(scale.known, torch.maximum(scale.offset + scale.slope, flat.amax(1)), high)
    radius, low, high = (values.to(batch.images)[:, None, None, None] for values in (radius, low, high))
    return Ball(batch.images, radius, low=low, high=high)


def radii_of(
    batch: Batch, scale: Scale, epsilons: Sequence[int | float], *, units: Units, clip: bool
) -> Radii:
    """Return the balls of several radii; see `ball_of`."""
    return Radii(epsilons, [ball_of(batch, scale, epsilon, units=units, clip=clip) for epsilon in epsilons])


def as_pixels(images: Float[Tensor, "B C H W"], scale: Scale) -> Float[Tensor, "B C H W"]:
    """Convert the network's input back to pixels in [0, 1]; an image of unknown scale becomes gray."""
    slope, offset = (values[:, None, None, None] for values in (scale.slope, scale.offset))
    pixels = (images.double().cpu() - offset) / slope
    return torch.where(scale.known[:, None, None, None], pixels, 0.5).float()
