"""Affine transforms of whole sets of pictures, and places on a canvas where no ink is lost.

A point of a picture is (x, y), right and down, in pixels from the picture's centre.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsexp.data.preprocess import windows
from capsexp.errors import DataError

CHUNK = 512
"""Images transformed at a time, so that a whole set is never in memory as coordinates."""


def matrices(
    angles: Float64[Tensor, " N"], shears: Float64[Tensor, " N"], scales: Float64[Tensor, "N 2"]
) -> Float64[Tensor, "N 2 2"]:
    """Where points go: first scaled, then sheared, then turned.

    Args:
        angles: degrees, counter-clockwise as one looks at the picture.
        shears: 0.2 moves the top of an upright stroke to the right by 0.2 of its height.
        scales: along x and y; 2 is twice as large.
    """
    cos, sin = angles.deg2rad().cos(), angles.deg2rad().sin()
    one, nothing = torch.ones_like(cos), torch.zeros_like(cos)
    turn = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)
    lean = torch.stack([one, -shears, nothing, one], dim=1).view(-1, 2, 2)
    return turn @ lean @ torch.diag_embed(scales)


def apply_affine(
    images: UInt8[Tensor, "N C H W"], moves: Float64[Tensor, "N 2 2"]
) -> UInt8[Tensor, "N C h w"]:
    """Pictures after their transforms about their centres, bilinear, on a canvas that loses nothing.

    The canvas is the picture with equal margins, so that what is not moved keeps its pixels exactly.
    """
    height, width = images.shape[2:]
    half = torch.tensor([width, height], dtype=torch.float64) / 2
    # Half a pixel more on each side is as far as bilinear interpolation can see the outermost ink.
    reach = (moves.abs() @ (half + 0.5)).amax(0) - half
    margin = max(0, math.ceil(reach.max()))
    size = [len(images), images.shape[1], height + 2 * margin, width + 2 * margin]
    # In units in which a picture, or the canvas, reaches from -1 to 1.
    back = torch.diag(1 / half) @ moves.inverse() @ torch.diag(half + margin)
    grid = F.affine_grid(F.pad(back, (0, 1)), size, align_corners=False)
    sampled = F.grid_sample(images.double(), grid, mode="bilinear", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def random_placement(
    images: UInt8[Tensor, "N C H W"], canvas: int, chance: Float64[Tensor, "N 2"]
) -> UInt8[Tensor, "N C h w"]:
    """Each picture's ink at one of the places on a square canvas that hold all of it, all as likely.

    Args:
        images: black where there is no ink.
        canvas: side in pixels.
        chance: in [0, 1), down and right: which of the places.

    Raises:
        DataError: ink that is larger than the canvas.
    """
    inked = (images > 0).any(1)
    corners = [_corner(inked.any(axis), canvas, chance[:, way]) for way, axis in enumerate((2, 1))]
    return windows(F.pad(images, [canvas] * 4), torch.stack(corners, dim=1) + canvas, canvas, canvas)


def _corner(inked: Tensor, canvas: int, chance: Float64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """Along one axis, where the canvas begins, given which lines have ink."""
    first = inked.byte().argmax(1)
    last = inked.shape[1] - 1 - inked.flip(1).byte().argmax(1)
    places = canvas - torch.where(inked.any(1), last - first, 0)
    if (places < 1).any():
        largest, too_large = int(canvas - places.min()) + 1, int((places < 1).sum())
        raise DataError(
            f"{too_large} of {len(places)} pictures do not fit on the canvas of {canvas}x{canvas}: ink of up "
            f"to {largest} pixels; choose a larger canvas or smaller ranges"
        )
    return first - (chance * places).long()


def randomly_transformed(
    images: UInt8[Tensor, "N C H W"],
    *,
    rotation: int | float,
    shear: int | float,
    scale: Sequence[int | float],
    canvas: int,
    seed: int,
) -> UInt8[Tensor, "N C h w"]:
    """Every image transformed at random, then put at a random place.

    Args:
        images: black where there is no ink.
        rotation: largest angle to either side, in degrees.
        shear: largest shear to either side; see `matrices`.
        scale: smallest and largest factor, drawn for x and y apart.
        canvas: side of the square that the picture is put on.
        seed: of the draws, six for each picture.

    Raises:
        DataError: ink that is larger than the canvas.
    """
    chance = torch.rand(len(images), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sides = 2 * chance - 1
    scales = scale[0] + (scale[1] - scale[0]) * chance[:, 2:4]
    moves = matrices(rotation * sides[:, 0], shear * sides[:, 1], scales)
    pieces = zip(images.split(CHUNK), moves.split(CHUNK), chance[:, 4:].split(CHUNK), strict=True)
    return torch.cat(
        [random_placement(apply_affine(some, move), canvas, place) for some, move, place in pieces]
    )
