"""Small image files of all kinds."""

import struct
import zlib

import numpy as np
from PIL import Image

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
"""6 rows of 8 values 0 … 235."""


def save(path, pixels, mode=None, **options):
    """Write an array as an image file; its ending chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def with_alpha(color, alpha):
    """An RGBA array of one color whose shape is in its alpha channel."""
    return np.dstack([np.full_like(alpha, part) for part in color] + [alpha])


def write_classes(root, pixels=RAMP, *, classes=("a", "b"), count=4, ending="png", **options):
    """Write the same image several times into each class folder."""
    for name in classes:
        for number in range(count):
            save(root / name / f"{number}.{ending}", pixels, **options)
    return root


def write_noise(root, classes, *, count):
    """Write random images of 8x8 into each class folder, all different."""
    for label, name in enumerate(classes):
        for number in range(count):
            pixels = np.random.default_rng([label, number]).integers(0, 256, (8, 8), dtype=np.uint8)
            save(root / name / f"{number}.png", pixels)
    return root


def png_of_16_bits(path, pixels):
    """Write colors of 16 bits, which Pillow cannot write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )
    return path
