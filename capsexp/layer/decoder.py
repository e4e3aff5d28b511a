"""From the pose of one class capsule back to the picture."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.errors import require_at_least_1
from capsexp.ops.labels import predicted_labels

DECODE = ("label", "prediction")


class Decoder(nn.Module):
    """Reconstruct a picture from one class capsule: fully connected layers, the last one a sigmoid.

    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 4.1 and figure 2.
    Differs from it in: nothing.

    Args:
        classes, pose_dim: number and pose size of the class capsules.
        image_shape: channels, height and width of the picture.
        hidden: widths of the ReLU layers.
    Raises: ValueError: a width below 1.
    """

    def __init__(
        self, classes: int, pose_dim: int, image_shape: Sequence[int], *, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        require_at_least_1(hidden=hidden)
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        sizes = [classes * pose_dim, *hidden, channels * height * width]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))

    def forward(
        self, poses: Float[Tensor, "B J D"], classes: Int[Tensor, " B *T"]
    ) -> Float[Tensor, "B *T C H W"]:
        """Picture in [0, 1] of the capsule of each picture's class; the others are masked with zeros.

        Several classes are decoded one at a time, by the same weights.
        """
        if classes.dim() == 2:
            each = self(poses.repeat_interleave(classes.shape[1], dim=0), classes.flatten())
            return each.unflatten(0, tuple(classes.shape))
        mask = F.one_hot(classes, poses.shape[1]).to(poses.dtype).unsqueeze(2)  # [B, J, 1]
        features = (poses * mask).flatten(1)
        for layer in self.layers[:-1]:
            features = layer(features).relu()
        return self.layers[-1](features).sigmoid().unflatten(1, self.image_shape)


def check_decode(decode: str | int, classes: int) -> None:
    """Refuse a choice that `decoded_class` does not know."""
    if decode not in DECODE and not (isinstance(decode, int) and 0 <= decode < classes):
        raise ValueError(
            f"decode must be one of {', '.join(DECODE)}, or a class 0 ... {classes - 1}, got {decode}"
        )


def decoded_class(
    decode: str | int, scores: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"] | None
) -> Int[Tensor, " B *T"]:
    """The class to decode, per picture; as many as there are labels.

    Args:
        decode: "label": the label where there is one, else the highest score; "prediction": always the highest
            score, or for several labels the highest ones (see `predicted_labels`); or the index of a class.
        scores: of the class capsules.
        labels: None where they are not known.
    """
    if isinstance(decode, int):
        shape = (len(scores),) if labels is None else labels.shape
        return torch.full(shape, decode, device=scores.device)
    if labels is None:
        return scores.argmax(1)
    return labels if decode == "label" else predicted_labels(scores, labels)
