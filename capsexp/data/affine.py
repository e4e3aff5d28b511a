"""Affine transforms of whole datasets, and placement on a canvas without losing ink.

A point of an image is (x, y), right and down, in pixels from the image's center. Ink is every pixel above 0.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsexp.data.image_ops import crop_at, require_bytes
from capsexp.errors import DataError

CHUNK = 512
"""Images transformed at a time, so that a whole dataset is never in memory as coordinates."""


def affine_matrices(
    angles: Float64[Tensor, " N"], shears: Float64[Tensor, " N"], scales: Float64[Tensor, "N 2"]
) -> Float64[Tensor, "N 2 2"]:
    """Return matrices that scale points, then shear, then rotate them.

    Args:
        angles: degrees, counter-clockwise as seen by the viewer.
        shears: 0.2 moves the top of an upright stroke to the right by 0.2 of its height.
        scales: along x and y; 2 doubles the size.
    """
    cos, sin = angles.deg2rad().cos(), angles.deg2rad().sin()
    ones, zeros = torch.ones_like(cos), torch.zeros_like(cos)
    rotation = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)
    shear = torch.stack([ones, -shears, zeros, ones], dim=1).view(-1, 2, 2)
    return rotation @ shear @ torch.diag_embed(scales)


def apply_affine(
    images: UInt8[Tensor, "N C H W"], matrices: Float64[Tensor, "N 2 2"]
) -> UInt8[Tensor, "N C h w"]:
    """Transform images about their centers, bilinearly, on a canvas large enough for all results.

    The canvas is the image with equal margins, so an identity matrix keeps the pixels exactly.

    Raises:
        ValueError: the images are not uint8.
    """
    require_bytes(images)
    height, width = images.shape[2:]
    half = torch.tensor([width, height], dtype=torch.float64) / 2
    # Bilinear interpolation spreads the outermost ink by half a pixel.
    reach = (matrices.abs() @ (half + 0.5)).amax(0) - half
    margin = max(0, math.ceil(reach.max()))
    size = [len(images), images.shape[1], height + 2 * margin, width + 2 * margin]
    # grid_sample's units: the image, and the canvas, reach from -1 to 1.
    inverse = torch.diag(1 / half) @ matrices.inverse() @ torch.diag(half + margin)
    grid = F.affine_grid(F.pad(inverse, (0, 1)), size, align_corners=False)
    sampled = F.grid_sample(images.double(), grid, mode="bilinear", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def random_placement(
    images: UInt8[Tensor, "N C H W"], canvas: int, draws: Float64[Tensor, "N 2"]
) -> UInt8[Tensor, "N C h w"]:
    """Place each image's ink on a square canvas; every position that holds all of it is equally likely.

    Args:
        images: black where there is no ink.
        canvas: side in pixels.
        draws: uniform in [0, 1), down and right; each chooses a position.

    Raises:
        DataError: the ink is larger than the canvas.
    """
    inked = (images > 0).any(1)
    corners = [_corner(inked.any(axis), canvas, draws[:, way]) for way, axis in enumerate((2, 1))]
    return crop_at(F.pad(images, [canvas] * 4), torch.stack(corners, dim=1) + canvas, canvas, canvas)


def _corner(inked: Tensor, canvas: int, draws: Float64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """Return where the canvas begins along one axis, given which lines have ink."""
    first = inked.byte().argmax(1)
    last = inked.shape[1] - 1 - inked.flip(1).byte().argmax(1)
    positions = canvas - torch.where(inked.any(1), last - first, 0)
    if (positions < 1).any():
        largest, too_large = int(canvas - positions.min()) + 1, int((positions < 1).sum())
        raise DataError(
            f"{too_large} of {len(positions)} images do not fit on the canvas of {canvas}x{canvas}: "
            f"ink of up to {largest} pixels; choose a larger canvas or smaller ranges"
        )
    return first - (draws * positions).long()


def random_affine(
    images: UInt8[Tensor, "N C H W"],
    *,
    rotation: int | float,
    shear: int | float,
    scale: Sequence[int | float],
    canvas: int,
    seed: int,
) -> UInt8[Tensor, "N C h w"]:
    """Transform every image at random, then put it at a random position.

    Args:
        images: black where there is no ink.
        rotation: largest angle to either side, in degrees.
        shear: largest shear to either side; see `affine_matrices`.
        scale: smallest and largest factor, drawn for x and y separately.
        canvas: side of the square canvas.
        seed: of the draws, six for each image.

    Raises:
        DataError: the ink is larger than the canvas.
    """
    draws = torch.rand(len(images), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    signed = 2 * draws - 1
    scales = scale[0] + (scale[1] - scale[0]) * draws[:, 2:4]
    matrices = affine_matrices(rotation * signed[:, 0], shear * signed[:, 1], scales)
    chunks = zip(images.split(CHUNK), matrices.split(CHUNK), draws[:, 4:].split(CHUNK), strict=True)
    return torch.cat(
        [random_placement(apply_affine(chunk, matrix), canvas, draw) for chunk, matrix, draw in chunks]
    )
