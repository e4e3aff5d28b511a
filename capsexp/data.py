"""Pictures in memory: what a data set provides, and how batches are drawn from it.

A set lives as bytes on the training device. The order of an epoch and the augmentation of a batch are
functions of (seed, epoch, batch), so training can start at any batch and there is no state to save.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from capsexp.capsules import Batch
from capsexp.download import DataError, Progress
from capsexp.preprocess import Preprocess, Preprocessed, Shape

Part = Literal["train", "test"]


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


class Dataset(ABC):
    """What every data set provides. Its constructor is cheap: no picture is read before `read`.

    Args:
        preprocess: what happens to the pictures on their way to the network.
        validation: pictures of the training part set aside; a number, or a share in (0, 1); 0 for none.
        split_seed: chooses which ones. Not the seed of a run, so runs are compared on the same pictures.
    """

    name: str
    """As in `dataset=NAME`."""
    classes: tuple[str, ...]
    stored_shape: Shape
    """Channels, height, width of the pictures on disk."""
    targets: int = 1
    """Classes in each picture that `batches` gives."""
    folder: Path | None = None
    """Where the files lie; None for a set that needs none."""

    def __init__(self, *, preprocess: Preprocess, validation: int | float, split_seed: int) -> None:
        self.preprocess = preprocess
        self.validation = _as_validation(validation)
        self.split_seed = split_seed
        self.image_shape  # noqa: B018 - a crop larger than the picture is refused here

    @property
    def raw_shape(self) -> Shape:
        """Shape of the pictures in memory; a single picture to be classified is brought to this."""
        return self.preprocess.resized_shape(self.stored_shape)

    @property
    def image_shape(self) -> Shape:
        """Shape that the network gets, after a crop."""
        return self.preprocess.output_shape(self.stored_shape)

    def read(self, part: Part) -> Split:
        """All pictures of one part, verified, on the CPU.

        Raises:
            DataError: files are missing or damaged.
        """
        images, labels = self._load(part)
        if len(images) != len(labels) or tuple(images.shape[1:]) != self.stored_shape:
            raise DataError(
                f"{self.name}: expected {len(labels)} {part} pictures of shape {self.stored_shape}, "
                f"found {len(images)} of shape {tuple(images.shape[1:])}"
            )
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(f"{self.name}: the {part} labels must be 0 … {len(self.classes) - 1}")
        return Split(self.preprocess.resize_all(images), labels)

    def read_training(self) -> tuple[Split, Split]:
        """The training part without its validation slice, and that slice (empty for `validation: 0`)."""
        return split_validation(self.read("train"), count=self.validation, seed=self.split_seed)

    def familiar(self) -> Split | None:
        """Test pictures of the kind that training has seen, where the test part is of another kind.

        None where there is no such difference.
        """
        return None

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        memory_format: torch.memory_format,
        limit: int | None,
        training: bool = False,
    ) -> "Batches":
        """A split of this set in batches; see `Batches`. `training`: for learning, not for figures."""
        return Batches(
            split,
            self.preprocess,
            batch_size=batch_size,
            seed=seed,
            device=device,
            memory_format=memory_format,
            limit=limit,
        )

    def missing(self) -> list[str]:
        """Names of the files that are not there; none for a set that needs no files."""
        return []

    def require_files(self) -> None:  # noqa: B027 - most sets need nothing
        """Refuse to start without the files; nothing to do for a set that needs no files."""

    def prepare(self, progress: Progress) -> None:  # noqa: B027 - most sets need nothing
        """Get what is missing; nothing to do for a set that needs no files."""

    def problems(self) -> list[str]:
        """Every missing or damaged file, one line each. Reads all of them."""
        return []

    def remarks(self) -> list[str]:
        """Lines that must stand beside any figure measured on these data; to be asked once they were read."""
        return []

    @abstractmethod
    def _load(self, part: Part) -> Split:
        """The pictures of one part as they lie on disk, after a check of the files."""


class Batches:
    """A split on the training device, in batches. The last batch of an epoch may be smaller.

    Args:
        split: the pictures; moved to `device` once, here.
        preprocess: what happens to them on the way to the network.
        batch_size: pictures in a batch.
        seed: of the order and the augmentation.
        device: where the batches are wanted.
        memory_format: of the network's input.
        limit: batches per epoch at most; None for all.

    Raises:
        ValueError: no pictures, or `batch_size` or `limit` below 1.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        memory_format: torch.memory_format,
        limit: int | None,
    ) -> None:
        if split.size == 0:
            raise ValueError("split must have >= 1 picture, got 0")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1 batch or null, got {limit}")
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.preprocess, self.batch_size, self.seed = preprocess, batch_size, seed
        self.device, self.memory_format = self.images.device, memory_format
        self.limit = limit
        self.count = split.size
        """Pictures that there are."""
        self.places = torch.arange(split.size)
        """Which of them `in_order` and `views` go through."""

    def __len__(self) -> int:
        """Batches per epoch."""
        batches = -(-self.count // self.batch_size)
        return batches if self.limit is None else min(self.limit, batches)

    @property
    def visited(self) -> int:
        """Pictures that one epoch visits: all, unless a limit cuts it short."""
        return min(self.count, len(self) * self.batch_size)

    def only(self, places: Int64[Tensor, " N"]) -> "Batches":
        """The same, of the pictures at these places alone; for `in_order` and `views`."""
        fewer = copy.copy(self)
        fewer.count, fewer.places = len(places), places
        return fewer

    def training(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """One epoch, shuffled and augmented, from batch number `start` on.

        Batch `b` of epoch `e` is the same whatever came before it.
        """
        order = epoch_order(self.count, seed=self.seed, epoch=epoch).to(self.device)
        for number in range(start, len(self)):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, number, "augmentation"))
            indices = self._slice(order, number)
            yield self._batch(indices, self.preprocess.train(self.images[indices], generator))

    def in_order(self) -> Iterator[Batch]:
        """All pictures as they lie, with nothing left to chance."""
        for indices in self._as_they_lie():
            yield self._batch(indices, self.preprocess.test(self.images[indices]))

    def views(self) -> Iterator[list[Batch]]:
        """What `in_order` gives, each batch followed by the other crops of the same pictures, if any."""
        for indices in self._as_they_lie():
            views = self.preprocess.test_views(self.images[indices])
            yield [self._batch(indices, view) for view in views]

    def _as_they_lie(self) -> Iterator[Int64[Tensor, " B"]]:
        order = self.places.to(self.device)
        yield from (self._slice(order, number) for number in range(len(self)))

    def _slice(self, order: Int64[Tensor, " N"], number: int) -> Int64[Tensor, " B"]:
        return order[number * self.batch_size : (number + 1) * self.batch_size]

    def _batch(self, indices: Int64[Tensor, " B"], preprocessed: Preprocessed) -> Batch:
        images = preprocessed.images.contiguous(memory_format=self.memory_format)
        pixels = images if preprocessed.images is preprocessed.pixels else preprocessed.pixels
        return Batch(images, self.labels[indices], pixels, indices)


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


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits for the random stream that these parts name: (seed, epoch, batch, purpose)."""
    # Python's hash() of a string changes from process to process.
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(count: int, *, seed: int, epoch: int) -> Int64[Tensor, " N"]:
    """The order of an epoch. Drawn on the CPU, so that it is the same on every device."""
    return _permutation(count, derive_seed(seed, epoch, "order"))


def _permutation(count: int, seed: int) -> Int64[Tensor, " N"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _as_validation(validation: int | float) -> int | float:
    whole = isinstance(validation, int) and not isinstance(validation, bool) and validation >= 0
    if not whole and not (isinstance(validation, float) and 0 < validation < 1):
        raise ValueError(f"validation must be an integer >= 0 or a share in (0, 1), got {validation!r}")
    return validation
