"""The base class of all datasets.

A dataset is kept as bytes on the training device. The order of an epoch and the augmentation of a batch are
functions of (seed, epoch, batch), so training can start at any batch and there is no state to save.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from capsexp.data.batches import Batches, BatchOptions
from capsexp.data.checked_files import Progress
from capsexp.data.manifest import SPLITS, ListedSplit, Manifest, digest_of
from capsexp.data.preprocess import Preprocess, Shape
from capsexp.data.split import Groups, Split, SplitName, split_validation, validation_size
from capsexp.errors import DataError, refuse, require_seed

OTHER_DATA = (
    "restore the data that the run was trained with; only `capsexp train … resume=force` continues it with "
    "those of now"
)

NO_LIST = (
    "an earlier version began this run and stored no list of its images: those drawn for testing and "
    "validation may be others now"
)


class Dataset(ABC):
    """A dataset. Its constructor is cheap: no image is read before `read`.

    A subclass sets `name`, `classes` and `file_shape` before it calls this constructor.

    Args:
        preprocess: applied to the images on their way to the network.
        validation: training images to set aside; a number, or a share in (0, 1); 0 for none.
        split_seed: chooses which ones. Separate from a run's seed, so that all runs use the same images.

    Raises:
        ValueError: a setting is out of range, or too large for the images.
    """

    name: str
    """As in `dataset=NAME`."""
    classes: tuple[str, ...]
    file_shape: Shape
    """Channels, height, width of the images on disk."""
    labels_per_image: int = 1
    """Classes that each image of `batches` shows."""
    training_size: int | None = None
    """Images that `validation` is taken from; None where only the files tell."""
    folder: Path | None = None
    """Where the files are; None for a dataset without files."""
    stored: Manifest | None = None
    """The data of the run that the dataset belongs to; None for a new run."""
    has_known_files: bool = False
    """Whether `fingerprints` or the files of `manifest` identify the data. If not, the arrays read do."""
    lists_files: bool = False
    """Whether `manifest` lists the files of each split."""

    def __init__(self, *, preprocess: Preprocess, validation: int | float, split_seed: int) -> None:
        self.preprocess = preprocess
        if not (validation >= 0 if isinstance(validation, int) else 0 < validation < 1):
            refuse(f"validation must be an integer >= 0 or a share in (0, 1), got {validation!r}")
        elif self.training_size is not None:
            validation_size(validation, self.training_size)
        require_seed(split_seed=split_seed)
        self.validation = validation
        self.split_seed = split_seed
        self._digests: dict[str, str] = {}
        self.raw_shape = preprocess.resized_shape(self.file_shape)
        """Shape of the images in memory; `capsexp predict` resizes images to it."""
        self.image_shape = preprocess.output_shape(self.file_shape)
        """Shape of the network's input, after a crop."""

    @classmethod
    def from_manifest(cls, *, manifest: Manifest, **settings: Any) -> "Dataset":
        """Build the dataset of a run from the settings of its config and from what the run stored.

        Reading then raises an error if the data are not those of the run.
        """
        dataset = cls.__new__(cls)
        dataset.stored = manifest  # before the constructor, which may read the classes from it
        dataset.__init__(**settings)  # type: ignore[misc]
        return dataset

    def manifest(self, splits: Sequence[ListedSplit] = SPLITS) -> Manifest:
        """Return what a run stores of the data as they are now.

        Args:
            splits: those whose files are listed, for a dataset that lists files.
        """
        return Manifest(
            dataset=self.name,
            classes=self.classes,
            file_shape=self.file_shape,
            labels_per_image=self.labels_per_image,
            folder=None if self.folder is None else str(self.folder.absolute()),
            fingerprints=self.fingerprints(),
        )

    def fingerprints(self) -> dict[str, str]:
        """Return checksums that identify the data; by default of the arrays that have been read."""
        return dict(self._digests)

    def require_stored(self, splits: Sequence[ListedSplit]) -> None:
        """Check that splits still are what the run stored; do nothing for a new run.

        Raises:
            DataError: one line for each difference.
        """
        if self.stored is not None and (lines := list(self.stored.differences(self.manifest(splits)))):
            raise DataError(*lines, OTHER_DATA)

    def read(self, split: SplitName) -> Split:
        """Read all images of a split, verified, on the CPU.

        Raises:
            DataError: files are missing or damaged, or are not those of the run.
        """
        parts: tuple[ListedSplit, ...] = ("train", "validation") if split == "train" else ("test",)
        self.require_stored(parts)
        images, labels = self._load(split)
        if len(images) != len(labels) or tuple(images.shape[1:]) != self.file_shape:
            raise DataError(
                f"{self.name}: expected {len(labels)} {split} images of shape {self.file_shape}, "
                f"found {len(images)} of shape {tuple(images.shape[1:])}"
            )
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(f"{self.name}: the {split} labels must be 0 … {len(self.classes) - 1}")
        if not self.has_known_files:
            self._digests[f"the {split} split"] = digest_of(images.numpy(), labels.numpy())
            self.require_stored(parts)
        return Split(self.preprocess.resize_all(images), labels)

    def read_training(self) -> tuple[Split, Split]:
        """Read the training split without its validation images, and those (empty for `validation: 0`)."""
        return split_validation(self.read("train"), count=self.validation, seed=self.split_seed)

    def check_test(self) -> int | None:
        """Check the files of the test split before anything is trained, without reading it.

        Returns:
            The number of test images, if it is known.

        Raises:
            DataError: files are missing or damaged.
        """
        return None

    def familiar(self) -> Split | None:
        """Return test images like those of training, for datasets whose test split differs from training.

        Returns None for all other datasets.
        """
        return None

    def groups(self, split: ListedSplit) -> Groups | None:
        """Return which images of a split belong together, in their order; None where nothing is known.

        Args:
            split: `test` is `read("test")`; `train` and `validation` are the two of `read_training()`.
        """
        return None

    def batches(self, split: Split, **options: Unpack[BatchOptions]) -> Batches:
        """Return a split of this dataset in batches; see `Batches`."""
        return Batches(split, self.preprocess, **options)

    def missing_files(self) -> list[str]:
        """Return the names of the missing files; empty for a dataset without files."""
        return []

    def damaged_files(self) -> list[str]:
        """Return the names of the files that `prepare` would replace. Reads all files."""
        return []

    def require_files(self) -> None:  # noqa: B027 - most datasets have no files
        """Raise an error if files are missing; do nothing for a dataset without files."""

    def prepare(self, progress: Progress) -> None:  # noqa: B027 - most datasets have no files
        """Download missing and damaged files; do nothing for a dataset without files."""

    def problems(self) -> list[str]:
        """Return one line for every missing or damaged file. Reads all files."""
        return []

    def caveats(self) -> list[str]:
        """Return lines to print beside every metric measured on this dataset. Call it after reading."""
        return []

    def notes(self) -> list[str]:
        """Return lines about how files are read, for the start of a run and for `capsexp data verify`."""
        return []

    @abstractmethod
    def _load(self, split: SplitName) -> Split:
        """Check the files of a split and return its images at the size that they have on disk."""
