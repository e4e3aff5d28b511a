"""Images with their labels, and how validation images are set aside."""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from capsexp.data.seeds import derive_seed, permutation
from capsexp.errors import DataError

SplitName = Literal["train", "test"]


class Split(NamedTuple):
    """Images with their labels."""

    images: UInt8[Tensor, "N C H W"]
    labels: Int64[Tensor, " N"]
    """Class of each image, 0 … classes - 1."""

    def take(self, indices: Int64[Tensor, " M"]) -> "Split":
        """Return the images at these positions, in this order."""
        return Split(self.images[indices], self.labels[indices])

    @property
    def size(self) -> int:
        """Number of images (`len` and `count` are those of a tuple)."""
        return len(self.labels)


class Groups(NamedTuple):
    """Images that belong together, such as all views of one toy. Errors come in groups."""

    kind: str
    """What a group is, such as `toy`."""
    names: tuple[str, ...]
    """Of the groups."""
    of: Int64[Tensor, " N"]
    """Group of each image, 0 … groups - 1, in the order of the split."""


def split_validation(split: Split, *, count: int | float, seed: int) -> tuple[Split, Split]:
    """Set images aside for validation, chosen by `seed`.

    Args:
        split: the training images.
        count: images to set aside: an integer >= 0, or a share in (0, 1).
        seed: chooses which.

    Returns:
        The remaining training images and the validation images, both in their original order.

    Raises:
        DataError: nothing would be left to train on.
    """
    size = validation_size(count, split.size)
    order = permutation(split.size, derive_seed(seed, "validation"))
    return split.take(order[size:].sort().values), split.take(order[:size].sort().values)


def validation_size(count: int | float, size: int) -> int:
    """Return how many of `size` training images are set aside for validation; see `split_validation`.

    Raises:
        DataError: nothing would be left to train on.
    """
    number = max(1, round(count * size)) if isinstance(count, float) else count
    if not 0 <= number < size:
        raise DataError(f"validation must leave an image to train on, got {count} of {size}")
    return number


def stratified(labels: Int64[Tensor, " N"], *, share: float, seed: int) -> Bool[Tensor, " N"]:
    """Return True for a share of each class, chosen by `seed`, and for at least one image of each."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().flatten()
        order = permutation(len(members), derive_seed(seed, "stratified", label))
        chosen[members[order[: max(1, round(share * len(members)))]]] = True
    return chosen


def draw_by_name(
    classes: Iterable[Sequence[str]], *, amount: int | float, seed: int, purpose: str
) -> set[str]:
    """Draw files by their own names, so that another file changes no draw.

    Every file has a number in [0, 1) that depends only on its name, `seed` and `purpose`. A share draws the
    files whose number is below it, and at least the lowest of all. A count draws the lowest numbers. The
    highest number of each class is never drawn. So another file changes a draw only at these limits: if
    nothing is below the share, if it gets the highest number of its class, or with a count.

    Args:
        classes: for each class the paths of its files, which contain the name of the class.
        amount: a count >= 0, or a share in (0, 1), from which the share drawn differs at random.
        seed: of the numbers.
        purpose: name of the setting that asks for the draw; other purposes have other numbers.

    Raises:
        ValueError: `amount` leaves a class without a file.
    """
    allowed: list[tuple[float, str]] = []
    for names in classes:
        allowed += sorted((name_number(name, seed=seed, purpose=purpose), name) for name in names)[:-1]
    allowed.sort()
    below = sum(number < amount for number, _ in allowed)
    count = amount if isinstance(amount, int) else max(1, below)
    if count > len(allowed):
        raise ValueError(
            f"{purpose} must leave an image of every class to train on, got {amount}: at most "
            f"{len(allowed)} images can be drawn; use more images, or 0 for none"
        )
    return {name for _, name in allowed[:count]}


def name_number(name: str, *, seed: int, purpose: str) -> float:
    """Return a number in [0, 1), a function of a file's name in Unicode's composed form and the seed."""
    return derive_seed(seed, purpose, unicodedata.normalize("NFC", name)) / 2**63
