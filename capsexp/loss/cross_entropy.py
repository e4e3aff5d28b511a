"""Cross-entropy of the softmax over the scores, with the reconstruction as a regulariser."""

import torch.nn.functional as F
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.loss.margin import reconstruction_term, weight_schedule
from capsexp.schedule import Schedule, Step


class CrossEntropy:
    """The usual loss of a classifier. Lengths of capsules count as logits here, as they are.

    Args:
        reconstruction_weight: factor on the sum of squared errors over the pixels; a number or a schedule.
    Raises: ValueError: a negative weight.
    """

    def __init__(self, *, reconstruction_weight: Schedule | int | float) -> None:
        self.reconstruction_weight = weight_schedule(reconstruction_weight)

    def __call__(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms that add up to the loss: "cross_entropy", and "reconstruction" where there is a decoder."""
        entropy = F.cross_entropy(output.scores, batch.labels)
        return {
            "cross_entropy": entropy,
            **reconstruction_term(output, batch, self.reconstruction_weight(step)),
        }

    def scheduled(self, step: Step) -> dict[str, float]:
        """Present value of what may change during training."""
        return {"reconstruction_weight": self.reconstruction_weight(step)}
