"""Two digits in one picture: MultiMNIST, or the same with the pictures of any other set of one channel."""

from typing import Any

from torch.nn import functional as F

from capsexp.data.batches import Batches
from capsexp.data.dataset import Dataset
from capsexp.data.derived import DerivedDataset
from capsexp.data.pairs import OverlaidPairs
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split, SplitName

PAPERS_PARTNERS = 1000


class MultiMNIST(DerivedDataset):
    """Each picture overlaid with another of the same split but another class, both shifted.

    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 6. Pairs are made on the fly: an
    epoch of training overlays every picture once. Differs from it in: the number of pairs, unless
    `test_partners` is 1,000; that validation and test pairs are fixed.
    The authors' code also moves a base picture in the same way for all of its partners; here each pair has
    its own shifts.

    Pictures, classes, files, the validation slice and `split_seed` are the source's. Of its `preprocess` only
    `resize` counts, as it is done once when the pictures are read: shift, crop and flip would be a second
    shift, and a change of light would not be the same for the two pictures and for their sum.

    Args:
        source: the set that the single pictures come from.
        shift: each is moved by its own integer in -shift ... shift along each axis.
        pad: rows and columns that the canvas adds to the single pictures on each side; what a larger shift
            moves beyond them is cut off.
        pair_seed: of the pairs for validation and test, which no setting of a run changes.
        test_partners: pairs in which each picture is the base, for validation and for test.

    Raises:
        ValueError: a setting is out of its range; the source's pictures are not of one channel and class.
    """

    name = "multimnist"
    targets = 2

    def __init__(self, *, source: Dataset, shift: int, pad: int, pair_seed: int, test_partners: int) -> None:
        channels, height, width = source.raw_shape
        if channels != 1 or source.targets != 1:
            raise ValueError(
                f"source must have pictures of one channel that show one class, got {source.name}, "
                f"which has {channels} and {source.targets}"
            )
        smallest = {"shift": 0, "pad": 0, "pair_seed": 0, "test_partners": 1}
        given = {"shift": shift, "pad": pad, "pair_seed": pair_seed, "test_partners": test_partners}
        for key, value in given.items():
            if value < smallest[key]:
                raise ValueError(f"{key} must be >= {smallest[key]}, got {value}")
        if shift >= pad + min(height, width):
            raise ValueError(f"shift must be < pad + the picture's {height}x{width}, got {shift}")
        self.shift, self.pad = shift, pad
        self.pair_seed, self.test_partners = pair_seed, test_partners
        self.stored_shape = (channels, height + 2 * pad, width + 2 * pad)
        super().__init__(
            source, preprocess=_bytes_to_unit(), validation=source.validation, split_seed=source.split_seed
        )

    def read_training(self) -> tuple[Split, Split]:
        """The source's training part without its validation slice, and that slice; single pictures."""
        training, validation = self.source.read_training()
        return self._on_canvas(training), self._on_canvas(validation)

    def familiar(self) -> Split | None:
        """The source's."""
        split = self.source.familiar()
        return None if split is None else self._on_canvas(split)

    def batches(self, split: Split, *, training: bool = False, **options: Any) -> Batches:
        """Pairs of a split's images; see `OverlaidPairs`. For training each picture is the base of one."""
        return OverlaidPairs(
            split,
            self.preprocess,
            shift=self.shift,
            margin=self.pad,
            partners=1 if training else self.test_partners,
            pair_seed=self.pair_seed,
            **options,
        )

    def caveats(self) -> list[str]:
        """The source's, and how many pairs there are where the paper has a thousand for each picture."""
        if self.test_partners >= PAPERS_PARTNERS:
            return self.source.caveats()
        of = f"{self.name} of {self.source.name}"
        size = f"pairs for each test picture: {self.test_partners:,}; in the paper {PAPERS_PARTNERS:,}"
        return [*self.source.caveats(), f"{of}, {size}"]

    def _load(self, part: SplitName) -> Split:
        return self._on_canvas(self.source.read(part))

    def _on_canvas(self, split: Split) -> Split:
        return Split(F.pad(split.images, [self.pad] * 4), split.labels)


def _bytes_to_unit() -> Preprocess:
    """No change but the one to [0, 1]."""
    return Preprocess(
        resize=None,
        shift=0,
        crop=None,
        flip=False,
        brightness=0,
        contrast=None,
        light="window",
        standardise=None,
        test_crops=1,
    )
