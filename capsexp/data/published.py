"""Published datasets whose files are under a data root."""

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
    """A dataset with known files, each verified by its checksum before it is read.

    Args:
        root: the data root (`~` is expanded).
        download: download missing files on the first read.
        preprocess: see `Dataset`.
        validation: see `Dataset`.
        split_seed: see `Dataset`.
    """

    files: tuple[RemoteFile, ...]
    """The files to download, and the files on disk that they contain."""
    test_count: int | None = None
    """Number of test images, if all settings have the same."""
    has_known_files = True

    def __init__(
        self, *, root: str, download: bool, preprocess: Preprocess, validation: int | float, split_seed: int
    ) -> None:
        self.root = Path(root).expanduser()
        self.folder = (self.root / self.files[0].contents[0].name).parent
        self.download = download
        super().__init__(preprocess=preprocess, validation=validation, split_seed=split_seed)

    def missing_files(self) -> list[str]:
        """Return the names, below the data root, of the missing files."""
        return [stored.name for stored in missing_files(self.root, self.files)]

    def require_files(self) -> None:
        """Raise an error if files are missing and may not be downloaded.

        Raises:
            DataError: names the files, their address and the settings that help.
        """
        if not self.download and self.missing_files():
            download_all(self.root, self.files, dataset=self.name, online=False, progress=None)

    def prepare(self, progress: Progress) -> None:
        """Download and unpack missing files; one process at a time.

        Raises:
            DataError: a file cannot be downloaded, or differs from the published one.
        """
        if self.missing_files():
            download_all(self.root, self.files, dataset=self.name, online=True, progress=progress)

    def problems(self) -> list[str]:
        """Return one line for every missing or damaged file."""
        return [problem for stored in self._stored_files() if (problem := self._problem(stored))]

    def fingerprints(self) -> dict[str, str]:
        """Return the published checksum of each file: what is read has been verified."""
        return {stored.name: stored.checksum for stored in self._stored_files()}

    def check_test(self) -> int | None:
        """Verify the files of the test split; see `Dataset`."""
        self._verified("test")
        return self.test_count

    def files_of(self, split: SplitName) -> list[StoredFile]:
        """Return the files that reading this split opens."""
        return [stored for stored in self._stored_files() if self._needs(stored, split)]

    def _problem(self, stored: StoredFile) -> str:
        path = self.root / stored.name
        if not path.is_file():
            return f"{path} is missing"
        try:
            verify(path, stored.checksum)
        except DataError as error:
            return str(error)
        return ""

    def _stored_files(self) -> list[StoredFile]:
        return [stored for remote in self.files for stored in remote.contents]

    def _verified(self, split: SplitName) -> dict[str, Path]:
        """Verify the files that reading this split opens; return their paths by file name."""
        if self.missing_files():
            download_all(self.root, self.files, dataset=self.name, online=self.download, progress=None)
        files = self.files_of(split)
        for stored in files:
            verify(self.root / stored.name, stored.checksum)
        return {Path(stored.name).name: self.root / stored.name for stored in files}

    @abstractmethod
    def _needs(self, stored: StoredFile, split: SplitName) -> bool:
        """Return whether reading this split opens this file."""


class IdxDataset(PublishedDataset):
    """A dataset in MNIST's file format: 28x28 grayscale images and their labels.

    Its files have the names of MNIST's files, such as `train-images-idx3-ubyte`.
    """

    file_shape = (1, 28, 28)

    def check_test(self) -> int:
        """Verify the files of the test split, and return the number of its images."""
        return len(read_label_file(str(self._verified("test")[f"{IDX_PREFIX['test']}labels-idx1-ubyte"])))

    def _needs(self, stored: StoredFile, split: SplitName) -> bool:
        return Path(stored.name).name.startswith(IDX_PREFIX[split])

    def _load(self, split: SplitName) -> Split:
        paths, prefix = self._verified(split), IDX_PREFIX[split]
        images = read_image_file(str(paths[f"{prefix}images-idx3-ubyte"]))
        return Split(images[:, None], read_label_file(str(paths[f"{prefix}labels-idx1-ubyte"])))
