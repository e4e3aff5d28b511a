"""Cross-entropy of one sigmoid per class, for images that may show several classes."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.errors import require_in
from capsexp.ops.labels import check_labels, multi_hot
from capsexp.ops.penalty import PenalisedLoss
from capsexp.schedule import Schedule, Step


def sigmoid_cross_entropy(
    logits: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"], *, target: int | float = 1.0
) -> Float[Tensor, ""]:
    """Decide for each class by itself whether the image shows it.

    Mean over the batch of

        sum_k  -t_k log sigmoid(z_k) - (1 - t_k) log sigmoid(-z_k)

    with t_k the target for a class that the image shows, else 0. The loss of the MultiMNIST baseline of
    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 6. The paper does not say whether
    classes are summed or averaged; the authors' code averages them.

    Args:
        logits: z_k.
        labels: class of each image, or its T classes.
        target: of a present class, in (0, 1].
    Raises: ValueError: wrong shapes; labels not int64 or not in 0 ... J - 1; a target outside (0, 1].
    """
    check_labels(logits, labels, multi_label=True)
    require_in("(0, 1]", target=target)
    return _sigmoid_cross_entropy(logits, labels, target)


class SigmoidCrossEntropy(PenalisedLoss):
    """`sigmoid_cross_entropy` of the scores, with penalties.

    Args:
        target: see `sigmoid_cross_entropy`.
        weight_decay, reconstruction_weight: see `PenalisedLoss`.
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
        super().__init__(weight_decay=weight_decay, reconstruction_weight=reconstruction_weight)
        require_in("(0, 1]", target=target)
        self.target = target

    def own_term(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The term "sigmoid_cross_entropy"."""
        return {"sigmoid_cross_entropy": _sigmoid_cross_entropy(output.scores, batch.labels, self.target)}


def _sigmoid_cross_entropy(
    logits: Float[Tensor, "B J"], labels: Tensor, target: int | float
) -> Float[Tensor, ""]:
    targets = target * multi_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
