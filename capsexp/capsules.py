"""The types that flow from a dataset through a network into a loss. Read this first.

Shape letters, here and everywhere: B batch; I, J input and output capsules of a layer; D pose size;
C H W channels, height and width of an image; T classes per image. Where each image shows one class there is
no such axis: labels are [B]. The labels of MultiMNIST, with two digits per image, are [B, 2]. `*T` stands for
both.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


class Mixed(NamedTuple):
    """The other image in each image of a batch that was mixed (mixup)."""

    labels: Int[Tensor, " B"]
    """Class of the other image."""
    share: float
    """Share in [0.5, 1] of the image that `Batch.labels` belongs to."""


class Batch(NamedTuple):
    """Images on the training device, as the network and the loss take them."""

    images: Float[Tensor, "B C H W"]
    """The network's input; standardized if the dataset's preprocessing is set to."""
    labels: Int[Tensor, " B *T"]
    """Class of each image, 0 … J-1; or its T classes, all different."""
    pixels: Float[Tensor, "B *T C H W"]
    """Target of the decoder: the same images in [0, 1], never standardised. For several classes per image:
    the images that it was made of, each alone, in the order of the labels."""
    indices: Int[Tensor, " B *T"]
    """Position in the split of each image, or of those that it was made of, for error messages."""
    mixed: Mixed | None = None
    """None: not mixed. Otherwise the loss is the mean of those with both labels, by shares."""

    def take(self, rows: slice | Int[Tensor, " R"] | Bool[Tensor, " B"]) -> "Batch":
        """Return some of the images with all that belongs to them."""
        mixed = self.mixed and self.mixed._replace(labels=self.mixed.labels[rows])
        return Batch(self.images[rows], self.labels[rows], self.pixels[rows], self.indices[rows], mixed)


class Capsules(NamedTuple):
    """The capsules of one layer."""

    poses: Float[Tensor, "B I D"]
    activations: Float[Tensor, "B I"]
    """Probability in [0, 1] that the entity is present; for dynamic routing, the length of the pose."""


class ReceptiveFields(NamedTuple):
    """The children that each position of a convolutional layer sees (built in ops/receptive_fields.py)."""

    children: Int[Tensor, "P K"]
    """Index of the child at each place of each position's window."""
    in_caps: int
    """Number of children, including those that no window covers."""
    connected: int
    """Number of children that some window covers; a stride may leave out others at the border."""


class Routed(NamedTuple):
    """What a routing algorithm returns for a layer's output capsules."""

    poses: Float[Tensor, "B J D"]
    activations: Float[Tensor, "B J"]
    coupling: Float[Tensor, "B *I J"]
    """Share of input capsule i that goes to output capsule j, in the last iteration (c_ij; R_ij).

    Where every parent sees every child: [B, I, J]. In a convolutional layer: [B, P, K, types], the share of
    the child at each place of each parent position's window; `fields` says which child that is.
    """
    fields: ReceptiveFields | None = None
    """None where every parent sees every child."""
    scores: Float[Tensor, "B J"] | None = None
    """Unbounded scores of the output capsules, for a cross-entropy; activations = sigmoid(scores). None for a
    routing whose activations are no function of a score."""


class Output(NamedTuple):
    """What a network returns. Studies read the layers from here, so no hooks are needed."""

    scores: Float[Tensor, "B J"]
    """Input of the loss: lengths, activations or scores of the class capsules, or logits of a CNN."""
    probabilities: Float[Tensor, "B J"]
    """Per class, in [0, 1]. Lengths and activations are independent: they need not add up to 1."""
    layers: dict[str, Capsules | Routed] = {}  # noqa: RUF012 - never written to
    """The capsules of every layer, by its name, from the primary to the class capsules."""
    reconstruction: Float[Tensor, "B *T C H W"] | None = None
    """Decoded image in [0, 1], one for each label given; None without a decoder."""
    weights: tuple[Tensor, ...] = ()
    """Kernels and matrices, to which a loss applies weight decay; no biases."""
