"""Batches of a split that is kept as bytes on the training device."""

import copy
from collections.abc import Iterator
from typing import TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor

from capsexp.capsules import Batch, Mixed
from capsexp.data.image_ops import require_bytes
from capsexp.data.preprocess import Preprocess, Preprocessed
from capsexp.data.seeds import derive_seed, epoch_order
from capsexp.data.split import Split


class BatchOptions(TypedDict):
    """The keyword arguments of `Batches` that do not depend on the dataset."""

    batch_size: int
    seed: int
    device: torch.device | str
    memory_format: torch.memory_format
    limit: int | None


class Batches:
    """A split on the training device, in batches. The last batch of an epoch may be smaller.

    Args:
        split: the images; moved to `device` once, here.
        preprocess: applied to each batch.
        batch_size: images in a batch.
        seed: of the order and the augmentation.
        device: where the images are kept and the batches are made.
        memory_format: of the network's input.
        limit: largest number of batches per epoch; None for all.

    Raises:
        ValueError: no images, images that are not uint8, or `batch_size` or `limit` below 1.
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
            raise ValueError("split must have >= 1 image, got 0")
        require_bytes(split.images)
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1 batch or null, got {limit}")
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.preprocess, self.batch_size, self.seed = preprocess, batch_size, seed
        self.device, self.memory_format = self.images.device, memory_format
        self.limit = limit
        self.count = split.size
        """Images in an epoch without a limit."""
        self.positions = torch.arange(split.size)
        """Positions of the images that `in_order` and `views` return."""

    def __len__(self) -> int:
        """Batches per epoch."""
        batches = -(-self.count // self.batch_size)
        return batches if self.limit is None else min(self.limit, batches)

    @property
    def visited(self) -> int:
        """Images in an epoch: all, unless a limit ends it early."""
        return min(self.count, len(self) * self.batch_size)

    def for_training(self) -> "Batches":
        """Return the batches to train on; a subclass that repeats images for evaluation returns each once."""
        return self

    def subset(self, positions: Int64[Tensor, " N"]) -> "Batches":
        """Return these batches with only the images at these positions; for `in_order` and `views`."""
        subset = copy.copy(self)
        subset.count, subset.positions = len(positions), positions
        return subset

    def training(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield one epoch, shuffled and augmented, from batch number `start` on.

        Batch `b` of epoch `e` depends only on (seed, e, b).
        """
        order = epoch_order(self.count, seed=self.seed, epoch=epoch).to(self.device)
        for number in range(start, len(self)):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, number, "augmentation"))
            indices = self._slice(order, number)
            yield self._batch(indices, self.preprocess.train(self.images[indices], generator))

    def in_order(self) -> Iterator[Batch]:
        """Yield all images in their order in the split, without augmentation."""
        for indices in self._ordered_indices():
            yield self._batch(indices, self.preprocess.test(self.images[indices]))

    def views(self) -> Iterator[list[Batch]]:
        """Yield the batches of `in_order`, each followed by the other test crops of its images, if any."""
        for indices in self._ordered_indices():
            views = self.preprocess.test_views(self.images[indices])
            yield [self._batch(indices, view) for view in views]

    def _ordered_indices(self) -> Iterator[Int64[Tensor, " B"]]:
        order = self.positions.to(self.device)
        yield from (self._slice(order, number) for number in range(len(self)))

    def _slice(self, order: Int64[Tensor, " N"], number: int) -> Int64[Tensor, " B"]:
        return order[number * self.batch_size : (number + 1) * self.batch_size]

    def _batch(self, indices: Int64[Tensor, " B"], preprocessed: Preprocessed) -> Batch:
        images = preprocessed.images.contiguous(memory_format=self.memory_format)
        pixels = images if preprocessed.images is preprocessed.pixels else preprocessed.pixels
        labels, mixup = self.labels[indices], preprocessed.mixup
        mixed = None if mixup is None else Mixed(labels[mixup.partners], mixup.share)
        return Batch(images, labels, pixels, indices, mixed)
