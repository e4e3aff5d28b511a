"""Labels of pictures that show one class, [B], or several, [B, T]: all that compares with labels asks here.

With one class in each picture all of this is what one would write without it, bit for bit.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, where


def multi_hot(labels: Int[Tensor, " B *T"], classes: int) -> Int[Tensor, "B J"]:
    """1 for each class that is in the picture, 0 for the others."""
    hot: Tensor = F.one_hot(labels, classes)
    return hot if labels.dim() == 1 else hot.amax(1)


def predicted_labels(scores: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"]) -> Int[Tensor, " B *T"]:
    """The classes with the highest scores, as many as there are labels, each right one at its label's place.

    So `predicted_labels(...) == labels` says which labels were found, and T decoded pictures stand where the T
    pictures that they are compared with do. The order of the labels changes nothing else.
    """
    if labels.dim() == 1:
        return scores.argmax(1)
    guesses = scores.topk(labels.shape[1], dim=1).indices
    same = labels.unsqueeze(2) == guesses.unsqueeze(1)  # [B, T labels, T guesses]
    missed = ~same.any(2)
    # Guesses that are no label come first, by score; the n-th label that was missed gets the n-th of them.
    wrong_first = guesses.gather(1, same.any(1).int().argsort(dim=1, stable=True))
    spare = wrong_first.gather(1, (missed.cumsum(1) - 1).clamp_min(0))
    return where(missed, spare, labels)


def all_correct(predictions: Int[Tensor, " B *T"], labels: Int[Tensor, " B *T"]) -> Bool[Tensor, " B"]:
    """Whether all classes of the picture were found: `predictions` as `predicted_labels` gives them."""
    return (predictions == labels).reshape(len(labels), -1).all(1)


def fraction_correct(predictions: Int[Tensor, " B *T"], labels: Int[Tensor, " B *T"]) -> Float[Tensor, " B"]:
    """Share of the picture's classes that were found."""
    return (predictions == labels).reshape(len(labels), -1).float().mean(1)
