"""Spread loss: the activation of every wrong class at least a margin below that of the right one."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.errors import require_in
from capsexp.ops.labels import check_labels
from capsexp.ops.penalty import PenalisedLoss
from capsexp.schedule import Schedule, Step, schedule_in


def spread_loss(
    activations: Float[Tensor, "B J"],
    labels: Int[Tensor, " B"],
    *,
    margin: int | float = 0.9,
    mean_over_classes: bool = False,
) -> Float[Tensor, ""]:
    """Keep the activation of every wrong class a margin below that of the right one.

    Mean over the batch of

        sum_{i != t}  max(0, m - (a_t - a_i))^2

    with t the label. Eq. 3 of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018).
    Differs from it in: nothing. In training the paper raises m from 0.2 to 0.9, which is the default here.

    Args:
        activations: a_i of the class capsules, `Output.scores` of a `MatrixCapsNet`.
        labels: class of each image.
        margin: m, in (0, 1].
        mean_over_classes: divide by the number of classes, as the authors' code does (which also counts the
            right class: its term is the constant m^2, left out here).
    Raises: ValueError: wrong shapes; labels not int64 or not in 0 ... J - 1; a margin outside (0, 1].
    """
    check_labels(activations, labels, multi_label=False)
    require_in("(0, 1]", margin=margin)
    return _spread_loss(activations, labels, margin, mean_over_classes)


class Spread(PenalisedLoss):
    """`spread_loss` of the scores, with penalties. The authors mention the weight decay on OpenReview.

    Args:
        margin: m, a number or a schedule.
        mean_over_classes: see `spread_loss`.
        weight_decay, reconstruction_weight: see `PenalisedLoss`.
    Raises: ValueError: a margin outside (0, 1]; a negative weight.
    """

    multi_label = False

    def __init__(
        self,
        *,
        margin: Schedule | int | float,
        mean_over_classes: bool,
        weight_decay: int | float,
        reconstruction_weight: Schedule | int | float,
    ) -> None:
        super().__init__(weight_decay=weight_decay, reconstruction_weight=reconstruction_weight)
        self.margin, self.mean_over_classes = schedule_in("(0, 1]", margin=margin), mean_over_classes

    def own_term(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The term "spread"."""
        margin = self.margin(step)
        return {"spread": _spread_loss(output.scores, batch.labels, margin, self.mean_over_classes)}

    def scheduled(self, step: Step) -> dict[str, float]:
        """The values at this step of what may change during training."""
        return {"margin": self.margin(step), **super().scheduled(step)}


def _spread_loss(
    activations: Float[Tensor, "B J"], labels: Tensor, margin: int | float, mean_over_classes: bool
) -> Float[Tensor, ""]:
    right = activations.gather(1, labels.unsqueeze(1))
    shortfall = (margin - (right - activations)).relu().square()
    wrong = 1 - F.one_hot(labels, activations.shape[1]).to(activations.dtype)
    per_image = (shortfall * wrong).sum(1)
    return per_image.mean() / (activations.shape[1] if mean_over_classes else 1)
