"""Pictures in memory: what a data set provides, and how batches are drawn from it.

A set lives as bytes on the training device. The order of an epoch and the augmentation of a batch are
functions of (seed, epoch, batch), so training can start at any batch and there is no state to save.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import torch

from capsexp.data.batches import Batches
from capsexp.data.download import Progress
from capsexp.data.preprocess import Preprocess, Shape
from capsexp.data.split import Split, SplitName, split_validation
from capsexp.errors import DataError


class Dataset(ABC):
    """What every data set provides. Its constructor is cheap: no picture is read before `read`.

    Args:
        preprocess: what happens to the pictures on their way to the network.
        validation: pictures of the training part set aside; a number, or a share in (0, 1); 0 for none.
        split_seed: chooses which ones. Not the seed of a run, so runs are compared on the same pictures.
    """

    name: str
    """As in `dataset=NAME`."""
    classes: tuple[str, ...]
    stored_shape: Shape
    """Channels, height, width of the pictures on disk."""
    targets: int = 1
    """Classes in each picture that `batches` gives."""
    folder: Path | None = None
    """Where the files lie; None for a set that needs none."""

    def __init__(self, *, preprocess: Preprocess, validation: int | float, split_seed: int) -> None:
        self.preprocess = preprocess
        self.validation = _as_validation(validation)
        self.split_seed = split_seed
        self.image_shape  # noqa: B018 - a crop larger than the picture is refused here

    @property
    def raw_shape(self) -> Shape:
        """Shape of the pictures in memory; a single picture to be classified is brought to this."""
        return self.preprocess.resized_shape(self.stored_shape)

    @property
    def image_shape(self) -> Shape:
        """Shape that the network gets, after a crop."""
        return self.preprocess.output_shape(self.stored_shape)

    def read(self, part: SplitName) -> Split:
        """All pictures of one part, verified, on the CPU.

        Raises:
            DataError: files are missing or damaged.
        """
        images, labels = self._load(part)
        if len(images) != len(labels) or tuple(images.shape[1:]) != self.stored_shape:
            raise DataError(
                f"{self.name}: expected {len(labels)} {part} pictures of shape {self.stored_shape}, "
                f"found {len(images)} of shape {tuple(images.shape[1:])}"
            )
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(f"{self.name}: the {part} labels must be 0 … {len(self.classes) - 1}")
        return Split(self.preprocess.resize_all(images), labels)

    def read_training(self) -> tuple[Split, Split]:
        """The training part without its validation slice, and that slice (empty for `validation: 0`)."""
        return split_validation(self.read("train"), count=self.validation, seed=self.split_seed)

    def familiar(self) -> Split | None:
        """Test pictures of the kind that training has seen, where the test part is of another kind.

        None where there is no such difference.
        """
        return None

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        memory_format: torch.memory_format,
        limit: int | None,
        training: bool = False,
    ) -> "Batches":
        """A split of this set in batches; see `Batches`. `training`: for learning, not for figures."""
        return Batches(
            split,
            self.preprocess,
            batch_size=batch_size,
            seed=seed,
            device=device,
            memory_format=memory_format,
            limit=limit,
        )

    def missing_files(self) -> list[str]:
        """Names of the files that are not there; none for a set that needs no files."""
        return []

    def require_files(self) -> None:  # noqa: B027 - most sets need nothing
        """Refuse to start without the files; nothing to do for a set that needs no files."""

    def prepare(self, progress: Progress) -> None:  # noqa: B027 - most sets need nothing
        """Get what is missing; nothing to do for a set that needs no files."""

    def problems(self) -> list[str]:
        """Every missing or damaged file, one line each. Reads all of them."""
        return []

    def caveats(self) -> list[str]:
        """Lines that must stand beside any figure measured on these data; to be asked once they were read."""
        return []

    @abstractmethod
    def _load(self, part: SplitName) -> Split:
        """The pictures of one part as they lie on disk, after a check of the files."""


def _as_validation(validation: int | float) -> int | float:
    whole = isinstance(validation, int) and not isinstance(validation, bool) and validation >= 0
    if not whole and not (isinstance(validation, float) and 0 < validation < 1):
        raise ValueError(f"validation must be an integer >= 0 or a share in (0, 1), got {validation!r}")
    return validation
