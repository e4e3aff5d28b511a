"""Preprocessing of a whole batch of images on its way from memory to the network.

Geometry (deformation, shift, crop, flip) comes first and works on bytes; then come brightness, contrast,
standardisation and mixup. The images in [0, 1] after geometry are returned too: they are what a decoder has
to reconstruct.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from capsexp.data.image_ops import (
    ShiftFill,
    dtype_name,
    mirror,
    random_windows,
    resized,
    standardise,
    to_unit,
    uniform_per_image,
)
from capsexp.data.warp import Warp
from capsexp.errors import refuse, require_at_least_1, require_literal, require_not_negative

Shape = tuple[int, int, int]
"""Channels, height, width."""

RESIZE_CHUNK = 1024
"""Images resized at a time, so that a whole dataset is never in memory as floats."""

LARGEST_OFFSET = 3
"""Pixels by which the outermost of 13 test crops is moved along each axis."""

LARGEST_BRIGHTNESS = 10
"""In standard deviations. Catches 63, which is meant for 0 … 255, with `standardise: first`."""

EXACT_FLOATS = (torch.float16, torch.float32, torch.float64)
"""Float dtypes that represent all bytes divided by 255 as different numbers; bfloat16 does not."""

Standardise = Literal["first", "last", "camera"]
ContrastMean = Literal["window", "image"]
Flip = bool | Literal["stereo"]


class Mixup(NamedTuple):
    """How a training batch was mixed: image b is `share` of itself and 1 - share of its partner."""

    partners: Int64[Tensor, " B"]
    """Position in the batch of the image that each image was mixed with."""
    share: float
    """In [0.5, 1], the same for the whole batch."""


class Preprocessed(NamedTuple):
    """A batch for the network and for the decoder."""

    images: Float[Tensor, "B C H W"]
    """The network's input; the same object as `pixels` when every step but geometry is off."""
    pixels: Float[Tensor, "B C H W"]
    """In [0, 1], after geometry only. The decoder's target."""
    mixup: Mixup | None = None
    """None for images that are not mixed."""


class Preprocess:
    """Preprocessing steps, the same for every dataset; `null`, 0 or false turns a step off.

    Random numbers are drawn on the CPU, a few per image, so augmentation is the same on every device.

    Args:
        resize: size in pixels of the images in memory, one number for a square or [height, width].
            Antialiased; done once, when a dataset is read.
        shift: moves each image by an integer drawn from -shift … shift along each axis. Training only (Sabour
            et al. 2017: 2).
        shift_fill: what a shift or a deformation moves in: "zeros", or the outermost pixels, repeated
            ("edge").
        crop: side of a square window, placed at random in training and in the center otherwise.
        flip: mirrors left and right with probability 1/2. Training only. "stereo" also swaps the two
            channels of a mirrored image: a mirrored scene, seen by a mirrored pair of cameras.
        rotation, scale, shear, elastic: ranges of a random deformation before everything else; see `Warp`.
            0 or None for none. Training only.
        brightness: adds one number per image, uniform in ±brightness, in units of 1/255 or, with
            `standardise: first`, of the image's standard deviation. Training only.
        contrast: [lowest, highest] factor by which each channel's distance from its mean is multiplied.
            Training only.
        contrast_mean: where that mean is taken: over the `window` that the network gets, as if contrast came
            after the crop, or over the whole `image`, as if it came before. The order of the two changes
            nothing else, so only the window is computed. The zeros of a shift do not count.
        standardise: scales each image to mean 0 and standard deviation 1 over all its channels. The deviation
            is clamped to at least 1 / sqrt(numbers in the image), on the scale 0 … 255. `last` does it to the
            window, as the last step. That undoes brightness; it undoes contrast too for one channel, nearly
            for several. `camera` does the same to each channel by itself. `first` uses mean and deviation of
            the whole image, before everything else.
        mixup: a of the Beta(a, a) distribution of the share by which each image of a batch, and its label,
            is mixed with another of the batch; one share for a batch (Zhang et al., "mixup: Beyond empirical
            risk minimization", ICLR 2018). 0 for none. Training only.
        test_crops: windows that `test_views` returns: 1, the center; or 13, which adds the center moved by
            1, 2 and 3 pixels along both diagonals (the code of Hinton et al. 2018).

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        resize: int | Sequence[int] | None,
        shift: int,
        shift_fill: ShiftFill,
        crop: int | None,
        flip: Flip,
        rotation: int | float,
        scale: Sequence[int | float] | None,
        shear: int | float,
        elastic: int | float,
        brightness: int | float,
        contrast: Sequence[int | float] | None,
        contrast_mean: ContrastMean,
        standardise: Standardise | None,
        mixup: int | float,
        test_crops: int,
    ) -> None:
        require_at_least_1(crop=crop)
        require_not_negative(shift=shift, mixup=mixup)
        if not isinstance(flip, bool):
            require_literal(Literal["stereo"], flip=flip)
        if standardise is not None:
            require_literal(Standardise, standardise=standardise)
        require_literal(ContrastMean, contrast_mean=contrast_mean)
        require_literal(ShiftFill, shift_fill=shift_fill)
        if isinstance(test_crops, bool) or test_crops not in (1, 13):
            refuse(f"test_crops must be 1 or 13, got {test_crops!r}")
        self.resize = _parse_size(resize)
        self.shift, self.shift_fill, self.crop, self.flip = shift, shift_fill, crop, flip
        self.warp = Warp.parse(rotation=rotation, scale=scale, shear=shear, elastic=elastic)
        self.mixup = float(mixup)
        self.standardise = standardise
        self.brightness = _scale_brightness(brightness, deviations=standardise == "first")
        self.contrast = _parse_contrast(contrast)
        self.contrast_mean, self.test_crops = contrast_mean, test_crops

    @classmethod
    def identity(cls, **changes: Any) -> "Preprocess":
        """Return a Preprocess with every step off, except for the settings in `changes`."""
        return cls(**IDENTITY | changes)

    def resized_shape(self, shape: Shape) -> Shape:
        """Return the shape of the images in memory, given their shape on disk."""
        return shape if self.resize is None else (shape[0], *self.resize)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the network's input, given the shape on disk.

        Raises:
            ValueError: the crop or the shift is too large for the image, or there is no room for 13 crops.
        """
        channels, height, width = self.resized_shape(shape)
        if self.crop is not None and self.crop > min(height, width):
            refuse(f"crop must be <= the image's {height}x{width}, got {self.crop}")
        if self.test_crops > 1 and (self.crop is None or self.crop + 2 * LARGEST_OFFSET > min(height, width)):
            refuse(
                f"test_crops {self.test_crops} needs a crop with {LARGEST_OFFSET} pixels of the image's "
                f"{height}x{width} on each side, got crop {self.crop}"
            )
        if self.shift >= min(height, width):
            refuse(f"shift must be < the image's {height}x{width}, got {self.shift}")
        if self.flip == "stereo" and channels != 2:
            refuse(f"flip 'stereo' needs images of two channels, one for each camera, got {channels}")
        return (channels, self.crop or height, self.crop or width)

    def resize_all(self, images: UInt8[Tensor, "N C H W"]) -> UInt8[Tensor, "N C h w"]:
        """Resize a whole dataset, antialiased, if `resize` asks for it."""
        if self.resize is None or tuple(images.shape[2:]) == self.resize:
            return images
        return torch.cat([resized(chunk, self.resize) for chunk in torch.split(images, RESIZE_CHUNK)])

    def train(self, images: UInt8[Tensor, "B C H W"], generator: torch.Generator) -> Preprocessed:
        """Preprocess a training batch; each image gets its own draws from `generator`, a CPU generator."""
        images = self.warp.apply(images, fill=self.shift_fill, generator=generator)
        pixels = to_unit(self._random_geometry(images, generator))
        batch = Preprocessed(self._network_input(pixels, images, generator), pixels)
        return self._mixed(batch, generator) if self.mixup else batch

    def test(self, images: UInt8[Tensor, "B C H W"]) -> Preprocessed:
        """Preprocess a batch without augmentation; a crop is the center of its image.

        Raises:
            ValueError: the images are not uint8; `as_uint8_images` converts others.
        """
        return self._view(images, 0, 0)

    def test_views(self, images: UInt8[Tensor, "B C H W"]) -> list[Preprocessed]:
        """Return what `test` returns, followed by the other windows of `test_crops` in a fixed order."""
        distances = range(1, LARGEST_OFFSET + 1) if self.test_crops > 1 else ()
        moves = [(down * far, right * far) for far in distances for down in (-1, 1) for right in (-1, 1)]
        return [self._view(images, *move) for move in [(0, 0), *moves]]

    def _view(self, images: UInt8[Tensor, "B C H W"], down: int, right: int) -> Preprocessed:
        _, height, width = self.output_shape((images.shape[1], images.shape[2], images.shape[3]))
        top, left = (images.shape[2] - height) // 2 + down, (images.shape[3] - width) // 2 + right
        pixels = to_unit(images[:, :, top : top + height, left : left + width])
        return Preprocessed(self._network_input(pixels, images, None), pixels)

    def _random_geometry(
        self, images: UInt8[Tensor, "B C H W"], generator: torch.Generator
    ) -> UInt8[Tensor, "B C h w"]:
        count, (height, width) = len(images), self.output_shape((images.shape[1], *images.shape[2:]))[1:]
        if self.shift or self.crop is not None:
            images = random_windows(
                images, height, width, shift=self.shift, fill=self.shift_fill, generator=generator
            )
        if self.flip:
            chosen = torch.rand(count, generator=generator) < 0.5
            images = mirror(images, chosen, swap_channels=self.flip == "stereo")
        return images

    def _mixed(self, batch: Preprocessed, generator: torch.Generator) -> Preprocessed:
        """Mix each image of a batch with another of the same batch."""
        # Beta(a, a) from two Gamma(a, 1): torch.distributions takes no generator.
        parameter = torch.full((2,), self.mixup, dtype=torch.float64)
        first, second = torch._standard_gamma(parameter, generator=generator).tolist()
        share = first / (first + second) if first + second > 0 else 1.0
        mixup = Mixup(torch.randperm(len(batch.images), generator=generator), max(share, 1 - share))
        partners = mixup.partners.to(batch.images.device)
        images, pixels = (mixup.share * x + (1 - mixup.share) * x[partners] for x in batch[:2])
        return Preprocessed(images, pixels, mixup._replace(partners=partners))

    def _network_input(
        self,
        pixels: Float[Tensor, "B C h w"],
        images: UInt8[Tensor, "B C H W"],
        generator: torch.Generator | None,
    ) -> Float[Tensor, "B C h w"]:
        """Standardise windows of `images`; with a generator, also change their brightness and contrast."""
        needs_whole = self.contrast_mean == "image" or self.standardise == "first"
        whole = to_unit(images) if needs_whole else pixels
        if self.standardise == "first":
            pixels, whole = standardise(pixels, whole), standardise(whole, whole)
        if generator is not None:
            pixels = self._random_photometry(pixels, whole, generator)
        if self.standardise in ("last", "camera"):
            return standardise(pixels, pixels, each_channel=self.standardise == "camera")
        return pixels

    def _random_photometry(
        self, pixels: Float[Tensor, "B C h w"], whole: Float[Tensor, "B C H W"], generator: torch.Generator
    ) -> Float[Tensor, "B C h w"]:
        if self.brightness:
            offset = uniform_per_image(-self.brightness, self.brightness, pixels, generator)
            pixels, whole = pixels + offset, whole + offset
        if self.contrast is not None:
            mean = (pixels if self.contrast_mean == "window" else whole).mean(dim=(2, 3), keepdim=True)
            pixels = (pixels - mean) * uniform_per_image(*self.contrast, pixels, generator) + mean
        return pixels


IDENTITY: dict[str, Any] = {
    "resize": None,
    "shift": 0,
    "shift_fill": "zeros",
    "crop": None,
    "flip": False,
    "rotation": 0,
    "scale": None,
    "shear": 0,
    "elastic": 0,
    "brightness": 0,
    "contrast": None,
    "contrast_mean": "window",
    "standardise": None,
    "mixup": 0,
    "test_crops": 1,
}


def as_uint8_images(images: Tensor | NDArray[Any], shape: Shape) -> UInt8[Tensor, "N C H W"]:
    """Convert a user's images to the uint8 batch that `Preprocess.test` takes.

    uint8 tensors are not copied. Floats are rounded to multiples of 1/255, so bytes divided by 255 are exact.

    Args:
        images: uint8, or float in [0, 1]; [N, C, H, W], or [C, H, W] for one image. The channel axis may be
            left out where `shape` has one channel.
        shape: `Dataset.raw_shape`.

    Returns:
        The images, on their device.

    Raises:
        ValueError: another shape or dtype, no image, or a float outside [0, 1].
    """
    if not isinstance(images, Tensor):  # a copy, because torch warns about read-only arrays
        images = torch.from_numpy(np.array(images, order="C"))
    if images.dtype not in (torch.uint8, *EXACT_FLOATS):
        raise ValueError(f"images must be uint8 or float in [0, 1], got {dtype_name(images)}")
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
    """Add the batch axis, and the channel axis of images with one channel, where they are missing."""
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


def _parse_size(resize: int | Sequence[int] | None) -> tuple[int, int] | None:
    if resize is None:
        return None
    sides = [resize, resize] if isinstance(resize, int) else list(resize)
    if len(sides) != 2:
        refuse(f"resize must be null, an integer or [height, width], got {resize!r}")
    if min(sides) < 1:
        refuse(f"resize must be >= 1 pixel, got {resize!r}")
    return (sides[0], sides[1])


def _scale_brightness(brightness: int | float, *, deviations: bool) -> float:
    """Convert brightness to the scale on which it is added: [0, 1], or standard deviations."""
    largest, scale = (LARGEST_BRIGHTNESS, 1) if deviations else (255, 255)
    if not 0 <= brightness <= largest:
        unit = " standard deviations with standardise: first" if deviations else ""
        refuse(f"brightness must be in [0, {largest}]{unit}, got {brightness!r}")
    return brightness / scale


def _parse_contrast(contrast: Sequence[int | float] | None) -> tuple[float, float] | None:
    if contrast is None:
        return None
    if len(contrast) != 2 or not 0 <= contrast[0] <= contrast[1] < float("inf"):
        refuse(f"contrast must be null or [lowest, highest] with 0 <= lowest <= highest, got {contrast!r}")
    return (float(contrast[0]), float(contrast[1]))
