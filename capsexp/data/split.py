"""Images with their labels, and how a validation split is drawn from them."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from capsexp.data.seeds import _permutation, derive_seed

SplitName = Literal["train", "test"]


class Split(NamedTuple):
    """Pictures with their classes."""

    images: UInt8[Tensor, "N C H W"]
    labels: Int64[Tensor, " N"]
    """Class of each picture, 0 … classes-1."""

    def take(self, indices: Int64[Tensor, " M"]) -> "Split":
        """The pictures at these positions, in this order."""
        return Split(self.images[indices], self.labels[indices])

    @property
    def size(self) -> int:
        """Number of pictures (`len` and `count` are those of a tuple)."""
        return len(self.labels)


def split_validation(split: Split, *, count: int | float, seed: int) -> tuple[Split, Split]:
    """Set pictures aside for validation, chosen by `seed`.

    Args:
        split: the training part.
        count: pictures to set aside: an integer >= 0, or a share in (0, 1).
        seed: chooses which.

    Returns:
        What is left for training, and the validation pictures, both in their original order.

    Raises:
        ValueError: nothing would be left to train on.
    """
    wanted = max(1, round(count * split.size)) if isinstance(count, float) else count
    if not 0 <= wanted < split.size:
        raise ValueError(f"validation must leave a picture to train on: got {count} of {split.size}")
    order = _permutation(split.size, derive_seed(seed, "validation"))
    return split.take(order[wanted:].sort().values), split.take(order[:wanted].sort().values)


def stratified(labels: Int64[Tensor, " N"], *, share: float, seed: int) -> Bool[Tensor, " N"]:
    """True for a share of each class (at least one picture of it), chosen by `seed`."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().flatten()
        order = _permutation(len(members), derive_seed(seed, "stratified", label))
        chosen[members[order[: max(1, round(share * len(members)))]]] = True
    return chosen
