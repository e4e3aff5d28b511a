"""Images of another dataset on a larger black canvas: random positions, and affine transforms to test."""

from abc import abstractmethod
from typing import Literal

import torch
from torch.nn import functional as F

from capsexp.data.dataset import Dataset
from capsexp.data.derived import DerivedDataset
from capsexp.data.image_ops import crop_at
from capsexp.data.preprocess import Preprocess
from capsexp.data.seeds import derive_seed
from capsexp.data.split import Split, SplitName
from capsexp.errors import refuse, require_seed


class PlacedDataset(DerivedDataset):
    """The images of a square dataset, each at a random position on a larger canvas.

    Training images are centered; `preprocess.shift` moves them anew in each epoch. Every validation image and
    every familiar test image has one fixed random position. The validation images are the source's.

    Args:
        source: the dataset that the images come from; of its preprocessing only `resize` applies.
        canvas: side in pixels.
        placement_seed: of the fixed positions. Separate from a run's seed, so that all runs use the same
            images.
        test_pictures: what `read("test")` returns: `affine` for a subclass's own images, `expanded` for the
            familiar ones.
        preprocess: see `Dataset`. Its `shift` may be as large as the margin around an image.

    Raises:
        ValueError: an image cannot be centered on the canvas, or a shift would cut off ink.
    """

    def __init__(
        self,
        *,
        source: Dataset,
        canvas: int,
        placement_seed: int,
        test_pictures: Literal["affine", "expanded"],
        preprocess: Preprocess,
    ) -> None:
        require_seed(placement_seed=placement_seed)
        channels, height, width = source.raw_shape
        self.margin = (canvas - height) // 2
        if height != width or self.margin < 0 or (canvas - height) % 2:
            refuse(
                f"canvas must be the side of the source's square images ({height}x{width}) plus an even "
                f"number of pixels, got {canvas}"
            )
        if preprocess.resize is not None:
            refuse(
                "preprocess.resize must be null: resize images before placing them, with "
                "source.preprocess.resize"
            )
        if preprocess.shift > self.margin:
            refuse(
                f"preprocess.shift must be <= {self.margin}, the margin of {height}x{width} images on a "
                f"canvas of {canvas}x{canvas}, got {preprocess.shift}"
            )
        self.canvas, self.placement_seed = canvas, placement_seed
        self.test_pictures = test_pictures
        self.file_shape = (channels, canvas, canvas)
        super().__init__(source, preprocess=preprocess, validation=0, split_seed=0)

    def read_training(self) -> tuple[Split, Split]:
        """Read the source's training images, centered, and its validation images at their fixed positions."""
        training, validation = self.source.read_training()
        return self.centered(training), self._placed(validation, "validation")

    def familiar(self) -> Split:
        """Read the source's test images, each at its fixed position: the "expanded" test split."""
        return self._placed(self.source.read("test"), "test")

    def centered(self, split: Split) -> Split:
        """Return images of the source in the center of the canvas."""
        return Split(F.pad(split.images, [self.margin] * 4), split.labels)

    @abstractmethod
    def _affine(self) -> Split:
        """Return the affinely transformed test images."""

    def _load(self, split: SplitName) -> Split:
        if split == "train":
            return self.centered(self.source.read("train"))
        return self.familiar() if self.test_pictures == "expanded" else self._affine()

    def _placed(self, split: Split, purpose: str) -> Split:
        generator = torch.Generator().manual_seed(derive_seed(self.placement_seed, purpose, "placement"))
        corners = torch.randint(2 * self.margin + 1, (split.size, 2), generator=generator)
        padded = F.pad(split.images, [2 * self.margin] * 4)
        return Split(crop_at(padded, corners, self.canvas, self.canvas), split.labels)
