"""The mean of the accuracies of the classes: a class with few images counts as much as the others."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsexp.ops.labels import predicted_labels

RIGHT, ALL = "right", "all"


def count_labels(scores: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"]) -> dict[str, float]:
    """Count the labels of each class in a batch, and those that are predicted.

    An image with several labels counts once for each.

    Returns:
        `right/CLASS` and `all/CLASS` by the number of the class.
    """
    classes = scores.shape[1]
    right = predicted_labels(scores, labels) == labels
    # A sum over one-hot labels: `bincount` with weights is not deterministic on CUDA.
    hot = F.one_hot(labels, classes).reshape(-1, classes)
    counts = torch.stack([(hot * right.reshape(-1, 1)).sum(0), hot.sum(0)]).float().tolist()
    return {
        f"{name}/{k}": n for name, row in zip((RIGHT, ALL), counts, strict=True) for k, n in enumerate(row)
    }


def balanced_accuracy(counts: Mapping[str, float]) -> float:
    """Return the mean over classes of the fraction of their labels that are predicted.

    Args:
        counts: sums of what `count_labels` returned. Classes without labels are left out.
    """
    totals = {name.removeprefix(f"{ALL}/"): n for name, n in counts.items() if name.startswith(f"{ALL}/")}
    shares = [counts[f"{RIGHT}/{k}"] / n for k, n in totals.items() if n > 0]
    return sum(shares) / len(shares)
