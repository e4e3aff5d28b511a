"""The types that flow from a data set through a network into a loss. Read this first.

Shape letters, here and everywhere: B batch; I, J input and output capsules of a layer; D pose size;
C H W channels, height and width of a picture; T classes in each picture. Where a picture shows one class
there is no such axis: labels are [B]. MultiMNIST's, of two digits in each picture, are [B, 2]. `*T` stands
for both.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class Batch(NamedTuple):
    """Pictures on the training device, as the network and the loss take them."""

    images: Float[Tensor, "B C H W"]
    """The network's input; standardised where the data set says so."""
    labels: Int[Tensor, " B *T"]
    """Class of each picture, 0 … J-1; or its classes, all different."""
    pixels: Float[Tensor, "B *T C H W"]
    """What a decoder has to reconstruct: the same pictures in [0, 1], never standardised. For several classes
    in each: the pictures that it was made of, each alone, in the order of the labels."""
    indices: Int[Tensor, " B *T"]
    """Position in the split of each picture, or of those that it was made of; a bad one can be named."""


class Capsules(NamedTuple):
    """The capsules of one layer."""

    poses: Float[Tensor, "B I D"]
    activations: Float[Tensor, "B I"]
    """Probability in [0, 1] that the entity is present; for dynamic routing, the length of the pose."""


class ReceptiveFields(NamedTuple):
    """The children that each position of a convolutional layer sees (made in ops/receptive_fields.py)."""

    children: Int[Tensor, "P K"]
    """Index of the child at each place of each position's window."""
    in_caps: int
    """Number of children, seen or not."""
    connected: int
    """Number of children that some parent sees; a stride may leave the others at the border without any."""


class Routed(NamedTuple):
    """What a routing algorithm returns for a layer's output capsules."""

    poses: Float[Tensor, "B J D"]
    activations: Float[Tensor, "B J"]
    coupling: Float[Tensor, "B *I J"]
    """Share of input capsule i that went to output capsule j, in the last iteration (c_ij; R_ij).

    Where every parent sees every child: [B, I, J]. In a convolutional layer: [B, P, K, types], the share of
    the child at each place of each parent position's window; `fields` says which child that is.
    """
    fields: ReceptiveFields | None = None
    """None where every parent sees every child."""


class Output(NamedTuple):
    """What a network returns. Studies read the intermediates from here, so no hooks are needed."""

    scores: Float[Tensor, "B J"]
    """What the loss takes: lengths or activations of the class capsules, or logits of a CNN."""
    probabilities: Float[Tensor, "B J"]
    """Per class, in [0, 1]. For capsules each class stands alone: they need not add up to 1."""
    layers: dict[str, Capsules | Routed] = {}  # noqa: RUF012 - never written to
    """The capsules of every layer, by its name, from the primary to the class capsules."""
    reconstruction: Float[Tensor, "B *T C H W"] | None = None
    """Decoded picture in [0, 1], one for each label that was given; None without a decoder."""
    weights: tuple[Tensor, ...] = ()
    """Kernels and matrices, which a loss with weight decay acts on; no biases."""
