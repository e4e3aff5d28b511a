"""Batches of a split that lives as bytes on the training device."""

import copy
from collections.abc import Iterator

import torch
from jaxtyping import Int64
from torch import Tensor

from capsexp.capsules import Batch
from capsexp.data.preprocess import Preprocess, Preprocessed
from capsexp.data.seeds import derive_seed, epoch_order
from capsexp.data.split import Split


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
