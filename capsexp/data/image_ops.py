"""Operations on batches of images."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

ShiftFill = Literal["zeros", "edge"]


def random_windows(
    images: UInt8[Tensor, "B C H W"],
    height: int,
    width: int,
    *,
    shift: int,
    fill: ShiftFill,
    generator: torch.Generator,
) -> UInt8[Tensor, "B C h w"]:
    """Shift each image by integers in -shift … shift, and cut a random window out of it."""
    # A shift followed by a crop is one window of the padded image.
    count, margin = len(images), torch.full((len(images), 2), shift)
    shifts = torch.randint(-shift, shift + 1, (count, 2), generator=generator)
    room = (images.shape[2] - height + 1, images.shape[3] - width + 1)
    crops = [torch.randint(n, (count,), generator=generator) for n in room]
    corners = margin - shifts + torch.stack(crops, dim=1)
    padded = F.pad(images, [shift] * 4) if fill == "zeros" else repeat_edges(images, shift)
    return crop_at(padded, corners, height, width)


def repeat_edges(images: UInt8[Tensor, "B C H W"], margin: int) -> UInt8[Tensor, "B C h w"]:
    """Pad images on each side with their outermost pixels."""
    rows, columns = (
        torch.arange(-margin, side + margin, device=images.device).clamp(0, side - 1)
        for side in images.shape[2:]
    )
    return images.index_select(2, rows).index_select(3, columns)


def crop_at(
    images: UInt8[Tensor, "B C H W"], corners: Int[Tensor, "B 2"], height: int, width: int
) -> UInt8[Tensor, "B C h w"]:
    """Cut a window out of each image, given the window's top left corner (row, column)."""
    corners = corners.to(images.device)
    views = images.unfold(2, height, 1).unfold(3, width, 1)
    return views[torch.arange(len(images), device=images.device), :, corners[:, 0], corners[:, 1]]


def mirror(
    images: UInt8[Tensor, "B C H W"], chosen: Bool[Tensor, " B"], *, swap_channels: bool = False
) -> UInt8[Tensor, "B C H W"]:
    """Mirror the chosen images left to right; `swap_channels` also reverses the order of their channels."""
    mirrored = images.flip(1, 3) if swap_channels else images.flip(3)
    return torch.where(chosen.to(images.device)[:, None, None, None], mirrored, images)


def uniform_per_image(
    low: int | float, high: int | float, like: Float[Tensor, "B C H W"], generator: torch.Generator
) -> Float[Tensor, "B 1 1 1"]:
    """Draw one number per image on the CPU; return them on the device of `like`."""
    draws = torch.rand(len(like), generator=generator) * (high - low) + low
    return draws.to(like.device)[:, None, None, None]


def standardise(
    pixels: Float[Tensor, "B C h w"], whole: Float[Tensor, "B C H W"], *, each_channel: bool = False
) -> Float[Tensor, "B C h w"]:
    """Subtract the mean of the whole images from their windows and divide by their standard deviation.

    Args:
        pixels: the windows.
        whole: the images.
        each_channel: mean and deviation of each channel by itself, instead of over all channels.
    """
    axes = (2, 3) if each_channel else (1, 2, 3)
    mean = whole.mean(dim=axes, keepdim=True)
    # torch.std_mean is ten times slower here.
    deviation = (whole - mean).square().mean(dim=axes, keepdim=True).sqrt()
    # Keeps a constant image finite. The same floor as on the scale 0 … 255.
    floor = 1 / (255 * (whole[0].numel() // deviation[0].numel()) ** 0.5)
    return (pixels - mean) / deviation.clamp_min(floor)


def to_unit(images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Convert bytes to floats in [0, 1].

    Raises:
        ValueError: the images are not uint8.
    """
    require_bytes(images)
    return images.to(torch.float32).div_(255)


def require_bytes(images: Tensor) -> None:
    """Refuse images that are not bytes: as bytes, floats in [0, 1] would be black.

    Raises:
        ValueError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images must be uint8, got {dtype_name(images)}; convert floats in [0, 1] with as_uint8_images"
        )


def resized(images: UInt8[Tensor, "N C H W"], size: tuple[int, int]) -> UInt8[Tensor, "N C h w"]:
    """Resize images, antialiased.

    Raises:
        ValueError: the images are not uint8.
    """
    require_bytes(images)
    result = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return result.round_().clamp_(0, 255).to(torch.uint8)


def dtype_name(images: Tensor) -> str:
    """Return the dtype without torch's prefix, such as `uint8`."""
    return str(images.dtype).removeprefix("torch.")


def displayable(images: Float[Tensor, "*N C H W"]) -> Float[Tensor, "*N D H W"]:
    """Return gray or color images unchanged; with other channel counts, as of stereo, the first channel."""
    return images if images.shape[-3] in (1, 3) else images[..., :1, :, :]
