"""The convolutional baseline of Sabour et al. 2017."""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor, nn

from capsexp.capsules import Output
from capsexp.errors import refuse, require_at_least_1, require_in, stop_if_refused
from capsexp.ops.receptive_fields import require_kernels
from capsexp.ops.weights import kernels_and_matrices


class CNN(nn.Module):
    """Convolutions, with or without pooling, then fully connected layers with dropout on the last hidden one.

    The baselines of Sabour et al., "Dynamic routing between capsules" (NIPS 2017), sections 5 and 6.
    Differs from them in: nothing. The paper does not print the padding, nor pooling and dropout rate of
    section 5. Padding "same", without pooling in section 5, gives its 35.4 M and 24.56 M parameters.

    Args:
        image_shape: channels, height and width.
        classes: number of classes.
        conv_channels, kernel: of the convolutions, stride 1, ReLU; an odd kernel keeps the size. One
            kernel for all, or one for each.
        pool: side of the max pooling after each convolution; 1 for none.
        hidden: widths of the fully connected ReLU layers.
        dropout: rate, in [0, 1).
    Raises: ValueError: a size below 1; a wrong number of kernels; dropout outside [0, 1); an image too small
        for the pooling.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        conv_channels: Sequence[int],
        kernel: int | Sequence[int],
        pool: int,
        hidden: Sequence[int],
        dropout: int | float,
    ) -> None:
        super().__init__()
        require_at_least_1(conv_channels=conv_channels, kernel=kernel, pool=pool, hidden=hidden)
        require_in("[0, 1)", dropout=dropout)
        kernels = [kernel] * len(conv_channels) if isinstance(kernel, int) else kernel
        if len(kernels) != len(conv_channels):
            refuse(
                f"kernel must be a number or one for each of {len(conv_channels)} convolutions, got {kernel}"
            )
        channels, height, width = image_shape
        require_kernels(image_shape, kernel=kernels)
        stop_if_refused()
        layers: list[nn.Module] = []
        for (before, after), size in zip(pairwise([channels, *conv_channels]), kernels, strict=True):
            layers += [nn.Conv2d(before, after, size, padding="same"), nn.ReLU()]
            if pool > 1:
                layers.append(nn.MaxPool2d(pool))
                height, width = height // pool, width // pool
        if height < 1 or width < 1:
            refuse(
                f"pool must leave a pixel of the image, got {pool} after {len(conv_channels)} convolutions "
                f"of {image_shape[1]}x{image_shape[2]}"
            )
        layers.append(nn.Flatten())
        for before, after in pairwise([conv_channels[-1] * height * width, *hidden]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(hidden[-1], classes))

    def forward(self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B *T"] | None = None) -> Output:
        """Logits and their softmax. The labels are not used."""
        logits = self.layers(images)
        return Output(scores=logits, probabilities=logits.softmax(1), weights=kernels_and_matrices(self))
