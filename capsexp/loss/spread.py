"""Spread loss: the activation of every wrong class at least a margin below that of the right one."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.ops.penalty import checked_decay, reconstruction_term, weight_decay_term, weight_schedule
from capsexp.schedule import Schedule, Step, as_schedule


class Spread:
    """Squared shortfall of the margin between the right class and each of the others.

    Eq. 3 of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018).
    Differs from it in: nothing. Weight decay is the authors' answer on OpenReview.

    Args:
        margin: m, a number or a schedule.
        mean_over_classes: divide by the number of classes, as the authors' code does (which also counts the right
            class: its term is the constant m^2, left out here).
        weight_decay: factor on half the sum of all squared weights.
        reconstruction_weight: factor on the sum of squared errors over the pixels; a number or a schedule.
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
        if not callable(margin) and not 0 < margin <= 1:
            raise ValueError(f"margin must be in (0, 1], got {margin}")
        self.margin, self.mean_over_classes = as_schedule(margin), mean_over_classes
        self.weight_decay = checked_decay(weight_decay)
        self.reconstruction_weight = weight_schedule(reconstruction_weight)

    def __call__(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms of the loss: "spread", and where they count "weight_decay" and "reconstruction"."""
        return {
            "spread": self._spread(output.scores, batch.labels, self.margin(step)),
            **weight_decay_term(output, self.weight_decay),
            **reconstruction_term(output, batch, self.reconstruction_weight(step)),
        }

    def scheduled(self, step: Step) -> dict[str, float]:
        """Present value of what may change during training."""
        return {"margin": self.margin(step), "reconstruction_weight": self.reconstruction_weight(step)}

    def _spread(self, activations: Float[Tensor, "B J"], labels: Tensor, margin: float) -> Float[Tensor, ""]:
        right = activations.gather(1, labels.unsqueeze(1))
        shortfall = (margin - (right - activations)).relu().square()
        wrong = 1 - F.one_hot(labels, activations.shape[1]).to(activations.dtype)
        per_picture = (shortfall * wrong).sum(1)
        return per_picture.mean() / (activations.shape[1] if self.mean_over_classes else 1)
