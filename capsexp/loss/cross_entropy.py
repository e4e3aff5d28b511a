"""Cross-entropy of the softmax over the scores. The function is `torch.nn.functional.cross_entropy`."""

import torch.nn.functional as F
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.ops.penalty import PenalisedLoss
from capsexp.schedule import Step


class CrossEntropy(PenalisedLoss):
    """The usual loss of a classifier. Lengths or activations of capsules are used as logits, unchanged.

    Args:
        weight_decay, reconstruction_weight: see `PenalisedLoss`.
    Raises: ValueError: a negative weight.
    """

    multi_label = False

    def own_term(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The term "cross_entropy"."""
        return {"cross_entropy": F.cross_entropy(output.scores, batch.labels)}
