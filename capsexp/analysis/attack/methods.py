"""FGSM, BIM and PGD: small changes of pictures that raise an objective.

An objective is a sum over a batch of one value for each picture, so that its gradient holds each picture's
own. The attacker raises it: the loss for the right class, or minus the loss for a class that is aimed at.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capsexp.data.seeds import derive_seed

Objective = Callable[[Float[Tensor, "B C H W"]], Float[Tensor, ""]]


class Ball:
    """Where an attack may take each picture: within a distance in every number, and within bounds.

    Args:
        images: the middle.
        radius: epsilon of each picture, in the units of the images.
        low, high: bounds of each picture; infinite for none.
    """

    def __init__(
        self,
        images: Float[Tensor, "B C H W"],
        radius: Float[Tensor, "B 1 1 1"],
        *,
        low: Float[Tensor, "B 1 1 1"],
        high: Float[Tensor, "B 1 1 1"],
    ) -> None:
        self.images, self.radius, self.low, self.high = images, radius, low, high
        self._lowest = torch.maximum(images - radius, low)
        self._highest = torch.minimum(images + radius, high)

    def nearest(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """For each picture the point of its ball that is nearest."""
        return torch.minimum(torch.maximum(images, self._lowest), self._highest)

    def of(self, chosen: Bool[Tensor, " B"]) -> "Ball":
        """The balls of some of the pictures."""
        low, high = self.low[chosen], self.high[chosen]
        return Ball(self.images[chosen], self.radius[chosen], low=low, high=high)


def gradient(objective: Objective, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Of the objective by the pictures; each picture's own."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        # An objective that is cut off from the pictures is an error here, not a gradient of zero.
        (found,) = torch.autograd.grad(objective(images), images)
    return found


def fgsm(slope: Float[Tensor, "B C H W"], ball: Ball) -> Float[Tensor, "B C H W"]:
    """The fast gradient sign method: one step as far as the ball goes.

    Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples" (ICLR 2015).
    Differs from it in: nothing. A number whose gradient is exactly zero stays as it is.

    Args:
        slope: the `gradient` at the pictures, which serves balls of every size.
        ball: where the step ends.
    """
    return ball.nearest(ball.images + ball.radius * slope.sign())


def bim(objective: Objective, ball: Ball, *, steps: int) -> Float[Tensor, "B C H W"]:
    """The basic iterative method: steps of radius / steps along the sign of the gradient.

    Kurakin, Goodfellow, Bengio, "Adversarial examples in the physical world" (2016).
    Differs from it in: number and size of the steps, there min(eps + 4, 1.25 eps) steps of 1/255.
    """
    return _climb(objective, ball, ball.images, steps=steps, step=ball.radius / steps)


def pgd(
    objective: Objective,
    ball: Ball,
    *,
    noise: Float[Tensor, "B C H W"],
    steps: int,
    step_size: int | float,
) -> Float[Tensor, "B C H W"]:
    """Projected gradient descent: BIM from another start, with steps that may bounce off the ball.

    Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018).
    Differs from it in: nothing.

    Args:
        objective: what is raised.
        ball: its every step ends inside.
        noise: the start, in [-1, 1], in radii from the middle.
        steps: their number.
        step_size: of one step, in radii.
    """
    start = ball.nearest(ball.images + ball.radius * noise)
    return _climb(objective, ball, start, steps=steps, step=ball.radius * step_size)


def starts(indices: Int[Tensor, " B"], like: Float[Tensor, "B C H W"], *, seed: int, restart: int) -> Tensor:
    """Uniform noise in [-1, 1] for each picture by its index, so that no other picture has a say in it."""
    generator, drawn = torch.Generator(), []
    for index in indices.tolist():
        generator.manual_seed(derive_seed(seed, index, restart, "attack"))
        drawn.append(torch.rand(like.shape[1:], generator=generator))
    return (torch.stack(drawn) * 2 - 1).to(like)


def _climb(
    objective: Objective,
    ball: Ball,
    images: Float[Tensor, "B C H W"],
    *,
    steps: int,
    step: Float[Tensor, "B 1 1 1"],
) -> Float[Tensor, "B C H W"]:
    if not ball.radius.any():
        return ball.images
    for _ in range(steps):
        images = ball.nearest(images + step * gradient(objective, images).sign())
    return images
