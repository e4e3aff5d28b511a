"""What happens to pictures between the memory and the network, for a whole batch at a time.

Geometry first (shift, crop, flip), on bytes; then brightness, contrast and standardisation. A picture in
[0, 1] after geometry alone is kept beside the network's input: it is what a decoder has to reconstruct.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, int, int]
"""Channels, height, width."""

RESIZE_CHUNK = 1024
"""Pictures resized at a time, so that a whole set is never in memory as floats."""

FARTHEST = 3
"""Pixels by which the outermost of 13 test crops is moved, along each axis."""

LARGEST_BRIGHTNESS = 10
"""In standard deviations: 63, meant for 0 … 255, is refused with `standardise: first`."""

EXACT_FLOATS = (torch.float16, torch.float32, torch.float64)
"""Float dtypes that tell all bytes divided by 255 apart; bfloat16 does not."""

Choice = TypeVar("Choice")


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
        brightness: adds one number per picture, uniform in ±brightness, in units of 1/255 or, with
            `standardise: first`, of the picture's standard deviation. Training only.
        contrast: [lowest, highest] factor by which each channel's distance from its mean is multiplied.
            Training only.
        light: what that mean is taken over: the `window` that the network gets, as if contrast came after
            the crop, or the whole `picture`, as if it came before. It is all that their order changes, so
            either way only the window is computed. The whole picture is the one in memory: a shift's zeros
            are no part of it.
        standardise: each picture to mean 0 and standard deviation 1, over all its channels; the deviation
            is taken as at least 1 / sqrt(numbers in the picture), on the scale 0 … 255. `last` does it to
            the window, as the last step: that undoes brightness, and contrast too for one channel, nearly
            for several. `first` takes mean and deviation of the whole picture, before everything else.
        test_crops: windows of a test picture that `test_views` gives: 1, the centre; or 13, with those moved
            by 1, 2 and 3 pixels along both diagonals (Hinton et al. 2018's code).

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
        light: Literal["window", "picture"],
        standardise: Literal["first", "last"] | None,
        test_crops: int,
    ) -> None:
        self.resize = _as_size(resize)
        self.shift = _at_least("shift", shift, 0)
        self.crop = None if crop is None else _at_least("crop", crop, 1)
        self.flip = _as_bool("flip", flip)
        self.standardise = _one_of("standardise", standardise, (None, "first", "last"))
        self.brightness = _as_brightness(brightness, deviations=standardise == "first")
        self.contrast = _as_contrast(contrast)
        self.light = _one_of("light", light, ("window", "picture"))
        self.test_crops = _one_of("test_crops", test_crops, (1, 13))

    def resized_shape(self, shape: Shape) -> Shape:
        """Shape of the pictures in memory, given their shape on disk."""
        return shape if self.resize is None else (shape[0], *self.resize)

    def output_shape(self, shape: Shape) -> Shape:
        """Shape that the network gets, given the shape on disk.

        Raises:
            ValueError: the crop is larger than the picture or leaves no room for 13 of them, or the shift
                moves the picture out of sight.
        """
        channels, height, width = self.resized_shape(shape)
        if self.crop is not None and self.crop > min(height, width):
            raise ValueError(f"crop must be <= the picture's {height}x{width}, got {self.crop}")
        if self.test_crops > 1 and (self.crop is None or self.crop + 2 * FARTHEST > min(height, width)):
            raise ValueError(
                f"test_crops {self.test_crops} needs a crop with {FARTHEST} pixels of the picture's "
                f"{height}x{width} on each side, got crop {self.crop}"
            )
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
        return Preprocessed(self._network_input(pixels, images, generator), pixels)

    def test(self, images: UInt8[Tensor, "B C H W"]) -> Preprocessed:
        """The same pictures without chance: the centre of a crop, no shift, flip or change of light."""
        return self._view(images, 0, 0)

    def test_views(self, images: UInt8[Tensor, "B C H W"]) -> list[Preprocessed]:
        """What `test` gives, and after it the other windows of `test_crops`, in a fixed order."""
        distances = range(1, FARTHEST + 1) if self.test_crops > 1 else ()
        moves = [(down * far, right * far) for far in distances for down in (-1, 1) for right in (-1, 1)]
        return [self._view(images, *move) for move in [(0, 0), *moves]]

    def _view(self, images: UInt8[Tensor, "B C H W"], down: int, right: int) -> Preprocessed:
        _, height, width = self.output_shape((images.shape[1], images.shape[2], images.shape[3]))
        top, left = (images.shape[2] - height) // 2 + down, (images.shape[3] - width) // 2 + right
        pixels = _to_unit(images[:, :, top : top + height, left : left + width])
        return Preprocessed(self._network_input(pixels, images, None), pixels)

    def _random_geometry(
        self, images: UInt8[Tensor, "B C H W"], generator: torch.Generator
    ) -> UInt8[Tensor, "B C h w"]:
        count, (height, width) = len(images), self.output_shape((images.shape[1], *images.shape[2:]))[1:]
        if self.shift or self.crop is not None:
            # A shift followed by a crop is one window of the picture with a margin of zeros.
            margin = torch.full((count, 2), self.shift)
            draws = torch.randint(-self.shift, self.shift + 1, (count, 2), generator=generator)
            room = (images.shape[2] - height + 1, images.shape[3] - width + 1)
            crops = [torch.randint(n, (count,), generator=generator) for n in room]
            corners = margin - draws + torch.stack(crops, dim=1)
            images = windows(F.pad(images, [self.shift] * 4), corners, height, width)
        if self.flip:
            images = _mirror(images, torch.rand(count, generator=generator) < 0.5)
        return images

    def _network_input(
        self,
        pixels: Float[Tensor, "B C h w"],
        images: UInt8[Tensor, "B C H W"],
        generator: torch.Generator | None,
    ) -> Float[Tensor, "B C h w"]:
        """Windows of `images` standardised, and with a generator in another light."""
        needs_whole = self.light == "picture" or self.standardise == "first"
        whole = _to_unit(images) if needs_whole else pixels
        if self.standardise == "first":
            pixels, whole = _standardised(pixels, whole), _standardised(whole, whole)
        if generator is not None:
            pixels = self._random_light(pixels, whole, generator)
        return _standardised(pixels, pixels) if self.standardise == "last" else pixels

    def _random_light(
        self, pixels: Float[Tensor, "B C h w"], whole: Float[Tensor, "B C H W"], generator: torch.Generator
    ) -> Float[Tensor, "B C h w"]:
        if self.brightness:
            added = _uniform(-self.brightness, self.brightness, pixels, generator)
            pixels, whole = pixels + added, whole + added
        if self.contrast is not None:
            mean = (pixels if self.light == "window" else whole).mean(dim=(2, 3), keepdim=True)
            pixels = (pixels - mean) * _uniform(*self.contrast, pixels, generator) + mean
        return pixels


def windows(
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


def _standardised(
    pixels: Float[Tensor, "B C h w"], whole: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B C h w"]:
    """Windows less the mean of their whole pictures, in units of those pictures' standard deviation."""
    mean = whole.mean(dim=(1, 2, 3), keepdim=True)
    # torch.std_mean is ten times slower here.
    deviation = (whole - mean).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    # The floor keeps an empty picture finite; it is that of the pixel range 0 … 255.
    floor = 1 / (255 * whole[0].numel() ** 0.5)
    return (pixels - mean) / deviation.clamp_min(floor)


def _to_unit(images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images must be uint8, got {_dtype_name(images)}; convert floats in [0, 1] with as_uint8_images"
        )
    return images.to(torch.float32).div_(255)


def as_uint8_images(images: Tensor | NDArray[Any], shape: Shape) -> UInt8[Tensor, "N C H W"]:
    """Convert a user's images to what `Preprocess.test` takes.

    Bytes stay as they are. Floats are scaled by 255 and rounded, so bytes divided by 255 come back exactly.

    Args:
        images: uint8, or float in [0, 1]; [N, C, H, W], or [C, H, W] for one image. The channel axis may be
            left out where `shape` has one channel.
        shape: `Dataset.raw_shape`.

    Returns:
        The images on their device.

    Raises:
        ValueError: another shape or dtype, no image, or a float outside [0, 1].
    """
    images = torch.as_tensor(images)
    if images.dtype not in (torch.uint8, *EXACT_FLOATS):
        raise ValueError(f"images must be uint8 or float in [0, 1], got {_dtype_name(images)}")
    batch = _as_batch(images, shape)
    if batch.dtype == torch.uint8:
        return batch
    lowest, highest = batch.min().item(), batch.max().item()
    if not 0 <= lowest <= highest <= 1:
        raise ValueError(
            f"float images must be in [0, 1], got {lowest:g} … {highest:g}; pass 0 … 255 as uint8"
        )
    return batch.float().mul(255).round_().to(torch.uint8)


def _as_batch(images: Tensor, shape: Shape) -> Tensor:
    """Add the batch axis, and the channel axis of grayscale images, where they are missing."""
    batch = images
    if shape[0] == 1 and batch.ndim in (2, 3):
        batch = batch.reshape(-1, 1, *batch.shape[-2:])
    elif batch.ndim == 3:
        batch = batch[None]
    if tuple(batch.shape[1:]) != shape or len(batch) == 0:
        raise ValueError(
            f"images must have shape [N, {', '.join(map(str, shape))}], got {list(images.shape)}"
        )
    return batch


def _dtype_name(images: Tensor) -> str:
    return str(images.dtype).removeprefix("torch.")


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


def _one_of(name: str, value: Choice, allowed: Sequence[Choice]) -> Choice:
    if isinstance(value, bool) or value not in allowed:
        named = [str(choice or "null") for choice in allowed]
        raise ValueError(f"{name} must be {', '.join(named[:-1])} or {named[-1]}, got {value!r}")
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


def _as_brightness(brightness: int | float, *, deviations: bool) -> float:
    """On the scale that brightness is added on: [0, 1], or standard deviations."""
    largest, scale = (LARGEST_BRIGHTNESS, 1) if deviations else (255, 255)
    if isinstance(brightness, bool) or not 0 <= brightness <= largest:
        unit = " standard deviations with standardise: first" if deviations else ""
        raise ValueError(f"brightness must be in [0, {largest}]{unit}, got {brightness!r}")
    return brightness / scale


def _as_contrast(contrast: Sequence[int | float] | None) -> tuple[float, float] | None:
    if contrast is None:
        return None
    if len(contrast) != 2 or not 0 <= contrast[0] <= contrast[1] < float("inf"):
        raise ValueError(
            f"contrast must be null or [lowest, highest] with 0 <= lowest <= highest, got {contrast!r}"
        )
    return (float(contrast[0]), float(contrast[1]))
