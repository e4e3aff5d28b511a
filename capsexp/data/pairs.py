"""Two images of different classes, shifted independently and overlaid: MultiMNIST from any dataset."""

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float, Int, Int16, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsexp.capsules import Batch
from capsexp.data.batches import Batches, BatchOptions
from capsexp.data.image_ops import crop_at
from capsexp.data.preprocess import Preprocess
from capsexp.data.seeds import derive_seed, epoch_order
from capsexp.data.split import Split
from capsexp.errors import UserError

Boxes = Int[Tensor, "B 2 2 2"]
"""For each image of a pair, the first row and column, and those after the last."""


class PairDraw(NamedTuple):
    """The random choices for a batch of pairs."""

    partners: Int64[Tensor, " B"]
    """Position in the split of the image that each base image is overlaid with."""
    shifts: Int16[Tensor, "B 2 2"]
    """Rows and columns by which base and partner are moved."""


class OverlaidPairs(Batches):
    """Each image of a split overlaid with images of other classes from the same split.

    Training draws new pairs in every epoch, as a function of (seed, epoch, batch). `in_order` yields fixed
    pairs, a function of `pair_seed` and the split only: first every image with one partner, then every image
    with another. Pairs are drawn on the CPU and overlaid on the device.

    Args:
        split: single images, in the center of the canvas.
        shift: each image is moved by its own integer in -shift … shift along each axis; what leaves the
            canvas is cut off.
        margin: rows and columns that the canvas adds on each side of the single images.
        partners: number of fixed pairs in which each image is the base.
        pair_seed: of the fixed pairs.
        preprocess, options: see `Batches`; `preprocess` only converts bytes to [0, 1].

    Raises:
        UserError: all images have one class.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        shift: int,
        margin: int,
        partners: int,
        pair_seed: int,
        **options: Unpack[BatchOptions],
    ) -> None:
        super().__init__(split, preprocess, **options)
        self.shift, self.margin, self.pair_seed = shift, margin, pair_seed
        self.singles, self.partners = split.size, partners
        self.count = split.size * partners
        self.positions = torch.arange(self.count)
        self._labels = split.labels.cpu()
        if bool((self._labels == self._labels[0]).all()):
            raise UserError(
                f"pairs need images of two classes, and all {split.size} of this split are of one class"
            )
        self._by_class = self._labels.argsort(stable=True)
        self._sizes = self._labels.bincount()
        self._starts = self._sizes.cumsum(0) - self._sizes

    def for_training(self) -> "OverlaidPairs":
        """Return the same batches with one partner for each image."""
        single = copy.copy(self)
        single.partners, single.count = 1, self.singles
        single.positions = torch.arange(self.singles)
        return single

    def training(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield one epoch from batch number `start` on: each image with a new partner and new shifts."""
        order = epoch_order(self.count, seed=self.seed, epoch=epoch)
        for number in range(start, len(self)):
            bases = self._slice(order, number) % self.singles
            yield self._overlaid(bases, self._draw(bases, self.seed, epoch, number, "augmentation"))

    def in_order(self) -> Iterator[Batch]:
        """Yield the fixed pairs."""
        for bases, draw in self._fixed_batches():
            yield self._overlaid(bases, draw)

    def views(self) -> Iterator[list[Batch]]:
        """Yield the fixed pairs; they have no other crops."""
        for batch in self.in_order():
            yield [batch]

    def overlap(self) -> dict[str, float]:
        """Return the mean overlap of the two images of a fixed pair: shared area over box area.

        Returns:
            `frames`: overlap of the two shifted frames, which are as large as the single images.
            `ink`: overlap of the boxes around all pixels above 0 on the canvas; the area is the mean of both.
        """
        sums = {"frames": 0.0, "ink": 0.0}
        _, height, width = self.images.shape[1:]
        frame = torch.tensor([[self.margin] * 2, [height - self.margin, width - self.margin]])
        for bases, draw in self._fixed_batches():
            sums["frames"] += _overlap(frame + draw.shifts.unsqueeze(2)).sum().item()
            sums["ink"] += _overlap(_ink_boxes(self._shifted(bases, draw))).sum().item()
        return {name: total / self.visited for name, total in sums.items()}

    @cached_property
    def fixed_pairs(self) -> PairDraw:
        """Partners and shifts of the fixed pairs; pair `n` has the base image `n` modulo the split's size."""
        bases = torch.arange(self.singles)
        rounds = [self._draw(bases, self.pair_seed, "pairs", number) for number in range(self.partners)]
        return PairDraw(*(torch.cat(fields) for fields in zip(*rounds, strict=True)))

    def _fixed_batches(self) -> Iterator[tuple[Int64[Tensor, " B"], PairDraw]]:
        for number in range(len(self)):
            chosen = self._slice(self.positions, number)
            yield chosen % self.singles, PairDraw(*(field[chosen] for field in self.fixed_pairs))

    def _draw(self, bases: Int64[Tensor, " B"], *seed: int | str) -> PairDraw:
        """Draw partners, uniform over all images of other classes, and shifts."""
        generator = torch.Generator().manual_seed(derive_seed(*seed))
        labels = self._labels[bases]
        others = self.singles - self._sizes[labels]
        draws = torch.rand(len(bases), generator=generator, dtype=torch.float64)
        # Positions among the images sorted by class, skipping the base image's own class.
        positions = (draws * others).long()
        positions += torch.where(positions < self._starts[labels], 0, self._sizes[labels])
        shifts = torch.randint(-self.shift, self.shift + 1, (len(bases), 2, 2), generator=generator)
        return PairDraw(self._by_class[positions], shifts.to(torch.int16))

    def _shifted(self, bases: Int64[Tensor, " B"], draw: PairDraw) -> UInt8[Tensor, "B 2 C H W"]:
        """Return base and partner of each pair, each on a canvas of its own."""
        chosen = torch.stack([bases, draw.partners], dim=1).flatten().to(self.device)
        padded = F.pad(self.images[chosen], [self.shift] * 4)
        corners = self.shift - draw.shifts.flatten(0, 1).long()
        return crop_at(padded, corners, *self.images.shape[2:]).unflatten(0, (-1, 2))

    def _overlaid(self, bases: Int64[Tensor, " B"], draw: PairDraw) -> Batch:
        sources = self._shifted(bases, draw)
        overlay = sources.sum(1, dtype=torch.int16).clamp_max(255).to(torch.uint8)
        images = self.preprocess.test(overlay).images.contiguous(memory_format=self.memory_format)
        pixels = self.preprocess.test(sources.flatten(0, 1)).pixels.unflatten(0, (-1, 2))
        indices = torch.stack([bases, draw.partners], dim=1).to(self.device)
        return Batch(images, self.labels[indices], pixels, indices)


def _ink_boxes(images: UInt8[Tensor, "B 2 C H W"]) -> Boxes:
    """Return the box around all pixels above 0; its area is 0 where there are none."""
    inked = (images > 0).any(2)
    ends = []
    for axis in (3, 2):
        lines = inked.any(axis).int()
        first, end = lines.argmax(2), lines.shape[2] - lines.flip(2).argmax(2)
        ends.append(torch.stack([first, torch.where(lines.any(2), end, first)], dim=2))
    return torch.stack(ends, dim=3).cpu()


def _overlap(boxes: Boxes) -> Float[Tensor, " B"]:
    """Return the area that two boxes share over the mean of their areas; 0 where both areas are 0."""
    first, end = boxes[:, :, 0].amax(1), boxes[:, :, 1].amin(1)
    shared = (end - first).clamp_min(0).prod(1).double()
    areas = (boxes[:, :, 1] - boxes[:, :, 0]).prod(2).double().mean(1)
    return shared / areas.clamp_min(1)
