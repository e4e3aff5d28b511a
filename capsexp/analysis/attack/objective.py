"""What an attack maximizes: the loss that the network was trained with, or the margin between two scores."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.analysis.attack.methods import Objective
from capsexp.capsules import Batch, Output
from capsexp.schedule import Step

ObjectiveFactory = Callable[[Batch, Int[Tensor, " B"] | None], Objective]
"""Takes a batch and the target classes (None: any class but the label); returns what to maximize."""


def own_loss(
    model: nn.Module, loss: Callable[[Output, Batch, Step], dict[str, Tensor]], step: Step
) -> ObjectiveFactory:
    """Return the run's loss at a step, without reconstruction. Weight decay has no gradient by the image.

    A spread loss is flat where its margin is met, and so is a margin loss: there its gradient is zero.
    """

    def factory(batch: Batch, targets: Int[Tensor, " B"] | None) -> Objective:
        targeted = batch if targets is None else batch._replace(labels=targets)

        def objective(images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
            output = model(images, targeted.labels)._replace(reconstruction=None)
            total = torch.stack(list(loss(output, targeted, step).values())).sum()
            total = total * len(images)  # a loss is a mean over its images
            return total if targets is None else -total

        return objective

    return factory


def score_margin(model: nn.Module) -> ObjectiveFactory:
    """Return the best wrong score minus the right one; with targets, the target's minus the best other one.

    f6 of Carlini and Wagner (2017) without its hinge, on the network's scores. Where an
    activation has saturated to exactly 0 or 1, its gradient is still zero.
    """

    def factory(batch: Batch, targets: Int[Tensor, " B"] | None) -> Objective:
        classes = batch.labels if targets is None else targets

        def objective(images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
            scores = model(images, classes).scores
            is_chosen = F.one_hot(classes, scores.shape[1]).bool()
            others = scores.masked_fill(is_chosen, -torch.inf).amax(1)
            margin = (others - scores[is_chosen]).sum()
            return margin if targets is None else -margin

        return objective

    return factory
