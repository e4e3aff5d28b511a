"""Published data sets whose files lie under a data root."""

from abc import abstractmethod
from pathlib import Path

from torchvision.datasets.mnist import read_image_file, read_label_file

from capsexp.data.dataset import Dataset
from capsexp.data.download import Progress, RemoteFile, StoredFile, download_all, missing_files, verify
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split, SplitName
from capsexp.errors import DataError

IDX_PREFIX: dict[SplitName, str] = {"train": "train-", "test": "t10k-"}


class PublishedDataset(Dataset):
    """A published data set: known files, each with a checksum that is compared before it is read.

    Args:
        root: the data root (`~` is expanded).
        download: get what is missing when the set is first read.
        preprocess: see `Dataset`.
        validation: see `Dataset`.
        split_seed: see `Dataset`.
    """

    files: tuple[RemoteFile, ...]
    """What can be downloaded, and the files on disk that come out of it."""

    def __init__(
        self, *, root: str, download: bool, preprocess: Preprocess, validation: int | float, split_seed: int
    ) -> None:
        self.root = Path(root).expanduser()
        self.folder = (self.root / self.files[0].contents[0].name).parent
        self.download = download
        super().__init__(preprocess=preprocess, validation=validation, split_seed=split_seed)

    def missing_files(self) -> list[str]:
        """Names, below the data root, of the files that are not there."""
        return [stored.name for stored in missing_files(self.root, self.files)]

    def require_files(self) -> None:
        """Refuse to start without the files, unless they may be downloaded.

        Raises:
            DataError: files are missing; names them, their address and the settings that help.
        """
        if not self.download and self.missing_files():
            download_all(self.root, self.files, dataset=self.name, online=False, progress=None)

    def prepare(self, progress: Progress) -> None:
        """Download and unpack what is missing; one process at a time.

        Raises:
            DataError: a file cannot be had, or is not what was published.
        """
        if self.missing_files():
            download_all(self.root, self.files, dataset=self.name, online=True, progress=progress)

    def problems(self) -> list[str]:
        """Every missing or damaged file, one line each."""
        return [problem for stored in self._stored() if (problem := self._problem(stored))]

    def _problem(self, stored: StoredFile) -> str:
        path = self.root / stored.name
        if not path.is_file():
            return f"{path} is missing"
        try:
            verify(path, stored.checksum)
        except DataError as error:
            return str(error)
        return ""

    def _stored(self) -> list[StoredFile]:
        return [stored for remote in self.files for stored in remote.contents]

    def _verified(self, part: SplitName) -> dict[str, Path]:
        """Paths, by file name, of the files that reading this part takes."""
        if self.missing_files():
            download_all(self.root, self.files, dataset=self.name, online=self.download, progress=None)
        needed = [stored for stored in self._stored() if self._needs(stored, part)]
        for stored in needed:
            verify(self.root / stored.name, stored.checksum)
        return {Path(stored.name).name: self.root / stored.name for stored in needed}

    @abstractmethod
    def _needs(self, stored: StoredFile, part: SplitName) -> bool:
        """Whether reading this part opens this file."""


class IdxDataset(PublishedDataset):
    """A set in MNIST's own file format: 28x28 grey pictures and their labels, for training and for testing.

    Its files must have the names of MNIST's, such as `train-images-idx3-ubyte`.
    """

    stored_shape = (1, 28, 28)

    def _needs(self, stored: StoredFile, part: SplitName) -> bool:
        return Path(stored.name).name.startswith(IDX_PREFIX[part])

    def _load(self, part: SplitName) -> Split:
        paths, prefix = self._verified(part), IDX_PREFIX[part]
        images = read_image_file(str(paths[f"{prefix}images-idx3-ubyte"]))
        return Split(images[:, None], read_label_file(str(paths[f"{prefix}labels-idx1-ubyte"])))
