"""Normalization of capsules over a batch or over each image, outside of the routing."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Routed
from capsexp.errors import require_literal
from capsexp.ops.shared_norm import batch_norm

Norm = Literal["none", "batch", "group"]
Per = Literal["type", "element"]
MOMENTUM = 0.1
EPS = 1e-5


class ChannelNorm(nn.Module):
    """Mean 0 and variance 1 for each channel, over a batch ("batch") or over each image ("group").

    With "batch" the evaluation uses running means, as `torch.nn.BatchNorm1d` does. In a run of several
    processes the statistics are those of the whole batch.
    Differs from it in: a channel with a single value becomes 0 and leaves the running means alone, where
    PyTorch raises an error.

    Args:
        channels: C.
        norm: "batch" or "group".
        affine: learn a gain, from 1, and a bias, from 0, per channel.
    """

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, channels: int, *, norm: Norm, affine: bool) -> None:
        super().__init__()
        require_literal(Literal["batch", "group"], norm=norm)
        self.channels, self.norm = channels, norm
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        batch = norm == "batch"
        self.register_buffer("running_mean", torch.zeros(channels) if batch else None)
        self.register_buffer("running_var", torch.ones(channels) if batch else None)

    def forward(self, values: Float[Tensor, "B C ..."]) -> Float[Tensor, "B C ..."]:
        """Normalize. Autocast is off inside."""
        return self._flat(values.flatten(2)).view_as(values)

    def _flat(self, values: Float[Tensor, "B C L"]) -> Float[Tensor, "B C L"]:
        with torch.autocast(values.device.type, enabled=False):
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if self.norm == "group":
                return F.group_norm(values, self.channels, self.weight, self.bias, EPS)
            means, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
            return batch_norm(values, *means, *affine, training=self.training, momentum=MOMENTUM, eps=EPS)

    def extra_repr(self) -> str:
        """The number of channels and what the statistics are over."""
        return f"{self.channels}, norm={self.norm!r}, affine={self.weight is not None}"


class CapsuleNorm(nn.Module):
    """Normalize the poses, and where there are any the scores, of the capsules of a layer.

    Ribeiro, Leontidis, Kollias, "Capsule routing via variational Bayes" (AAAI 2020) normalize poses and
    scores over the batch after each layer; Hahn, Pyeon, Kim, "Self-routing capsule networks" (NeurIPS 2019)
    the poses, per number. It stands outside of the routing, which treats each image by itself: only
    norm="batch" makes the result for an image depend on the others in its training batch.
    Differs from them in: "group", which is ours.

    Args:
        types: capsule types of the layer; the capsules are in the order (position, type).
        pose_dim: numbers of a pose.
        norm: "batch": statistics of each type over the batch and the positions; running means in evaluation.
            "group": poses over the positions of each type, scores over all capsules of the layer, in each
            image by itself.
        per: "type": one mean and variance for all numbers of a type's poses; "element": one for each number.
        affine: learn a gain and a bias, per type or number.
        scores: whether the layer has scores.
    Raises: ValueError: an unknown option.
    """

    def __init__(
        self,
        types: int,
        pose_dim: int,
        *,
        norm: Norm,
        per: Per = "type",
        affine: bool = False,
        scores: bool = True,
    ) -> None:
        super().__init__()
        require_literal(Per, per=per)
        self.types, self.per = types, per
        self.poses = ChannelNorm(types if per == "type" else types * pose_dim, norm=norm, affine=affine)
        self.scores: ChannelNorm | None = None
        if scores:
            self.scores = ChannelNorm(types if norm == "batch" else 1, norm=norm, affine=affine)

    def forward(
        self, poses: Float[Tensor, "B I D"], scores: Float[Tensor, "B I"] | None
    ) -> tuple[Float[Tensor, "B I D"], Float[Tensor, "B I"] | None]:
        """Return the normalized poses and scores; None where there are no scores."""
        by_type = poses.unflatten(1, (-1, self.types))  # [B, P, types, D]
        if self.per == "type":
            channels = by_type.permute(0, 2, 1, 3)  # [B, types, P, D]
            normal = self.poses(channels.flatten(2)).unflatten(2, channels.shape[2:]).permute(0, 2, 1, 3)
        else:
            normal = self.poses(by_type.flatten(2).transpose(1, 2)).transpose(1, 2)  # [B, P, types * D]
        poses = normal.reshape(poses.shape)
        if scores is None or self.scores is None:
            return poses, scores
        if self.scores.norm == "group":
            return poses, self.scores(scores.unsqueeze(1)).squeeze(1)
        by_type = scores.unflatten(1, (-1, self.types)).transpose(1, 2)  # [B, types, P]
        return poses, self.scores(by_type).transpose(1, 2).flatten(1)

    def routed(self, routed: Routed) -> Routed:
        """Normalize the capsules that a layer returned; activations follow the scores where there are any."""
        poses, scores = self(routed.poses, routed.scores)
        activations = routed.activations if scores is None else scores.sigmoid()
        return routed._replace(poses=poses, activations=activations, scores=scores)


def require_norm(**norms: Norm) -> None:
    """Check arguments of a network or layer, by their names.

    Raises:
        ValueError: an unknown norm.
    """
    for name, norm in norms.items():
        require_literal(Norm, **{name: norm})
