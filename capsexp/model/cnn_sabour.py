"""The convolutional baseline of Sabour et al. 2017."""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Output
from capsexp.errors import require_at_least_1
from capsexp.ops.weights import kernels_and_matrices


class CNN(nn.Module):
    """Convolutions, with or without pooling, then fully connected layers with dropout on the last hidden one.

    The baseline of Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 5.
    Differs from it in: nothing. Padding, pooling and the dropout rate are not printed: padding "same" without
    pooling gives the paper's 35.4 M parameters.

    Args:
        image_shape: channels, height and width.
        classes: number of classes.
        conv_channels, kernel: of the convolutions, stride 1, ReLU; an odd kernel keeps the size.
        pool: side of a maximum pooling after each convolution; 1 for none.
        hidden: widths of the fully connected ReLU layers.
        dropout: rate, in [0, 1).
    Raises: ValueError: a size below 1; dropout outside [0, 1); a picture that pooling leaves nothing of.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        conv_channels: Sequence[int],
        kernel: int,
        pool: int,
        hidden: Sequence[int],
        dropout: int | float,
    ) -> None:
        super().__init__()
        require_at_least_1(conv_channels=conv_channels, kernel=kernel, pool=pool, hidden=hidden)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for before, after in pairwise([channels, *conv_channels]):
            layers += [nn.Conv2d(before, after, kernel, padding="same"), nn.ReLU()]
            if pool > 1:
                layers.append(nn.MaxPool2d(pool))
                height, width = height // pool, width // pool
        if height < 1 or width < 1:
            raise ValueError(
                f"pool must leave a pixel of the picture, got {pool} after {len(conv_channels)} convolutions "
                f"of {image_shape[1]}x{image_shape[2]}"
            )
        layers.append(nn.Flatten())
        for before, after in pairwise([conv_channels[-1] * height * width, *hidden]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(hidden[-1], classes))

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"] | None = None) -> Output:
        """Logits and their softmax; the labels change nothing here."""
        logits = self.layers(images)
        return Output(scores=logits, probabilities=logits.softmax(1), weights=kernels_and_matrices(self))
