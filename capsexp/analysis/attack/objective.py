"""What an attack raises: the loss that the network was trained with, or the gap between two scores."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.analysis.attack.methods import Objective
from capsexp.capsules import Batch, Output
from capsexp.schedule import Step

Aim = Callable[[Batch, Int[Tensor, " B"] | None], Objective]
"""From a batch, and the classes aimed at (None: away from the right ones), to what is to be raised."""


def own_loss(model: nn.Module, loss: Callable[[Output, Batch, Step], dict[str, Tensor]], step: Step) -> Aim:
    """The run's loss at a step, without reconstruction; weight decay has no gradient by a picture.

    A spread loss is flat where its margin is kept, and so is a margin loss: there its gradient is zero.
    """

    def aim(batch: Batch, targets: Int[Tensor, " B"] | None) -> Objective:
        aimed = batch if targets is None else batch._replace(labels=targets)

        def objective(images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
            output = model(images, aimed.labels)._replace(reconstruction=None)
            total = torch.stack(list(loss(output, aimed, step).values())).sum()
            total = total * len(images)  # a loss is a mean over its pictures
            return total if targets is None else -total

        return objective

    return aim


def difference(model: nn.Module) -> Aim:
    """The best wrong score less the right one, or that of the class aimed at less the best other one.

    f6 of Carlini and Wagner (2017) without its hinge, and on whatever the network's scores are. Where an
    activation has saturated to exactly 0 or 1, the gradient is zero all the same.
    """

    def aim(batch: Batch, targets: Int[Tensor, " B"] | None) -> Objective:
        chosen = batch.labels if targets is None else targets

        def objective(images: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
            scores = model(images, chosen).scores
            is_chosen = F.one_hot(chosen, scores.shape[1]).bool()
            others = scores.masked_fill(is_chosen, -torch.inf).amax(1)
            gap = (others - scores[is_chosen]).sum()
            return gap if targets is None else -gap

        return objective

    return aim
