"""Two pictures of different classes, each shifted by itself, in one: MultiMNIST from any other set."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Int16, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsexp.capsules import Batch
from capsexp.data.batches import Batches
from capsexp.data.preprocess import Preprocess, windows
from capsexp.data.seeds import derive_seed, epoch_order
from capsexp.data.split import Split
from capsexp.errors import UserError

Boxes = Int[Tensor, "B 2 2 2"]
"""Of each picture of a pair, the first row and column, and those behind the last."""


class Drawn(NamedTuple):
    """What chance decides about pairs."""

    partners: Int64[Tensor, " B"]
    """Position in the split of the picture that each base picture is overlaid with."""
    shifts: Int16[Tensor, "B 2 2"]
    """Rows and columns by which base and partner are moved."""


class OverlaidPairs(Batches):
    """Each picture of a split overlaid with others of the same split, of any class but its own.

    Training draws anew in every epoch, as a function of (seed, epoch, batch). `in_order` gives fixed pairs, a
    function of `pair_seed` and the split alone: first every picture with one partner, then every one with
    another. All is drawn on the CPU and made on the device.

    Args:
        split: single pictures, in the middle of the canvas.
        shift: each is moved by its own integer in -shift ... shift along each axis; what leaves the canvas
            is cut off.
        margin: rows and columns on each side of the pictures that the canvas adds.
        partners: of each picture, in `in_order`.
        pair_seed: of the fixed pairs.
        preprocess, options: see `Batches`; of `preprocess`, only its way from bytes to [0, 1] counts.

    Raises:
        UserError: all pictures are of one class.
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
        **options: Any,
    ) -> None:
        super().__init__(split, preprocess, **options)
        self.shift, self.margin, self.pair_seed = shift, margin, pair_seed
        self.singles, self.partners = split.size, partners
        self.count = split.size * partners
        self.places = torch.arange(self.count)
        self._labels = split.labels.cpu()
        if bool((self._labels == self._labels[0]).all()):
            raise UserError(
                f"pairs need pictures of two classes, and all {split.size} of this split are of one class"
            )
        self._by_class = self._labels.argsort(stable=True)
        self._sizes = self._labels.bincount()
        self._starts = self._sizes.cumsum(0) - self._sizes

    def training(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """One epoch from batch number `start` on: each picture with a new partner and new shifts."""
        order = epoch_order(self.count, seed=self.seed, epoch=epoch)
        for number in range(start, len(self)):
            bases = self._slice(order, number) % self.singles
            yield self._overlaid(bases, self._draw(bases, self.seed, epoch, number, "augmentation"))

    def in_order(self) -> Iterator[Batch]:
        """The fixed pairs."""
        for bases, drawn in self._fixed_pairs():
            yield self._overlaid(bases, drawn)

    def views(self) -> Iterator[list[Batch]]:
        """The fixed pairs; there are no crops of them."""
        for batch in self.in_order():
            yield [batch]

    def overlap(self) -> dict[str, float]:
        """What the two pictures of a fixed pair share: mean over the pairs of shared area over box area.

        Returns:
            `frames`: of the two shifted frames, which are as large as the single pictures. `ink`: of the
            boxes around all pixels above 0, as they are on the canvas; the area that the shared one is
            divided by is the mean of the two.
        """
        sums = {"frames": 0.0, "ink": 0.0}
        _, height, width = self.images.shape[1:]
        frame = torch.tensor([[self.margin] * 2, [height - self.margin, width - self.margin]])
        for bases, drawn in self._fixed_pairs():
            sums["frames"] += _shared(frame + drawn.shifts.unsqueeze(2)).sum().item()
            sums["ink"] += _shared(_ink(self._shifted(bases, drawn))).sum().item()
        return {name: total / self.visited for name, total in sums.items()}

    @cached_property
    def _fixed(self) -> Drawn:
        everyone = torch.arange(self.singles)
        rounds = [self._draw(everyone, self.pair_seed, "pairs", number) for number in range(self.partners)]
        return Drawn(*(torch.cat(fields) for fields in zip(*rounds, strict=True)))

    def _fixed_pairs(self) -> Iterator[tuple[Int64[Tensor, " B"], Drawn]]:
        for number in range(len(self)):
            chosen = self._slice(self.places, number)
            yield chosen % self.singles, Drawn(*(field[chosen] for field in self._fixed))

    def _draw(self, bases: Int64[Tensor, " B"], *seed: int | str) -> Drawn:
        """Partners uniform over all pictures of other classes, and shifts."""
        generator = torch.Generator().manual_seed(derive_seed(*seed))
        labels = self._labels[bases]
        others = self.singles - self._sizes[labels]
        draws = torch.rand(len(bases), generator=generator, dtype=torch.float64)
        # A place among the others in the order of classes: from the own class on, that class is stepped over.
        places = (draws * others).long()
        places += torch.where(places < self._starts[labels], 0, self._sizes[labels])
        shifts = torch.randint(-self.shift, self.shift + 1, (len(bases), 2, 2), generator=generator)
        return Drawn(self._by_class[places], shifts.to(torch.int16))

    def _shifted(self, bases: Int64[Tensor, " B"], drawn: Drawn) -> UInt8[Tensor, "B 2 C H W"]:
        """Base and partner of each pair, each alone on the canvas."""
        chosen = torch.stack([bases, drawn.partners], dim=1).flatten().to(self.device)
        padded = F.pad(self.images[chosen], [self.shift] * 4)
        corners = self.shift - drawn.shifts.flatten(0, 1).long()
        return windows(padded, corners, *self.images.shape[2:]).unflatten(0, (-1, 2))

    def _overlaid(self, bases: Int64[Tensor, " B"], drawn: Drawn) -> Batch:
        sources = self._shifted(bases, drawn)
        overlay = sources.sum(1, dtype=torch.int16).clamp_max(255).to(torch.uint8)
        images = self.preprocess.test(overlay).images.contiguous(memory_format=self.memory_format)
        pixels = self.preprocess.test(sources.flatten(0, 1)).pixels.unflatten(0, (-1, 2))
        indices = torch.stack([bases, drawn.partners], dim=1).to(self.device)
        return Batch(images, self.labels[indices], pixels, indices)


def _ink(pictures: UInt8[Tensor, "B 2 C H W"]) -> Boxes:
    """The box around all pixels above 0; of no area where there is none."""
    inked = (pictures > 0).any(2)
    ends = []
    for axis in (3, 2):
        there = inked.any(axis).int()
        first, behind = there.argmax(2), there.shape[2] - there.flip(2).argmax(2)
        ends.append(torch.stack([first, torch.where(there.any(2), behind, first)], dim=2))
    return torch.stack(ends, dim=3).cpu()


def _shared(boxes: Boxes) -> Float[Tensor, " B"]:
    """Area of what two boxes share over the mean of their areas; 0 where neither has any."""
    first, behind = boxes[:, :, 0].amax(1), boxes[:, :, 1].amin(1)
    shared = (behind - first).clamp_min(0).prod(1).double()
    areas = (boxes[:, :, 1] - boxes[:, :, 0]).prod(2).double().mean(1)
    return shared / areas.clamp_min(1)
