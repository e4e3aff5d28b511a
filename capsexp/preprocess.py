"""What happens to pictures between the memory and the network, for a whole batch at a time.

Geometry first (shift, crop, flip), on bytes; then brightness, contrast and standardisation. A picture in
[0, 1] after geometry alone is kept beside the network's input: it is what a decoder has to reconstruct.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, int, int]
"""Channels, height, width."""

RESIZE_CHUNK = 1024
"""Pictures resized at a time, so that a whole set is never in memory as floats."""


class Preprocessed(NamedTuple):
    """A batch as the network takes it, and as a decoder has to return it."""

    images: Float[Tensor, "B C H W"]
    """The network's input; the same object as `pixels` when no photometric step is on."""
    pixels: Float[Tensor, "B C H W"]
    """In [0, 1], after geometry only."""


class Preprocess:
    """The same settings for every data set; `null`, 0 or false switches a step off.

    Random numbers are drawn on the CPU, a few per picture, so augmentation is the same on every device.

    Args:
        resize: size in pixels of the pictures in memory, one number for a square or [height, width];
            antialiased, done once when a data set is read.
        shift: moves each picture by up to this many pixels, each axis by its own integer in -shift … shift,
            and fills with zeros. Training only (Sabour et al. 2017: 2).
        crop: side of a square window; at a random place in training, in the centre otherwise.
        flip: mirrors left and right with probability 1/2. Training only.
        brightness: adds one number per picture, uniform in ±brightness, in units of 1/255. Training only.
        contrast: [lowest, highest] factor by which each channel's distance from its mean is multiplied.
            Training only.
        standardise: each picture to mean 0 and standard deviation 1, over all its channels; the deviation
            is taken as at least 1 / sqrt(numbers in the picture), on the scale 0 … 255.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        resize: int | Sequence[int] | None,
        shift: int,
        crop: int | None,
        flip: bool,
        brightness: int | float,
        contrast: Sequence[int | float] | None,
        standardise: bool,
    ) -> None:
        self.resize = _as_size(resize)
        self.shift = _at_least("shift", shift, 0)
        self.crop = None if crop is None else _at_least("crop", crop, 1)
        self.flip = _as_bool("flip", flip)
        self.brightness = _as_brightness(brightness)
        self.contrast = _as_contrast(contrast)
        self.standardise = _as_bool("standardise", standardise)

    def resized_shape(self, shape: Shape) -> Shape:
        """Shape of the pictures in memory, given their shape on disk."""
        return shape if self.resize is None else (shape[0], *self.resize)

    def output_shape(self, shape: Shape) -> Shape:
        """Shape that the network gets, given the shape on disk.

        Raises:
            ValueError: the crop is larger than the picture, or the shift moves it out of sight.
        """
        channels, height, width = self.resized_shape(shape)
        if self.crop is not None and self.crop > min(height, width):
            raise ValueError(f"crop must be <= the picture's {height}x{width}, got {self.crop}")
        if self.shift >= min(height, width):
            raise ValueError(f"shift must be < the picture's {height}x{width}, got {self.shift}")
        return (channels, self.crop or height, self.crop or width)

    def resize_all(self, images: UInt8[Tensor, "N C H W"]) -> UInt8[Tensor, "N C h w"]:
        """The whole set at the size of `resize`, antialiased."""
        if self.resize is None or tuple(images.shape[2:]) == self.resize:
            return images
        return torch.cat([resized(chunk, self.resize) for chunk in torch.split(images, RESIZE_CHUNK)])

    def train(self, images: UInt8[Tensor, "B C H W"], generator: torch.Generator) -> Preprocessed:
        """A training batch, each picture with its own draws from `generator` (a CPU generator)."""
        pixels = _to_unit(self._random_geometry(images, generator))
        light = self._random_light(pixels, generator)
        return Preprocessed(self._standardised(light), pixels)

    def test(self, images: UInt8[Tensor, "B C H W"]) -> Preprocessed:
        """The same pictures without chance: the centre of a crop, no shift, flip or change of light."""
        _, height, width = self.output_shape((images.shape[1], images.shape[2], images.shape[3]))
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        pixels = _to_unit(images[:, :, top : top + height, left : left + width])
        return Preprocessed(self._standardised(pixels), pixels)

    def _random_geometry(
        self, images: UInt8[Tensor, "B C H W"], generator: torch.Generator
    ) -> UInt8[Tensor, "B C h w"]:
        count, (height, width) = len(images), self.output_shape((images.shape[1], *images.shape[2:]))[1:]
        if self.shift or self.crop is not None:
            # A shift followed by a crop is one window, somewhere in the picture with a margin of zeros.
            margin = torch.full((count, 2), self.shift)
            draws = torch.randint(-self.shift, self.shift + 1, (count, 2), generator=generator)
            room = (images.shape[2] - height + 1, images.shape[3] - width + 1)
            crops = [torch.randint(n, (count,), generator=generator) for n in room]
            corners = margin - draws + torch.stack(crops, dim=1)
            images = _windows(F.pad(images, [self.shift] * 4), corners, height, width)
        if self.flip:
            images = _mirror(images, torch.rand(count, generator=generator) < 0.5)
        return images

    def _random_light(
        self, pixels: Float[Tensor, "B C H W"], generator: torch.Generator
    ) -> Float[Tensor, "B C H W"]:
        if self.brightness:
            amount = self.brightness / 255
            pixels = pixels + _uniform(-amount, amount, pixels, generator)
        if self.contrast is not None:
            mean = pixels.mean(dim=(2, 3), keepdim=True)
            pixels = (pixels - mean) * _uniform(*self.contrast, pixels, generator) + mean
        return pixels

    def _standardised(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if not self.standardise:
            return pixels
        centred = pixels - pixels.mean(dim=(1, 2, 3), keepdim=True)
        # torch.std_mean is ten times slower here.
        deviation = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        # The floor keeps an empty picture finite; it is that of the pixel range 0 … 255.
        floor = 1 / (255 * pixels[0].numel() ** 0.5)
        return centred / deviation.clamp_min(floor)


def _windows(
    images: UInt8[Tensor, "B C H W"], corners: Int[Tensor, "B 2"], height: int, width: int
) -> UInt8[Tensor, "B C h w"]:
    """From each picture the window whose top left corner is given."""
    corners = corners.to(images.device)
    views = images.unfold(2, height, 1).unfold(3, width, 1)
    return views[torch.arange(len(images), device=images.device), :, corners[:, 0], corners[:, 1]]


def _mirror(images: UInt8[Tensor, "B C H W"], chosen: Bool[Tensor, " B"]) -> UInt8[Tensor, "B C H W"]:
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)


def _uniform(
    low: int | float, high: int | float, like: Float[Tensor, "B C H W"], generator: torch.Generator
) -> Float[Tensor, "B 1 1 1"]:
    draws = torch.rand(len(like), generator=generator) * (high - low) + low
    return draws.to(like.device)[:, None, None, None]


def _to_unit(images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    return images.to(torch.float32).div_(255)


def resized(images: UInt8[Tensor, "N C H W"], size: tuple[int, int]) -> UInt8[Tensor, "N C h w"]:
    """Pictures at another size, antialiased."""
    larger_or_smaller = F.interpolate(
        images.float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )
    return larger_or_smaller.round_().clamp_(0, 255).to(torch.uint8)


def _at_least(name: str, value: int, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} must be an integer >= {lowest}, got {value!r}")
    return value


def _as_bool(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _as_size(resize: int | Sequence[int] | None) -> tuple[int, int] | None:
    if resize is None:
        return None
    sides = [resize, resize] if isinstance(resize, int) else list(resize)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        raise ValueError(f"resize must be null, an integer or [height, width], got {resize!r}")
    if min(sides) < 1:
        raise ValueError(f"resize must be >= 1 pixel, got {resize!r}")
    return (sides[0], sides[1])


def _as_brightness(brightness: int | float) -> float:
    if isinstance(brightness, bool) or not 0 <= brightness <= 255:
        raise ValueError(f"brightness must be in [0, 255], got {brightness!r}")
    return float(brightness)


def _as_contrast(contrast: Sequence[int | float] | None) -> tuple[float, float] | None:
    if contrast is None:
        return None
    if len(contrast) != 2 or not 0 <= contrast[0] <= contrast[1] < float("inf"):
        raise ValueError(
            f"contrast must be null or [lowest, highest] with 0 <= lowest <= highest, got {contrast!r}"
        )
    return (float(contrast[0]), float(contrast[1]))
