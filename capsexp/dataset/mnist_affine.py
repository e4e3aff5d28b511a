"""MNIST at random positions, tested on affine transforms computed here."""

from collections.abc import Sequence
from math import inf
from typing import Literal

import torch

from capsexp.data.affine import random_affine
from capsexp.data.dataset import Dataset
from capsexp.data.placed import PlacedDataset
from capsexp.data.preprocess import Preprocess
from capsexp.data.seeds import derive_seed
from capsexp.data.split import Split
from capsexp.errors import refuse, require_at_least_1, require_not_negative, require_seed


class MNISTAffine(PlacedDataset):
    """Like `AffNIST`, with test images transformed at random by our own code, over affNIST's ranges.

    An image is scaled, sheared and rotated about its center in one bilinear interpolation, then moved by
    whole pixels to one of the positions that keep all ink on the canvas. The order and the whole pixels are
    our choice. The test images depend only on `affine_seed`: not on a run, batch or device.

    Args:
        source: see `PlacedDataset`.
        canvas: see `PlacedDataset`.
        placement_seed: see `PlacedDataset`.
        test_pictures: `affine`, or `expanded` for the familiar test images.
        rotation: largest angle to either side, in degrees.
        shear: largest shear to either side: the sideways move of the top of a stroke over its height.
        scale: smallest and largest factor, drawn for each axis separately.
        transforms: of each test image. Test image i is a transform of the source's test image i modulo their
            number.
        affine_seed: of the draws. More `transforms` do not change the first ones.
        preprocess: see `PlacedDataset`.

    Raises:
        ValueError: a setting is out of range.
        DataError: on reading the test split, if ink is larger than the canvas.
    """

    name = "mnist_affine"

    def __init__(
        self,
        *,
        source: Dataset,
        canvas: int,
        placement_seed: int,
        test_pictures: Literal["affine", "expanded"],
        rotation: int | float,
        shear: int | float,
        scale: Sequence[int | float],
        transforms: int,
        affine_seed: int,
        preprocess: Preprocess,
    ) -> None:
        require_at_least_1(transforms=transforms)
        if not 0 <= rotation <= 180:
            refuse(f"rotation must be in [0, 180] degrees, got {rotation}")
        require_not_negative(shear=shear)
        require_seed(affine_seed=affine_seed)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] < inf:
            refuse(f"scale must be [lowest, highest] with 0 < lowest <= highest, got {list(scale)}")
        self.rotation, self.shear, self.scale = rotation, shear, scale
        self.transforms, self.affine_seed = transforms, affine_seed
        super().__init__(
            source=source,
            canvas=canvas,
            placement_seed=placement_seed,
            test_pictures=test_pictures,
            preprocess=preprocess,
        )

    def check_test(self) -> int | None:
        """Check the source's test images, and return the number of their transforms."""
        count = self.source.check_test()
        if count is None or self.test_pictures == "expanded":
            return count
        return count * self.transforms

    def _affine(self) -> Split:
        images, labels = self.source.read("test")
        rounds = [
            random_affine(
                images,
                rotation=self.rotation,
                shear=self.shear,
                scale=self.scale,
                canvas=self.canvas,
                seed=derive_seed(self.affine_seed, number, "affine"),
            )
            for number in range(self.transforms)
        ]
        return Split(torch.cat(rounds), labels.repeat(self.transforms))
