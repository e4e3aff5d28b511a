"""Read one image file: its header, its range of values, and its pixels as bytes.

Files are only read, never written. Pillow gets a list of formats, because some of its other formats start a
program (Ghostscript for EPS) or accept nearly every file.
"""

import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from capsexp.errors import DataError, first_line

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
CAMERA_FORMATS = {"JPEG", "MPO", "TIFF", "WEBP"}
"""Formats whose EXIF orientation is applied. A PNG may have EXIF data after its pixels."""

GRAY_MODES = {"1", "L", "LA", "La"}
COLOR_MODES = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
ORIENTATION = 0x0112
"""EXIF tag; the values 5 … 8 swap height and width."""

Background = Literal["white", "black"]
FULL_SCALES = (1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16, 24, 32)))
"""Values that can be white. The smallest that no image of a set exceeds is taken."""

OVERSHOOT = 0.1
"""Share of white by which floating-point values may leave 0 … white, as they do after interpolation."""

FAR_ABOVE = 2
"""Times white."""

AMBIGUOUS_BELOW = 16
"""Floating-point values that exceed 1, but not this, are neither parts of 1 nor bytes."""


PixelKind = Literal["byte", "whole", "float", "upper"]
"""Bytes; whole numbers or floats of which `Reading` says the white; colors of which Pillow reads the upper 8
of 16 bits."""


class Reading(NamedTuple):
    """How the images of a set become bytes, the same for all of them."""

    white: int | float | None = None
    """Value of white in gray images of 16 or 32 bits; None: from each image's own largest value."""
    float_white: int | float | None = None
    """Value of white in floating-point images; None: from each image's own largest value."""
    background: Background = "white"
    """What is behind transparent pixels."""

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Reading":
        """Return the reading whose `_asdict()` was stored.

        Raises:
            ValueError: these are other values.
        """
        reading = cls(**{key: values[key] for key in cls._fields if key in values})
        for white in reading[:2]:
            if white is not None and (not isinstance(white, int | float) or not 0 < white < math.inf):
                raise ValueError(f"white must be a number > 0, got {white!r}")
        if reading.background not in get_args(Background):
            raise ValueError(f"background must be white or black, got {reading.background!r}")
        return reading


BY_ITSELF = Reading()
"""Reads an image that belongs to no set: by its own largest value, on white."""


class Header(NamedTuple):
    """What is known of an image before a reading is chosen."""

    is_gray: bool
    height: int
    width: int
    pixels: PixelKind
    largest: int | float = 255
    """The largest value; of bytes it is not measured."""
    contrasts: tuple[int, int] | None = None
    """Of an image with transparent areas: largest minus smallest byte, on white and on black."""


def full_scale(largest: int | float, pixels: PixelKind, path: str) -> int | float:
    """Return the value of white for a set of images whose largest value this is.

    Raises:
        DataError: floating-point values do not show it; the message names the file of the largest value.
    """
    if pixels == "float" and largest <= 1 + OVERSHOOT:
        return 1
    if pixels == "float" and largest < AMBIGUOUS_BELOW:
        raise DataError(
            f"{path} has floating-point values up to {largest:g}, which do not show what is white: convert "
            "it to 8 bits, or set dataset.white_level"
        )
    return next((scale for scale in FULL_SCALES if largest <= scale), FULL_SCALES[-1])


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore Pillow's warnings about metadata and size. Not thread-safe: enter it around the threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_header(path: str) -> Header:
    """Read mode and size; also the pixels, if their range or their background matters.

    Raises:
        DataError: the file cannot be read as an image.
    """
    with _opened(path, "cannot be read as an image") as image:
        (width, height), mode = image.size, image.mode
        if image.format in CAMERA_FORMATS and image.getexif().get(ORIENTATION, 1) >= 5:
            width, height = height, width
        kind = _pixel_kind(image, path)
        header = Header(kind in ("whole", "float") or mode in GRAY_MODES, height, width, kind)
        if kind in ("whole", "float"):
            return header._replace(largest=float(_values(image, path).max()))
        if kind == "upper":
            header = header._replace(largest=float(np.asarray(image.convert("RGB")).max()))
        if image.has_transparency_data:
            header = header._replace(contrasts=(_contrast(image, "white"), _contrast(image, "black")))
        return header


def decode(path: str, channels: int, reading: Reading = BY_ITSELF) -> UInt8[Tensor, "C H W"]:
    """Read an image file as bytes.

    Args:
        path: the file.
        channels: 1 or 3.
        reading: of the set that the image belongs to.

    Raises:
        DataError: the file cannot be decoded, or its values do not fit the reading.
    """
    with _opened(path, "is damaged and cannot be decoded") as image:
        upright = ImageOps.exif_transpose(image) if image.format in CAMERA_FORMATS else image
        kind = _pixel_kind(image, path)
        if kind in ("whole", "float"):
            white = reading.white if kind == "whole" else reading.float_white
            upright = Image.fromarray(_as_bytes(_values(upright, path), white, path))
        elif image.has_transparency_data:
            upright = _on_background(upright, reading.background)
        if upright.mode == "LAB":  # Pillow does not convert it to L
            upright = upright.convert("RGB")
        pixels = np.array(upright.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


@contextmanager
def _opened(path: str, failure: str) -> Iterator[Image.Image]:
    """Open an image; everything that goes wrong with it becomes a DataError of one line."""
    try:
        with _open_regular(path) as file, Image.open(file, formats=_formats()) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types of errors for a file that it cannot read
        raise DataError(f"{path} {failure}: {_reason(error)}") from error


def _open_regular(path: str) -> BinaryIO:
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise ValueError("it is not a regular file")


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # some are left out of some builds of Pillow


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _pixel_kind(image: Image.Image, path: str) -> PixelKind:
    if image.mode == "F":
        return "float"
    if image.mode.startswith("I"):
        return "whole"
    if image.mode not in GRAY_MODES | COLOR_MODES:
        raise DataError(f"{path} has pixels of mode {image.mode}; convert it to 8 or 16 bits")
    tiles = getattr(image, "tile", None) or []
    return "upper" if any(";16" in str(tile[3]) for tile in tiles) else "byte"


def _values(image: Image.Image, path: str) -> NDArray[Any]:
    """Return the values of a gray image that are no bytes, checked."""
    array = np.asarray(image)
    values = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    if not np.isfinite(values).all():
        raise DataError(f"{path} has pixels that are nan or inf; convert it to 8 or 16 bits")
    if values.min() < (-OVERSHOOT * max(1, values.max()) if array.dtype.kind == "f" else 0):
        raise DataError(f"{path} has negative pixels (down to {values.min():g}); convert it to 8 or 16 bits")
    return values.clip(min=0)


def _as_bytes(values: NDArray[Any], white: int | float | None, path: str) -> NDArray[np.uint8]:
    """Scale values so that white becomes 255: the upper 8 bits of whole numbers, rounded floats.

    Values above white are white. Far above it, the image is of another kind than its set.
    """
    largest = float(values.max())
    if white is None:
        white = full_scale(largest, "float" if values.dtype.kind == "f" else "whole", path)
    if largest > FAR_ABOVE * white:
        raise DataError(f"{path} has values up to {largest:g}, but white is {white:g} in its set of images")
    if white in FULL_SCALES[1:] and values.dtype.kind == "i":
        return (values * 256 // (int(white) + 1)).clip(max=255).astype(np.uint8)
    return np.rint(values * (255 / white)).clip(max=255).astype(np.uint8)


def _on_background(image: Image.Image, background: Background) -> Image.Image:
    if image.mode == "La":  # Pillow converts it only to LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image)


def _contrast(image: Image.Image, background: Background) -> int:
    pixels = np.asarray(_on_background(image, background).convert("RGB"))
    return int(np.ptp(pixels.reshape(-1, 3), axis=0).max())
