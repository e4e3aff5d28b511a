"""Cross-entropy of the softmax over the scores, with the reconstruction as a regulariser."""

import torch.nn.functional as F
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.ops.penalty import checked_decay, reconstruction_term, weight_decay_term, weight_schedule
from capsexp.schedule import Schedule, Step


class CrossEntropy:
    """The usual loss of a classifier. Lengths or activations of capsules count as logits here, as they are.

    Args:
        weight_decay: factor on half the sum of all squared weights; 0 for none.
        reconstruction_weight: factor on the sum of squared errors over the pixels; a number or a schedule.
    Raises: ValueError: a negative weight.
    """

    multi_label = False

    def __init__(self, *, weight_decay: int | float, reconstruction_weight: Schedule | int | float) -> None:
        self.weight_decay = checked_decay(weight_decay)
        self.reconstruction_weight = weight_schedule(reconstruction_weight)

    def __call__(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms of the loss: "cross_entropy", and where they count "weight_decay" and "reconstruction"."""
        return {
            "cross_entropy": F.cross_entropy(output.scores, batch.labels),
            **weight_decay_term(output, self.weight_decay),
            **reconstruction_term(output, batch, self.reconstruction_weight(step)),
        }

    def scheduled(self, step: Step) -> dict[str, float]:
        """Present value of what may change during training."""
        return {"reconstruction_weight": self.reconstruction_weight(step)}
