"""Cross-entropy of a sigmoid for each class by itself, for pictures that may show several."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.ops.labels import multi_hot
from capsexp.ops.penalty import checked_decay, reconstruction_term, weight_decay_term, weight_schedule
from capsexp.schedule import Schedule, Step


class SigmoidCrossEntropy:
    """Each class is present or absent by itself: summed over the classes, mean over the batch.

    The loss of the MultiMNIST baseline of Sabour et al., "Dynamic routing between capsules" (NIPS 2017),
    section 6, which does not say whether classes are summed or averaged; the authors' code averages them.

    Args:
        target: of a present class, in (0, 1]; an absent one has 0.
        weight_decay: factor on half the sum of all squared weights; 0 for none.
        reconstruction_weight: factor on the sum of squared errors over the pixels; a number or a schedule.
    Raises: ValueError: a target outside (0, 1]; a negative weight.
    """

    multi_label = True

    def __init__(
        self,
        *,
        target: int | float,
        weight_decay: int | float,
        reconstruction_weight: Schedule | int | float,
    ) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"target must be in (0, 1], got {target}")
        self.target = target
        self.weight_decay = checked_decay(weight_decay)
        self.reconstruction_weight = weight_schedule(reconstruction_weight)

    def __call__(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms of the loss: "sigmoid_cross_entropy", and where they count the two others."""
        return {
            "sigmoid_cross_entropy": self._cross_entropy(output.scores, batch.labels),
            **weight_decay_term(output, self.weight_decay),
            **reconstruction_term(output, batch, self.reconstruction_weight(step)),
        }

    def scheduled(self, step: Step) -> dict[str, float]:
        """Present value of what may change during training."""
        return {"reconstruction_weight": self.reconstruction_weight(step)}

    def _cross_entropy(self, logits: Float[Tensor, "B J"], labels: Tensor) -> Float[Tensor, ""]:
        targets = self.target * multi_hot(labels, logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
