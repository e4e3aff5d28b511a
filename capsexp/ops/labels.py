"""Helpers for labels [B] of images with one class each, and [B, T] of images with several.

With one class per image, the results are those of code for a single class, bit for bit.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def multi_hot(labels: Int[Tensor, " B *T"], classes: int) -> Int[Tensor, "B J"]:
    """1 for each class that the image shows, 0 for the others."""
    hot: Tensor = F.one_hot(labels, classes)
    return hot if labels.dim() == 1 else hot.amax(1)


def predicted_labels(scores: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"]) -> Int[Tensor, " B *T"]:
    """The classes with the highest scores, as many per image as it has labels.

    Several predictions of one image are put in the order of its labels: a correct one stands where its label
    stands. So `predicted_labels(...) == labels` marks the labels that were predicted, and the images decoded
    from the predictions line up with the images of the labels. Only that order depends on the labels.
    """
    if labels.dim() == 1:
        return scores.argmax(1)
    guesses = scores.topk(labels.shape[1], dim=1).indices
    same = labels.unsqueeze(2) == guesses.unsqueeze(1)  # [B, T labels, T guesses]
    missed = ~same.any(2)
    # Sort the wrong guesses to the front, by score; the n-th missed label gets the n-th of them.
    wrong_first = guesses.gather(1, same.any(1).int().argsort(dim=1, stable=True))
    spare = wrong_first.gather(1, (missed.cumsum(1) - 1).clamp_min(0))
    return torch.where(missed, spare, labels)


def all_correct(predictions: Int[Tensor, " B *T"], labels: Int[Tensor, " B *T"]) -> Bool[Tensor, " B"]:
    """Whether every class of the image was predicted.

    Args:
        predictions: in the order of the labels, as `predicted_labels` returns them.
        labels: the classes of the image.
    """
    return (predictions == labels).reshape(len(labels), -1).all(1)


def fraction_correct(predictions: Int[Tensor, " B *T"], labels: Int[Tensor, " B *T"]) -> Float[Tensor, " B"]:
    """Fraction of the image's classes that were predicted. The arguments are those of `all_correct`."""
    return (predictions == labels).reshape(len(labels), -1).float().mean(1)


def check_labels(scores: Tensor, labels: Tensor, *, multi_label: bool) -> None:
    """Check what a loss function gets.

    Class indices are checked on a CPU only: on an accelerator that would wait for the device.

    Raises:
        ValueError: scores that are not [B, J]; labels that are not integers, not [B] (or, with multi_label,
            [B, T]), or not in 0 ... J - 1.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape [B, J], got {list(scores.shape)}")
    batch, classes = scores.shape
    if labels.shape[:1] != scores.shape[:1] or labels.dim() > (2 if multi_label else 1):
        expected = f"[{batch}]" + (f" or [{batch}, T]" if multi_label else "")
        raise ValueError(f"labels must have shape {expected}, got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be torch.int64, got {labels.dtype}")
    if labels.device.type == "cpu" and labels.numel():
        lowest, highest = labels.aminmax()
        if lowest < 0 or highest >= classes:
            raise ValueError(f"labels must be in 0 ... {classes - 1}, got {lowest} ... {highest}")
