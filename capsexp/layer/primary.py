"""The first capsules: a convolution whose channels form small vectors."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules
from capsexp.errors import require_literal
from capsexp.ops.receptive_fields import Grid, Padding, padded
from capsexp.ops.squash import length, squash


class PrimaryCaps(nn.Module):
    """Primary capsules of Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 4.

    One convolution makes types x dim channels; a type's dim channels at a place are one capsule, squashed.
    Differs from it in: nothing, with scale 1.0 and padding "valid".

    Args:
        in_channels: channels of the features.
        types: capsule types, each with its own kernels, shared by all places.
        dim: pose size.
        kernel, stride: of the convolution, in pixels.
        padding: "valid", or "same" as in TensorFlow: ceil(size / stride) places, the odd zero at the end.
        scale: factor on the convolution before its bias. The authors' code has 1/32, from a softmax over its
            32 types; it acts as a smaller initialisation and learning rate of this layer.
    Raises: ValueError: an unknown padding.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        types: int = 32,
        dim: int = 8,
        kernel: int = 9,
        stride: int = 2,
        padding: Padding = "valid",
        scale: int | float = 1.0,
    ) -> None:
        super().__init__()
        require_literal(Padding, padding=padding)
        self.types, self.dim, self.scale = types, dim, scale
        self.padding: Padding = padding
        self.conv = nn.Conv2d(in_channels, types * dim, kernel, stride)

    def grid(self, features: Grid) -> Grid:
        """Places of the capsules on features with this grid; 0 rows or less if it is too small."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        return features.after_convolution((kernel, kernel), stride, self.padding)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Capsules:
        """Capsules in the order (row, column, type)."""
        features = padded(features, self.conv.kernel_size[0], self.conv.stride[0], self.padding)
        # In channels_last memory this order is a view; (type, row, column) would copy.
        places = self._convolve(features).permute(0, 2, 3, 1)  # [B, H, W, types * dim]
        poses = squash(places.reshape(len(features), -1, self.dim))
        return Capsules(poses, length(poses))

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"types={self.types}, dim={self.dim}, padding={self.padding!r}, scale={self.scale}"

    def _convolve(self, features: Tensor) -> Tensor:
        if self.scale == 1:
            return self.conv(features)
        # Scale the weight, which is smaller than the result.
        return F.conv2d(features, self.conv.weight * self.scale, self.conv.bias, self.conv.stride)
