"""The first matrix capsules: two convolutions, one for the poses, one for the activations."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules
from capsexp.layer.capsule_norm import CapsuleNorm, Norm, require_norm
from capsexp.layer.matrix_start import Initialisation


class MatrixPrimaryCaps(nn.Module):
    """Primary capsules of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), section 4.

    Differs from it in: nothing. The paper does not mention biases; the authors' code has none, which agrees
    with the paper's numbers of parameters.

    Args:
        in_channels: A, channels of the features.
        types: B, capsule types.
        pose_dim: numbers of a pose.
        kernel, stride: of both convolutions; 1 in the paper.
        norm: "none"; or "batch" or "group": normalize poses, and activations before the sigmoid, with a gain
            and a bias per type (Ribeiro et al. 2020). See `CapsuleNorm`.
        initialisation: "xavier": the kernels start Xavier uniform; any other: as PyTorch's convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        types: int,
        pose_dim: int = 16,
        kernel: int = 1,
        stride: int = 1,
        norm: Norm = "none",
        initialisation: Initialisation = "identity",
    ) -> None:
        super().__init__()
        require_norm(norm=norm)
        self.types, self.pose_dim = types, pose_dim
        self.pose = nn.Conv2d(in_channels, types * pose_dim, kernel, stride, bias=False)
        self.activation = nn.Conv2d(in_channels, types, kernel, stride, bias=False)
        if initialisation == "xavier":
            nn.init.xavier_uniform_(self.pose.weight)
            nn.init.xavier_uniform_(self.activation.weight)
        self.norm = None if norm == "none" else CapsuleNorm(types, pose_dim, norm=norm, affine=True)

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"types={self.types}, pose_dim={self.pose_dim}"

    def forward(self, features: Float[Tensor, "B C H W"]) -> Capsules:
        """Capsules in the order (row, column, type)."""
        poses = self.pose(features).permute(0, 2, 3, 1).reshape(len(features), -1, self.pose_dim)
        logits = self.activation(features).permute(0, 2, 3, 1).reshape(len(features), -1)
        if self.norm is not None:
            poses, logits = self.norm(poses, logits)
        return Capsules(poses, logits.sigmoid())

    @torch.no_grad()
    def calibrate(self, features: Float[Tensor, "B C H W"]) -> None:
        """Start with poses of mean square 1 and a mean logit of 0 for each type on these features.

        Then one variance floor suits all images, and about half of the capsules are active. Without this a
        type would be on or off everywhere: the features are positive after ReLU, and there are no biases.
        Features of 0 change nothing. With a norm nothing is left to do.
        """
        if self.norm is not None:
            return
        smallest = torch.finfo(features.dtype).tiny
        size = self(features).poses.square().mean().sqrt()
        self.pose.weight.div_(torch.where(size > 0, size, torch.ones_like(size)))
        mean = features.mean((0, 2, 3))[None, :, None, None]
        along = (self.activation.weight * mean).sum(1, keepdim=True)
        self.activation.weight.sub_(along * mean / mean.square().sum().clamp_min(smallest))
