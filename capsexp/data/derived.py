"""Data sets made from the pictures of another one, whose files and classes are theirs."""

from pathlib import Path

from capsexp.data.dataset import Dataset
from capsexp.data.download import Progress
from capsexp.data.preprocess import Preprocess


class DerivedDataset(Dataset):
    """What such sets leave to their source. A subclass sets `stored_shape` before it calls this constructor.

    Args:
        source: the other set.
        preprocess, validation, split_seed: see `Dataset`.
    """

    def __init__(
        self, source: Dataset, *, preprocess: Preprocess, validation: int | float, split_seed: int
    ) -> None:
        self.source, self.classes = source, source.classes
        self.folder: Path | None = source.folder
        super().__init__(preprocess=preprocess, validation=validation, split_seed=split_seed)

    def missing_files(self) -> list[str]:
        """Names of the source's files that are not there."""
        return self.source.missing_files()

    def require_files(self) -> None:
        """Refuse to start without the source's files."""
        self.source.require_files()

    def prepare(self, progress: Progress) -> None:
        """Get what is missing of the source."""
        self.source.prepare(progress)

    def problems(self) -> list[str]:
        """The source's."""
        return self.source.problems()

    def caveats(self) -> list[str]:
        """The source's."""
        return self.source.caveats()
