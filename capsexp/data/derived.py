"""Datasets made from the images of another dataset, with that dataset's files and classes."""

from collections.abc import Sequence
from pathlib import Path

from capsexp.data.checked_files import Progress
from capsexp.data.dataset import Dataset
from capsexp.data.manifest import SPLITS, ListedSplit, Manifest
from capsexp.data.preprocess import Preprocess


class DerivedDataset(Dataset):
    """A dataset whose files and classes are those of its source.

    A subclass sets `file_shape` before it calls this constructor.

    Args:
        source: the dataset that the images come from.
        preprocess, validation, split_seed: see `Dataset`.
    """

    has_known_files = True

    def __init__(
        self, source: Dataset, *, preprocess: Preprocess, validation: int | float, split_seed: int
    ) -> None:
        self.source, self.classes = source, source.classes
        self.lists_files = source.lists_files
        self.folder: Path | None = source.folder
        super().__init__(preprocess=preprocess, validation=validation, split_seed=split_seed)

    def manifest(self, splits: Sequence[ListedSplit] = SPLITS) -> Manifest:
        """Return what a run stores of the source's data."""
        return self.source.manifest(splits)

    def require_stored(self, splits: Sequence[ListedSplit]) -> None:
        """Do nothing: the source checks its own data when it is read."""

    def missing_files(self) -> list[str]:
        """Return the names of the source's missing files."""
        return self.source.missing_files()

    def damaged_files(self) -> list[str]:
        """Return the names of the source's damaged files."""
        return self.source.damaged_files()

    def require_files(self) -> None:
        """Raise an error if the source's files are missing."""
        self.source.require_files()

    def prepare(self, progress: Progress) -> None:
        """Download the source's missing and damaged files."""
        self.source.prepare(progress)

    def problems(self) -> list[str]:
        """Return one line for every missing or damaged file of the source."""
        return self.source.problems()

    def caveats(self) -> list[str]:
        """Return the source's caveats."""
        return self.source.caveats()

    def check_test(self) -> int | None:
        """Check the files of the source's test split, and return the number of its images."""
        return self.source.check_test()

    def notes(self) -> list[str]:
        """Return lines about how the source's files are read."""
        return self.source.notes()
