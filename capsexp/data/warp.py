"""Random smooth deformations of training images: affine maps and elastic ones, in one interpolation."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsexp.data.affine import affine_matrices
from capsexp.data.image_ops import ShiftFill, require_bytes
from capsexp.errors import refuse, require_in

ELASTIC_POINTS = 5
"""Control points of an elastic deformation along each axis, from edge to edge."""

PADDING = {"zeros": "zeros", "edge": "border"}
"""Names of `ShiftFill` in `grid_sample`."""


class Warp(NamedTuple):
    """Ranges of a random deformation about the center of an image; all channels are deformed alike.

    A deformation scales, then shears, then rotates the image, and then moves its points by a smooth random
    field. The field moves each of 5 x 5 control points by its own uniform offsets; the points between follow
    by bicubic interpolation.
    """

    rotation: float = 0
    """Largest angle to either side, in degrees."""
    scale: tuple[float, float] = (1, 1)
    """Smallest and largest factor, drawn for width and height separately."""
    shear: float = 0
    """Largest horizontal shear to either side: 0.2 moves the top by 0.2 of its height."""
    elastic: float = 0
    """Largest offset of a control point along each axis, in pixels."""

    @classmethod
    def parse(
        cls,
        *,
        rotation: int | float,
        scale: Sequence[int | float] | None,
        shear: int | float,
        elastic: int | float,
    ) -> "Warp":
        """Check settings and return their deformation; None for no change of scale.

        Raises:
            ValueError: an angle outside [0, 180], a negative shear or offset, or scales that are not two
                numbers with 0 < smallest <= largest.
        """
        require_in("[0, 180]", rotation=rotation)
        require_in("[0, inf)", shear=shear, elastic=elastic)
        factors = (1, 1) if scale is None else tuple(scale)
        if len(factors) != 2 or not 0 < factors[0] <= factors[1] < float("inf"):
            refuse(f"scale must be null or [lowest, highest] with 0 < lowest <= highest, got {scale!r}")
        return cls(float(rotation), (float(factors[0]), float(factors[-1])), float(shear), float(elastic))

    def apply(
        self, images: UInt8[Tensor, "B C H W"], *, fill: ShiftFill, generator: torch.Generator
    ) -> UInt8[Tensor, "B C H W"]:
        """Deform each image by its own draws from a CPU generator, bilinearly, on a canvas of its size.

        Args:
            images: the images.
            fill: what comes in from outside of an image: zeros, or the outermost pixels, repeated.
            generator: of the draws; none are made where all ranges are empty.

        Raises:
            ValueError: the images are not uint8.
        """
        require_bytes(images)
        if self == Warp():
            return images
        draws = torch.rand(len(images), 4, generator=generator, dtype=torch.float64)
        grid = self._affine_grid(images, draws).to(images.device)
        if self.elastic:
            shape = (len(images), 2, ELASTIC_POINTS, ELASTIC_POINTS)
            grid = grid + self._elastic_grid(images, torch.rand(shape, generator=generator)).to(images.device)
        sampled = F.grid_sample(images.float(), grid, padding_mode=PADDING[fill], align_corners=False)
        return sampled.round_().clamp_(0, 255).to(torch.uint8)

    def _affine_grid(self, images: Tensor, draws: Tensor) -> Float[Tensor, "B H W 2"]:
        """Where each pixel comes from under the affine part, in units of `grid_sample`."""
        signed = 2 * draws - 1
        scales = self.scale[0] + (self.scale[1] - self.scale[0]) * draws[:, 2:]
        matrices = affine_matrices(self.rotation * signed[:, 0], self.shear * signed[:, 1], scales)
        half = torch.tensor([images.shape[3], images.shape[2]], dtype=torch.float64) / 2
        inverse = torch.diag(1 / half) @ matrices.inverse() @ torch.diag(half)
        return F.affine_grid(F.pad(inverse, (0, 1)).float(), list(images.shape), align_corners=False)

    def _elastic_grid(self, images: Tensor, draws: Tensor) -> Float[Tensor, "B H W 2"]:
        """The offsets of the elastic part, in units of `grid_sample`."""
        height, width = images.shape[2:]
        points = (2 * draws - 1) * torch.tensor([2 * self.elastic / width, 2 * self.elastic / height])[
            :, None, None
        ]
        return (_interpolation(height) @ points @ _interpolation(width).T).permute(0, 2, 3, 1)


@cache
def _interpolation(side: int) -> Float[Tensor, "S 5"]:
    """Return the matrix of bicubic interpolation from control points to pixels."""
    points = torch.eye(ELASTIC_POINTS)[None, None]
    size = (side, ELASTIC_POINTS)
    return F.interpolate(points, size, mode="bicubic", align_corners=True)[0, 0]
