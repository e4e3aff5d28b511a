"""Cross-entropy of the softmax over the scores. The function is `torch.nn.functional.cross_entropy`."""

import torch.nn.functional as F
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.errors import require_in
from capsexp.ops.penalty import PenalisedLoss
from capsexp.schedule import Schedule, Step


class CrossEntropy(PenalisedLoss):
    """The usual loss of a classifier. Lengths or activations of capsules are used as logits, unchanged.

    Args:
        label_smoothing: share of the target that all classes get alike; 0 for none (Szegedy et al.,
            "Rethinking the inception architecture", CVPR 2016).
        weight_decay, reconstruction_weight: see `PenalisedLoss`.
    Raises: ValueError: a negative weight; a smoothing outside [0, 1).
    """

    multi_label = False

    def __init__(
        self,
        *,
        label_smoothing: int | float,
        weight_decay: int | float,
        reconstruction_weight: Schedule | int | float,
    ) -> None:
        super().__init__(weight_decay=weight_decay, reconstruction_weight=reconstruction_weight)
        require_in("[0, 1)", label_smoothing=label_smoothing)
        self.label_smoothing = float(label_smoothing)

    def own_term(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The term "cross_entropy"."""
        return {
            "cross_entropy": F.cross_entropy(
                output.scores, batch.labels, label_smoothing=self.label_smoothing
            )
        }
