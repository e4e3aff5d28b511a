"""A few images, clean and attacked by FGSM, for the figure of `study=attacks`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from capsexp.analysis.attack.attacker import classify
from capsexp.analysis.attack.figures import Example
from capsexp.analysis.attack.methods import fgsm
from capsexp.analysis.attack.units import Scale, Units, as_pixels, radii_of, scale_of
from capsexp.capsules import Batch


class CleanImage(NamedTuple):
    """An image, as a batch of one, and the gradient of the loss there."""

    batch: Batch
    input_gradient: Float[Tensor, "1 C H W"]


def pick(
    images: dict[int, CleanImage],
    batch: Batch,
    correct: Bool[Tensor, " B"],
    input_gradient: Float[Tensor, "B C H W"],
    *,
    count: int,
) -> None:
    """Add the first correct image of each class to `images`, by class, until there are `count`."""
    for place in correct.nonzero().flatten().tolist():
        if len(images) < count:
            image = batch.take(slice(place, place + 1))
            images.setdefault(int(image.labels), CleanImage(image, input_gradient[place : place + 1]))


def attack_image(
    model: nn.Module, image: CleanImage, epsilons: Sequence[int | float], *, units: Units, clip: bool
) -> Example:
    """Attack one image by FGSM with several radii."""
    batch = image.batch
    scale = scale_of(batch)
    balls = radii_of(batch, scale, epsilons, units=units, clip=clip).balls
    images = torch.cat([batch.images, *(fgsm(image.input_gradient, ball) for ball in balls)])
    scales = Scale(*(values.expand(len(images)) for values in scale))
    predictions = classify(model, images).tolist()
    return Example(int(batch.labels), predictions, as_pixels(images, scales))
