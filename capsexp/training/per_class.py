"""Means over the classes, of accuracies and of F1 scores: a small class counts as much as the others."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsexp.ops.labels import predicted_labels

RIGHT, ALL, PREDICTED = "right", "all", "predicted"


def count_labels(scores: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"]) -> dict[str, float]:
    """Count the labels and the predictions of each class in a batch, and those that agree.

    An image with several labels counts once for each.

    Returns:
        `right/CLASS`, `all/CLASS` and `predicted/CLASS` by the number of the class.
    """
    classes = scores.shape[1]
    predictions = predicted_labels(scores, labels)
    right = predictions == labels
    # A sum over one-hot labels: `bincount` with weights is not deterministic on CUDA.
    hot = F.one_hot(labels, classes).reshape(-1, classes)
    predicted = F.one_hot(predictions, classes).reshape(-1, classes)
    rows = [(hot * right.reshape(-1, 1)).sum(0), hot.sum(0), predicted.sum(0)]
    counts = dict(zip((RIGHT, ALL, PREDICTED), torch.stack(rows).float().tolist(), strict=True))
    return {f"{name}/{k}": n for name, row in counts.items() for k, n in enumerate(row)}


def balanced_accuracy(counts: Mapping[str, float]) -> float:
    """Return the mean over classes of the fraction of their labels that are predicted.

    Args:
        counts: sums of what `count_labels` returned. Classes without labels are left out.
    """
    totals = {name.removeprefix(f"{ALL}/"): n for name, n in counts.items() if name.startswith(f"{ALL}/")}
    shares = [counts[f"{RIGHT}/{k}"] / n for k, n in totals.items() if n > 0]
    return sum(shares) / len(shares)


def macro_f1(counts: Mapping[str, float]) -> float:
    """Return the mean over classes of F1, the harmonic mean of precision and recall.

    Args:
        counts: sums of what `count_labels` returned. Classes without labels are left out.
    """
    classes = [
        name.removeprefix(f"{ALL}/") for name, n in counts.items() if name.startswith(f"{ALL}/") and n > 0
    ]
    scores = [
        2 * counts[f"{RIGHT}/{k}"] / (counts[f"{ALL}/{k}"] + counts[f"{PREDICTED}/{k}"]) for k in classes
    ]
    return sum(scores) / len(scores)
