"""FGSM, BIM and PGD: small changes of images that raise an objective.

An objective is a sum over a batch of one value per image, so its gradient holds each image's own gradient.
The attacker raises it: the loss for the label, or minus the loss for a target class.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capsexp.data.seeds import derive_seed

Objective = Callable[[Float[Tensor, "B C H W"]], Float[Tensor, ""]]


class Ball:
    """Where an attack may move each image: within a distance in every number, and within bounds.

    Args:
        images: the centers.
        radius: epsilon of each image, in the units of the images.
        low, high: bounds of each image; infinite for none.
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

    def project(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return the nearest point of each image's ball."""
        return torch.minimum(torch.maximum(images, self._lowest), self._highest)

    def select(self, mask: Bool[Tensor, " B"]) -> "Ball":
        """Return the balls of some of the images."""
        low, high = self.low[mask], self.high[mask]
        return Ball(self.images[mask], self.radius[mask], low=low, high=high)


def gradient(objective: Objective, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Return the gradient of the objective by the images; each image's own."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        # An objective that does not depend on the images is an error here, not a gradient of zero.
        (result,) = torch.autograd.grad(objective(images), images)
    return result


def fgsm(input_gradient: Float[Tensor, "B C H W"], ball: Ball) -> Float[Tensor, "B C H W"]:
    """Fast gradient sign method: one step to the edge of the ball.

    Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples" (ICLR 2015).
    Differs from it in: nothing. A number whose gradient is exactly zero does not change.

    Args:
        input_gradient: the `gradient` at the centers; it serves balls of every radius.
        ball: where the step ends.
    """
    return ball.project(ball.images + ball.radius * input_gradient.sign())


def bim(objective: Objective, ball: Ball, *, steps: int) -> Float[Tensor, "B C H W"]:
    """Basic iterative method: steps of radius / steps along the sign of the gradient.

    Kurakin, Goodfellow, Bengio, "Adversarial examples in the physical world" (2016).
    Differs from it in: number and size of the steps; the paper takes min(eps + 4, 1.25 eps) steps of 1/255.
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
    """Projected gradient descent: BIM from a random start, with steps projected back into the ball.

    Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018).
    Differs from it in: nothing.

    Args:
        objective: what to raise.
        ball: every step ends inside it.
        noise: the start relative to the center, in [-1, 1], in radii.
        steps: number of steps.
        step_size: of one step, in radii.
    """
    start = ball.project(ball.images + ball.radius * noise)
    return _climb(objective, ball, start, steps=steps, step=ball.radius * step_size)


def starts(indices: Int[Tensor, " B"], like: Float[Tensor, "B C H W"], *, seed: int, restart: int) -> Tensor:
    """Return uniform noise in [-1, 1] for each image. It depends on the image's index, not on the batch."""
    generator, draws = torch.Generator(), []
    for index in indices.tolist():
        generator.manual_seed(derive_seed(seed, index, restart, "attack"))
        draws.append(torch.rand(like.shape[1:], generator=generator))
    return (torch.stack(draws) * 2 - 1).to(like)


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
        images = ball.project(images + step * gradient(objective, images).sign())
    return images
