"""A sheet of small images with a few words below each, for a page 700 pixels wide."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

WIDTH = 700
SIDE = 56
"""Pixels to which the side of an image is enlarged, by the nearest whole factor."""
GAP, LINE, FONT_SIZE = 8, 15, 12


class Tile(NamedTuple):
    """An image and the lines below it."""

    pixels: UInt8[np.ndarray, "H W 3"]
    lines: tuple[str, ...]


def draw(tiles: Sequence[Tile], title: str) -> Image.Image:
    """Draw tiles in rows, from left to right, below a title.

    Args:
        tiles: at least one.
        title: one line.
    """
    font = _font()
    images = [_enlarged(tile.pixels) for tile in tiles]
    longest = max(font.getlength(line) for tile in tiles for line in tile.lines)
    width = GAP + max(max(image.width for image in images), round(longest))
    height = GAP + max(image.height for image in images) + LINE * max(len(tile.lines) for tile in tiles)
    columns = max(1, min(len(tiles), (WIDTH - GAP) // width))
    rows = -(-len(tiles) // columns)
    across = max(GAP + columns * width, 2 * GAP + round(font.getlength(title)))
    sheet = Image.new("RGB", (across, 2 * GAP + LINE + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP // 2), title, fill="black", font=font)
    for place, (tile, image) in enumerate(zip(tiles, images, strict=True)):
        left, top = GAP + place % columns * width, 2 * GAP + LINE + place // columns * height
        sheet.paste(image, (left, top))
        for number, line in enumerate(tile.lines):
            pen.text((left, top + image.height + number * LINE), line, fill="black", font=font)
    return sheet


def _enlarged(pixels: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
    image = Image.fromarray(pixels)
    factor = max(1, round(SIDE / image.height))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _font() -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    # Its letters include the arrow; those of Pillow's own font do not.
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), FONT_SIZE)
