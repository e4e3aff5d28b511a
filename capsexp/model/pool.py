"""The control without capsules: the trunk of Heinsen 2019, a global mean, one linear map."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Output
from capsexp.errors import stop_if_refused
from capsexp.layer.capsule_norm import Norm
from capsexp.layer.trunk import Trunk, require_trunk
from capsexp.ops.weights import kernels_and_matrices


class PoolNet(nn.Module):
    """Logits from the mean of the trunk's features over all positions.

    Ours: what a routing on the same trunk must beat at equal time (see `TrunkCapsNet`).

    Args:
        image_shape: channels, height and width.
        classes: number of classes.
        channels, strides, coordinates, trunk_norm: see `Trunk`.
    Raises: ValueError: see `Trunk`.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        coordinates: bool,
        trunk_norm: Norm,
    ) -> None:
        super().__init__()
        require_trunk(image_shape, channels=channels, strides=strides, norm=trunk_norm)
        stop_if_refused()
        self.trunk = Trunk(
            image_shape, channels=channels, strides=strides, coordinates=coordinates, norm=trunk_norm
        )
        self.linear = nn.Linear(self.trunk.channels, classes)

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B *T"] | None = None) -> Output:
        """Logits and their softmax. The labels are not used."""
        logits = self.linear(self.trunk(images).mean((2, 3)))
        return Output(scores=logits, probabilities=logits.softmax(1), weights=kernels_and_matrices(self))
