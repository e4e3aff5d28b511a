"""From the pose of one class capsule back to the image."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.errors import refuse, require_at_least_1
from capsexp.ops.labels import predicted_labels

Decode = Literal["label", "prediction"]


class Decoder(nn.Module):
    """Reconstruct an image from one class capsule: fully connected layers, the last one a sigmoid.

    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 4.1 and figure 2.
    Differs from it in: nothing.

    Args:
        classes, pose_dim: number and pose size of the class capsules.
        image_shape: channels, height and width of the image.
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
        """Image in [0, 1], decoded from the capsule of each image's class; zeros mask the other capsules.

        Several classes per image are decoded one at a time, with the same weights.
        """
        if classes.dim() == 2:
            images = self(poses.repeat_interleave(classes.shape[1], dim=0), classes.flatten())
            return images.unflatten(0, tuple(classes.shape))
        mask = F.one_hot(classes, poses.shape[1]).to(poses.dtype).unsqueeze(2)  # [B, J, 1]
        features = (poses * mask).flatten(1)
        for layer in self.layers[:-1]:
            features = layer(features).relu()
        return self.layers[-1](features).sigmoid().unflatten(1, self.image_shape)


def check_decode(decode: Decode | int, classes: int) -> None:
    """Check the setting `decode` of a network, see `decoded_class`.

    Raises: ValueError: an unknown option, or a class that does not exist.
    """
    if decode not in get_args(Decode) and not (isinstance(decode, int) and 0 <= decode < classes):
        options = ", ".join(get_args(Decode))
        refuse(f"decode must be one of {options}, or a class 0 ... {classes - 1}, got {decode}")


def decoded_class(
    decode: Decode | int, scores: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"] | None
) -> Int[Tensor, " B *T"]:
    """The class to decode, per image; as many as there are labels.

    Args:
        decode: "label": the label if given, else the class with the highest score; "prediction": always the
            highest score, or for several labels the highest ones (see `predicted_labels`); or a class index.
        scores: of the class capsules.
        labels: None where they are unknown.
    """
    if isinstance(decode, int):
        shape = (len(scores),) if labels is None else labels.shape
        return torch.full(shape, decode, device=scores.device)
    if labels is None:
        return scores.argmax(1)
    return labels if decode == "label" else predicted_labels(scores, labels)
