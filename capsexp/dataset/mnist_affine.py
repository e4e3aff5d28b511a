"""MNIST at random places, tested on affine transforms of it that are made here."""

from collections.abc import Sequence
from typing import Literal

import torch

from capsexp.data.affine import randomly_transformed
from capsexp.data.dataset import Dataset
from capsexp.data.placed import PlacedDataset
from capsexp.data.preprocess import Preprocess
from capsexp.data.seeds import derive_seed
from capsexp.data.split import Split
from capsexp.errors import require_at_least_1


class MNISTAffine(PlacedDataset):
    """As `AffNIST`, with test images transformed at random by our own code, over affNIST's ranges.

    A picture is scaled, sheared and turned about its centre in one bilinear interpolation, then moved by
    whole pixels to one of the places that keep all ink on the canvas. The order, and that a place is a whole
    number of pixels, are ours. It depends on `affine_seed` alone: not on a run, batch or device.

    Args:
        source: see `PlacedDataset`.
        canvas: see `PlacedDataset`.
        placement_seed: see `PlacedDataset`.
        test_pictures: `affine`, or `expanded` for the familiar ones.
        rotation: largest angle to either side, in degrees.
        shear: largest shear to either side: by how much of its height the top of a stroke moves sideways.
        scale: smallest and largest factor, drawn for each axis by itself.
        transforms: of each test picture. All pictures come once, then all of them again: number i of the test
            part is made of number i modulo the count of the source's.
        affine_seed: of the draws; a further transform leaves the others as they are.
        preprocess: see `PlacedDataset`.

    Raises:
        ValueError: a range is none, or there are no transforms.
        DataError: when the test part is read, ink that is larger than the canvas.
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
            raise ValueError(f"rotation must be in [0, 180] degrees, got {rotation}")
        if shear < 0:
            raise ValueError(f"shear must be >= 0, got {shear}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be [lowest, highest] with 0 < lowest <= highest, got {list(scale)}")
        self.rotation, self.shear, self.scale = rotation, shear, scale
        self.transforms, self.affine_seed = transforms, affine_seed
        super().__init__(
            source=source,
            canvas=canvas,
            placement_seed=placement_seed,
            test_pictures=test_pictures,
            preprocess=preprocess,
        )

    def _affine(self) -> Split:
        images, labels = self.source.read("test")
        rounds = [
            randomly_transformed(
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
