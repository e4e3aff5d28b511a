"""MultiMNIST: two overlaid digits in one image, or two images of any other dataset with one channel."""

from typing import Unpack

from torch.nn import functional as F

from capsexp.data.batches import Batches, BatchOptions
from capsexp.data.dataset import Dataset
from capsexp.data.derived import DerivedDataset
from capsexp.data.pairs import OverlaidPairs
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split, SplitName
from capsexp.errors import refuse, require_at_least_1, require_not_negative, require_seed

PAPER_PARTNERS = 1000


class MultiMNIST(DerivedDataset):
    """Each image overlaid with another image of the same split but another class, both shifted.

    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 6. Pairs are made on the fly: an
    epoch of training overlays every image once.
    Differs from it in: the number of pairs, unless `test_partners` is 1,000; validation and test pairs are
    fixed. The authors' code also shifts a base image in the same way for all of its partners; here each pair
    has its own shifts.

    Images, classes, files, the validation images and `split_seed` are the source's. Of its `preprocess` only
    `resize` applies, once, when the images are read: shift, crop and flip would be a second shift, and
    brightness and contrast would not change the two images and their sum in the same way.

    Args:
        source: the dataset that the single images come from.
        shift: each image is moved by its own integer in -shift … shift along each axis.
        pad: rows and columns that the canvas adds on each side of the single images; what a larger shift
            moves beyond them is cut off.
        pair_seed: of the validation and test pairs; no other setting of a run changes these pairs.
        test_partners: number of validation and test pairs in which each image is the base.

    Raises:
        ValueError: a setting is out of range, or the source's images have several channels or labels.
    """

    name = "multimnist"
    labels_per_image = 2

    def __init__(self, *, source: Dataset, shift: int, pad: int, pair_seed: int, test_partners: int) -> None:
        channels, height, width = source.raw_shape
        if channels != 1 or source.labels_per_image != 1:
            refuse(
                f"source must have images with one channel and one label, got {source.name}, "
                f"which has {channels} and {source.labels_per_image}"
            )
        require_at_least_1(test_partners=test_partners)
        require_not_negative(shift=shift, pad=pad)
        require_seed(pair_seed=pair_seed)
        if shift >= pad + min(height, width):
            refuse(f"shift must be < pad + the image's {height}x{width}, got {shift}")
        self.shift, self.pad = shift, pad
        self.pair_seed, self.test_partners = pair_seed, test_partners
        self.file_shape = (channels, height + 2 * pad, width + 2 * pad)
        super().__init__(
            source,
            preprocess=Preprocess.identity(),
            validation=source.validation,
            split_seed=source.split_seed,
        )

    def read_training(self) -> tuple[Split, Split]:
        """Read the source's training images and its validation images; single images on the canvas."""
        training, validation = self.source.read_training()
        return self._on_canvas(training), self._on_canvas(validation)

    def check_test(self) -> int | None:
        """Check the source's test images, and return the number of test pairs."""
        count = self.source.check_test()
        return None if count is None else count * self.test_partners

    def familiar(self) -> Split | None:
        """Read the source's familiar test images, if any; single images on the canvas."""
        split = self.source.familiar()
        return None if split is None else self._on_canvas(split)

    def batches(self, split: Split, **options: Unpack[BatchOptions]) -> Batches:
        """Return pairs of a split's images; see `OverlaidPairs`."""
        return OverlaidPairs(
            split,
            self.preprocess,
            shift=self.shift,
            margin=self.pad,
            partners=self.test_partners,
            pair_seed=self.pair_seed,
            **options,
        )

    def caveats(self) -> list[str]:
        """Return the source's caveats, and the number of pairs if it is below the paper's 1,000 per image."""
        if self.test_partners >= PAPER_PARTNERS:
            return self.source.caveats()
        line = (
            f"{self.name} of {self.source.name}, pairs per test image: {self.test_partners:,}; "
            f"in the paper: {PAPER_PARTNERS:,}"
        )
        return [*self.source.caveats(), line]

    def _load(self, split: SplitName) -> Split:
        return self._on_canvas(self.source.read(split))

    def _on_canvas(self, split: Split) -> Split:
        return Split(F.pad(split.images, [self.pad] * 4), split.labels)
