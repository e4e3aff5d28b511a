"""Pictures of another data set on a larger black canvas: training on places, testing on affine transforms."""

from abc import abstractmethod
from typing import Literal

import torch
from torch.nn import functional as F

from capsexp.data.dataset import Dataset
from capsexp.data.derived import DerivedDataset
from capsexp.data.preprocess import Preprocess, windows
from capsexp.data.seeds import derive_seed
from capsexp.data.split import Split, SplitName


class PlacedDataset(DerivedDataset):
    """The images of a square dataset, each at a random place on a larger canvas..

    Training pictures lie in the middle: `preprocess.shift` places them anew in each epoch. Validation and
    familiar test pictures each have one random place for good. The validation slice is the source's.

    Args:
        source: the set that the pictures are from; of its preprocessing only `resize` counts.
        canvas: side in pixels.
        placement_seed: of the fixed places. Not the seed of a run, so runs are compared on the same pictures.
        test_pictures: what `read("test")` gives: those that subclasses provide, or the familiar ones.
        preprocess: see `Dataset`. Its `shift` may be as large as the margin around a picture.

    Raises:
        ValueError: a picture has no middle place on the canvas, or a shift would take ink from it.
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
        channels, height, width = source.raw_shape
        self.margin = (canvas - height) // 2
        if height != width or self.margin < 0 or (canvas - height) % 2:
            raise ValueError(
                f"canvas must be the side of the source's square pictures ({height}x{width}) and an even "
                f"number of pixels more, got {canvas}"
            )
        if preprocess.resize is not None:
            raise ValueError(
                "preprocess.resize must be null: resize what is placed, with source.preprocess.resize"
            )
        if preprocess.shift > self.margin:
            raise ValueError(
                f"preprocess.shift must be <= {self.margin}, the margin of {height}x{width} pictures on a "
                f"canvas of {canvas}x{canvas}, got {preprocess.shift}"
            )
        self.canvas, self.placement_seed = canvas, placement_seed
        self.test_pictures = test_pictures
        self.stored_shape = (channels, canvas, canvas)
        super().__init__(source, preprocess=preprocess, validation=0, split_seed=0)

    def read_training(self) -> tuple[Split, Split]:
        """The source's training pictures in the middle, and its validation pictures at their places."""
        training, validation = self.source.read_training()
        return self._centred(training), self._placed(validation, "validation")

    def familiar(self) -> Split:
        """The source's test pictures, each at its place: the "expanded" test set."""
        return self._placed(self.source.read("test"), "test")

    @abstractmethod
    def _affine(self) -> Split:
        """The test pictures of the other kind."""

    def _load(self, part: SplitName) -> Split:
        if part == "train":
            return self._centred(self.source.read("train"))
        return self.familiar() if self.test_pictures == "expanded" else self._affine()

    def _centred(self, split: Split) -> Split:
        return Split(F.pad(split.images, [self.margin] * 4), split.labels)

    def _placed(self, split: Split, purpose: str) -> Split:
        generator = torch.Generator().manual_seed(derive_seed(self.placement_seed, purpose, "placement"))
        corners = torch.randint(2 * self.margin + 1, (split.size, 2), generator=generator)
        everywhere = F.pad(split.images, [2 * self.margin] * 4)
        return Split(windows(everywhere, corners, self.canvas, self.canvas), split.labels)
