"""Cluster routing: every child type casts several votes, and weighs as much as they agree."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.errors import refuse, require_at_least_1, require_not_negative, require_positive, stop_if_refused
from capsexp.ops.mean_variance import mean_and_variance

KERNEL = 3
"""Side of the kernels that make the votes, in places of the map."""


def cluster_routing(
    votes: Float[Tensor, "B I K *rest"], *, eps: int | float = 1e-5
) -> tuple[Float[Tensor, " B *rest"], Float[Tensor, "B I *rest"]]:
    """Sum the means of each child's votes, weighted by how well these votes agree.

        m_i = mean_k V_ik    s_i = sqrt(variance_k V_ik + eps)    w_i = (1 / s_i) / sum_i (1 / s_i)

    Zhao, Cheng, "Capsule networks with non-iterative cluster routing" (Neural Networks 143, 2021). Each
    number of a pose has weights of its own, at each place.
    Differs from it in: eps, without which votes that are equal give 0 / 0.

    Args:
        votes: K votes of each of I children; the other axes are parents, numbers of a pose, places.
        eps: added to the variance.
    Raises: ValueError: eps < 0.
    Returns: sum_i w_i m_i; the weights w_i.
    Laws: the weights sum to 1 over the children; the order of a child's votes does not matter; permuting the
        children permutes the weights and leaves the sum; with eps = 0 a factor on all votes leaves the
        weights.
    """
    require_not_negative(eps=eps)
    means, variances = mean_and_variance(votes)
    weights = F.softmax(-0.5 * (variances + eps).log(), dim=1)
    return (weights * means).sum(1), weights


class ClusterCaps(nn.Module):
    """Convolutional capsules under cluster routing; poses without activations.

    Zhao, Cheng, "Capsule networks with non-iterative cluster routing" (Neural Networks 143, 2021).
    Differs from it in: the eps of `cluster_routing`. Each child type has kernels of its own. The authors'
    code makes a convolution for each parent type and selects it by child type. That fails with more child
    than parent types, and with fewer it leaves some unused.

    Args:
        in_shape: number of child types (I), numbers in a child's pose, rows and columns of the map.
        types: of the parents (J).
        votes: of each child for each parent (K). With 1 all weights are equal: a control.
        pose_dim: numbers in a parent's pose (D).
        stride: of the 3x3 kernels. The map is padded by 1, so the parents have ceil(side / stride) places.
        eps: added to the variance of the votes.
    Raises: ValueError: a number below 1; eps <= 0; a map with a side of 1, where eight of nine weights of a
        kernel see only padding.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        *,
        types: int,
        votes: int = 8,
        pose_dim: int = 24,
        stride: int = 1,
        eps: int | float = 1e-5,
    ) -> None:
        super().__init__()
        require_at_least_1(in_shape=in_shape, types=types, votes=votes, pose_dim=pose_dim, stride=stride)
        require_positive(eps=eps)
        children, in_dim, rows, columns = in_shape
        if min(rows, columns) < 2:
            refuse(f"in_shape must have a map of at least 2x2, got {rows}x{columns}")
        stop_if_refused()
        self.in_shape = (children, in_dim, rows, columns)
        self.out_shape = (types, pose_dim, math.ceil(rows / stride), math.ceil(columns / stride))
        """Types, numbers in a pose, rows and columns of the parents."""
        self.stride, self.eps = stride, eps
        # Seven axes: with four, `channels_last` would reorder them, and then the votes. In that order the
        # mean and the variance over the votes take three times as long on a CPU.
        self.weight = nn.Parameter(torch.empty(children, votes, types, pose_dim, in_dim, KERNEL, KERNEL))
        self.bias = nn.Parameter(torch.empty(children, votes, types * pose_dim))
        bound = 1 / math.sqrt(in_dim * KERNEL * KERNEL)  # as PyTorch starts a convolution
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self.gain = nn.Parameter(torch.ones(self.out_shape[1:]))
        self.shift = nn.Parameter(torch.zeros(self.out_shape[1:]))

    def forward(self, poses: Float[Tensor, "B A D H W"]) -> Float[Tensor, "B J E h w"]:
        """Poses of the parents, normalised over the numbers of a pose and the map (layer normalisation).

        Args: poses: of the children; one (A = 1) is that of all child types, as the image in a first layer.
        Raises: ValueError: the sizes are not the layer's.
        """
        if tuple(poses.shape[1:]) not in (self.in_shape, (1, *self.in_shape[1:])):
            expected, got = list(self.in_shape), list(poses.shape[1:])
            raise ValueError(f"expected poses of shape {expected} per image, got {got}")
        total, _ = cluster_routing(self.cast_votes(poses), eps=self.eps)
        return F.layer_norm(total.unflatten(1, self.out_shape[:2]), self.out_shape[1:], self.gain, self.shift)

    def cast_votes(self, poses: Float[Tensor, "B A D H W"]) -> Float[Tensor, "B I K JE h w"]:
        """The votes, with one axis for parents and numbers of a pose."""
        kernels, bias = self.weight.flatten(0, 3), self.bias.flatten()
        maps = poses.flatten(1, 2).contiguous()
        votes = F.conv2d(maps, kernels, bias, self.stride, padding=1, groups=poses.shape[1])
        return votes.unflatten(1, tuple(self.bias.shape))

    def without_routing(self) -> "UnroutedClusterCaps":
        """The same parameters without the routing, for comparison."""
        return UnroutedClusterCaps(self)

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"in_shape={self.in_shape}, out_shape={self.out_shape}, votes={self.bias.shape[1]}"


class UnroutedClusterCaps(nn.Module):
    """`ClusterCaps` with equal weights: one convolution with the mean of the kernels, which makes no votes.

    The baseline of `capsexp bench`, so no routing can be faster.

    Args: layer: whose parameters are copied.
    """

    def __init__(self, layer: ClusterCaps) -> None:
        super().__init__()
        self.weight, self.bias, self.gain, self.shift = (
            nn.Parameter(parameter.detach())
            for parameter in (layer.weight, layer.bias, layer.gain, layer.shift)
        )
        self.stride, self.out_shape = layer.stride, layer.out_shape

    def forward(self, poses: Float[Tensor, "B A D H W"]) -> Float[Tensor, "B J E h w"]:
        """Poses of the parents under equal weights."""
        kernels = self.weight.mean(1).flatten(1, 2) / len(self.weight)  # [I, JE, D, 3, 3]
        kernels = kernels.sum(0, keepdim=True) if poses.shape[1] == 1 else kernels
        kernels = kernels.transpose(0, 1).flatten(1, 2)
        total = F.conv2d(poses.flatten(1, 2), kernels, self.bias.mean((0, 1)), self.stride, padding=1)
        return F.layer_norm(total.unflatten(1, self.out_shape[:2]), self.out_shape[1:], self.gain, self.shift)
