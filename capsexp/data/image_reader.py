"""Decode the images of a split in threads, and look at them before anything is trained on."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from capsexp.data.decode import Reading, decode
from capsexp.data.preprocess import Preprocess, Shape
from capsexp.data.threads import try_files
from capsexp.errors import DataError


class ReadImages(NamedTuple):
    """The images of some files."""

    images: UInt8[Tensor, "N C H W"]
    """Empty if they are not kept; without meaning if there are problems."""
    problems: list[str]
    """A line for each file that cannot be decoded."""
    contrast: int
    """The largest difference of two bytes of one channel in one image."""
    plain: dict[str, tuple[int, ...]]
    """The files that show one color, and that color."""
    digests: dict[bytes, str]
    """The other files by a hash of their pixels; of equal ones the last."""


def read_images(
    paths: Sequence[str], shape: Shape, reading: Reading, preprocess: Preprocess, *, keep: bool
) -> ReadImages:
    """Decode files, each resized at once: all at their size on disk may not fit into memory.

    Args:
        paths: the files.
        shape: of each image in memory.
        reading: of the set that they belong to.
        preprocess: its `resize` is applied.
        keep: whether to return the images. Without it, they are only looked at.
    """
    images = _empty(len(paths) if keep else 0, shape)

    def read(place: int) -> tuple[int, tuple[int, ...] | bytes]:
        """Decode an image; return its contrast, and its color if it has only one, or a hash of its pixels."""
        image = decode(paths[place], shape[0], reading)
        small = preprocess.resize_all(image[None])[0]
        if tuple(small.shape) != shape:
            sizes = (f"{height}x{width}" for _, height, width in (tuple(small.shape), shape))
            raise DataError(f"{paths[place]} has another size than the other images: {' and '.join(sizes)}")
        if keep:
            images[place] = small
        lowest, highest = image.amin((1, 2)), image.amax((1, 2))
        contrast = int((highest - lowest).max())
        if contrast == 0:
            return 0, tuple(lowest.tolist())
        return contrast, hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()

    seen, problems = try_files(read, range(len(paths)))
    if problems:
        return ReadImages(images, problems, 0, {}, {})
    by_path = {path: content for path, (_, content) in zip(paths, seen, strict=True)}
    return ReadImages(
        images,
        problems,
        max((contrast for contrast, _ in seen), default=0),
        plain={path: content for path, content in by_path.items() if isinstance(content, tuple)},
        digests={content: path for path, content in by_path.items() if isinstance(content, bytes)},
    )


def _empty(count: int, shape: Shape) -> UInt8[Tensor, "N C H W"]:
    try:
        return torch.empty((count, *shape), dtype=torch.uint8)
    except RuntimeError:  # torch raises it if the memory is not there
        size = "x".join(map(str, shape))
        raise DataError(
            f"{count:,} images of {size} need {count * math.prod(shape) / 2**30:.1f} GiB of memory; there is "
            "less: make them smaller with dataset.preprocess.resize=SIZE"
        ) from None
