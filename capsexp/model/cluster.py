"""The network of Zhao, Cheng 2021: convolutional capsules under cluster routing, for images of any size."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Capsules, Output
from capsexp.errors import refuse, require_at_least_1, require_positive, stop_if_refused
from capsexp.layer.cluster_caps import ClusterCaps
from capsexp.ops.weights import kernels_and_matrices


class ClusterNet(nn.Module):
    """Layers of `ClusterCaps`; a linear map of each class's poses, the same for all classes, gives its score.

    Zhao, Cheng, "Capsule networks with non-iterative cluster routing" (Neural Networks 143, 2021). The child
    types of the first layer all have the image as their pose.
    Differs from it in: see `ClusterCaps`; the linear map has no bias, which would add the same number to all
    scores. The class capsules have no activations; we report sigmoid(score).

    The weights of the votes sum to 1 over the children, for each number of a pose: they are no coupling, and
    `Output.layers` has no `Routed`. It holds the class capsules alone, with the poses of all places as one
    pose.

    Args:
        image_shape: channels, height and width.
        classes: number of classes, one capsule type of the last layer each.
        types: C, capsule types of every other layer.
        votes, pose_dim, eps: K, D; see `ClusterCaps`.
        strides: of the layers, as many as there are layers.
    Raises: ValueError: an image that is too small (the message has the smallest size), a number below 1,
        eps <= 0.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        types: int,
        votes: int,
        pose_dim: int,
        strides: Sequence[int],
        eps: int | float,
    ) -> None:
        super().__init__()
        require_at_least_1(types=types, votes=votes, pose_dim=pose_dim, strides=strides)
        require_positive(eps=eps)
        stop_if_refused()
        _check_size(image_shape, strides)
        stop_if_refused()
        shape, layers = (types, *image_shape), []
        for number, stride in enumerate(strides, start=1):
            parents = classes if number == len(strides) else types
            layer = ClusterCaps(shape, types=parents, votes=votes, pose_dim=pose_dim, stride=stride, eps=eps)
            layers.append(layer)
            shape = layer.out_shape
        self.cluster_caps = nn.Sequential(*layers)
        self.score = nn.Linear(math.prod(shape[1:]), 1, bias=False)

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B *T"] | None = None) -> Output:
        """Scores of the classes and their softmax. The labels are not used."""
        poses = self.cluster_caps(images.unsqueeze(1)).flatten(2)
        scores = self.score(poses).squeeze(2)
        return Output(
            scores=scores,
            probabilities=scores.softmax(1),
            layers={"class_caps": Capsules(poses, torch.sigmoid(scores))},
            weights=kernels_and_matrices(self),
        )


def _check_size(image_shape: Sequence[int], strides: Sequence[int]) -> None:
    """Refuse an image that leaves a map with a side of 1 to one of the layers."""
    smallest = math.prod(strides[:-1]) + 1
    if min(image_shape[1:]) < smallest:
        got = f"{image_shape[1]}x{image_shape[2]}"
        refuse(f"image_shape must be at least {smallest}x{smallest} for strides {list(strides)}, got {got}")
