"""Negative log-likelihood of the label, for class activations that are probabilities already."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.errors import UserError
from capsexp.ops.labels import check_labels
from capsexp.ops.penalty import PenalisedLoss
from capsexp.schedule import Step

SMALLEST_PROBABILITY = 1e-12
"""Below it the loss is constant: at most 27.6 for an image."""
ROUNDING = 1e-3
"""By which a probability may exceed 1: in bfloat16 a share of 1 is a sum of rounded numbers."""


def negative_log_likelihood(
    probabilities: Float[Tensor, "B J"], labels: Int[Tensor, " B"]
) -> Float[Tensor, ""]:
    """Mean over the batch of -log of the label's probability.

    The loss of Hahn, Pyeon, Kim, "Self-routing capsule networks" (NeurIPS 2019), whose class activations sum
    to 1. Differs from it in: a probability counts as at least 1e-12, so the loss of an image is finite.

    Args:
        probabilities: of each class, in [0, 1].
        labels: class of each image.
    Raises: ValueError: wrong shapes; labels not int64 or not in 0 ... J - 1; a probability outside [0, 1].
    """
    check_labels(probabilities, labels, multi_label=False)
    if problem := _range_problem(probabilities):
        raise ValueError(problem)
    return _negative_log_likelihood(probabilities, labels)


class NegativeLogLikelihood(PenalisedLoss):
    """`negative_log_likelihood` of the scores, with penalties. The scores must be probabilities.

    Args:
        weight_decay, reconstruction_weight: see `PenalisedLoss`.
    Raises: ValueError: a negative weight. When called, UserError: a score outside [0, 1].
    """

    multi_label = False

    def own_term(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The term "negative_log_likelihood"."""
        if problem := _range_problem(output.scores):
            raise UserError(f"loss=negative_log_likelihood: {problem}; for other scores use cross_entropy")
        return {"negative_log_likelihood": _negative_log_likelihood(output.scores, batch.labels)}


def _negative_log_likelihood(probabilities: Float[Tensor, "B J"], labels: Tensor) -> Float[Tensor, ""]:
    right = probabilities.gather(1, labels.unsqueeze(1))
    return -right.clamp_min(SMALLEST_PROBABILITY).log().mean()


def _range_problem(scores: Tensor) -> str | None:
    """What is wrong with the range of these scores; None if nothing is. NaN passes.

    Checked on a CPU only: on an accelerator that would wait for the device.
    """
    if scores.device.type != "cpu" or torch.compiler.is_compiling() or not scores.numel():
        return None
    lowest, highest = (number.item() for number in scores.detach().aminmax())
    if (lowest >= 0 and highest <= 1 + ROUNDING) or math.isnan(lowest):
        return None
    return f"the probabilities of the classes must be in [0, 1], got {lowest:g} ... {highest:g}"
