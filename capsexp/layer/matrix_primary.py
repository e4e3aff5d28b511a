"""The first matrix capsules: two convolutions, one for the poses, one for the activations."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules
from capsexp.errors import require_literal
from capsexp.layer.capsule_norm import CapsuleNorm, Norm, Per, require_norm
from capsexp.layer.matrix_start import Initialisation
from capsexp.ops.receptive_fields import Padding, padded


class MatrixPrimaryCaps(nn.Module):
    """Primary capsules of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), section 4.

    Differs from it in: nothing. The paper does not mention biases; the authors' code has none, which agrees
    with the paper's numbers of parameters.

    Args:
        in_channels: A, channels of the features.
        types: B, capsule types.
        pose_dim: numbers of a pose.
        kernel, stride: of both convolutions; 1 in the paper.
        padding: "valid", as in the paper, or "same": with zeros around, so that stride 1 keeps the grid.
        norm: "none"; or "batch" or "group": normalize poses, and activations before the sigmoid, with a gain
            and a bias per type (Ribeiro et al. 2020). See `CapsuleNorm`.
        norm_per: "type", or "element": a mean, variance, gain and bias for each number of a type's poses, as
            in Hahn, Pyeon, Kim, "Self-routing capsule networks" (NeurIPS 2019).
        initialisation: "xavier": the kernels start Xavier uniform; any other: as PyTorch's convolutions.
    Raises: ValueError: an unknown option.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        types: int,
        pose_dim: int = 16,
        kernel: int = 1,
        stride: int = 1,
        padding: Padding = "valid",
        norm: Norm = "none",
        norm_per: Per = "type",
        initialisation: Initialisation = "identity",
    ) -> None:
        super().__init__()
        require_norm(norm=norm)
        require_literal(Padding, padding=padding)
        self.types, self.pose_dim = types, pose_dim
        self.pose = nn.Conv2d(in_channels, types * pose_dim, kernel, stride, bias=False)
        self.activation = nn.Conv2d(in_channels, types, kernel, stride, bias=False)
        if initialisation == "xavier":
            nn.init.xavier_uniform_(self.pose.weight)
            nn.init.xavier_uniform_(self.activation.weight)
        self.padding: Padding = padding
        self.norm: CapsuleNorm | None = None
        if norm != "none":
            self.norm = CapsuleNorm(types, pose_dim, norm=norm, per=norm_per, affine=True)

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"types={self.types}, pose_dim={self.pose_dim}"

    def forward(self, features: Float[Tensor, "B C H W"]) -> Capsules:
        """Capsules in the order (row, column, type)."""
        features = padded(features, self.pose.kernel_size[0], self.pose.stride[0], self.padding)
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
