"""Published datasets whose files are under a data root."""

import contextlib
from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path

from torchvision.datasets.mnist import read_image_file, read_label_file

from capsexp.data.checked_files import (
    Progress,
    RemoteFile,
    StoredFile,
    is_gzip,
    matches,
    missing_files,
    on_disk,
    verify,
)
from capsexp.data.dataset import Dataset
from capsexp.data.download import download_all
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split, SplitName
from capsexp.errors import DataError

USABLE = "it can be used, but report this beside any metric"
"""The end of a problem that is no reason to replace the file."""

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

    def damaged_files(self) -> list[str]:
        """Return the names, below the data root, of files that are not the published ones."""
        return [stored.name for stored in self._stored_files() if self._is_damaged(stored)]

    def require_files(self) -> None:
        """Raise an error if files are missing and may not be downloaded.

        Raises:
            DataError: names the files, their address and the settings that help.
        """
        if not self.download and self.missing_files():
            self._get(online=False)

    def prepare(self, progress: Progress) -> None:
        """Download and unpack missing and damaged files; one process at a time.

        Raises:
            DataError: a file cannot be downloaded, or differs from the published one.
        """
        self._get(online=True, progress=progress, damaged=self.damaged_files())

    def problems(self) -> list[str]:
        """Put files of another form in place, then return one line for every missing or damaged file."""
        with contextlib.suppress(DataError):  # the problems are listed below
            self._get(online=False, damaged=self._packed_files())
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
            return f"{path} is missing{self._other_forms(stored)}"
        try:
            verify(path, stored.checksum)
        except DataError as error:
            return f"{error}; `capsexp data prepare {self.name}` replaces it"
        return ""

    def _other_forms(self, stored: StoredFile) -> str:
        """Return a remark about files that should hold this one and do not."""
        (remote,) = (remote for remote in self.files if stored in remote.contents)
        wrong = ", ".join(str(path) for path in on_disk(self.root, remote))
        remark = (
            f"; {wrong}: damaged or not the published file; `capsexp data prepare {self.name}` replaces it"
        )
        return remark if wrong else ""

    def _is_damaged(self, stored: StoredFile) -> bool:
        """Whether a file exists and is of no use."""
        path = self.root / stored.name
        differs = path.is_file() and not matches(path, stored.checksum)
        return differs and not self._problem(stored).endswith(USABLE)

    def _packed_files(self) -> list[str]:
        """Return the names of files that are still packed, under the name of the unpacked ones."""
        return [
            remote.contents[0].name
            for remote in self.files
            if remote.is_archive and is_gzip(self.root / remote.contents[0].name)
        ]

    def _get(self, *, online: bool, progress: Progress | None = None, damaged: Collection[str] = ()) -> None:
        """Put missing and damaged files in place; see `download_all`."""
        if damaged or self.missing_files():
            download_all(
                self.root, self.files, dataset=self.name, online=online, progress=progress, damaged=damaged
            )

    def _stored_files(self) -> list[StoredFile]:
        return [stored for remote in self.files for stored in remote.contents]

    def _verified(self, split: SplitName) -> dict[str, Path]:
        """Verify the files that reading this split opens; return their paths by file name."""
        self._get(online=self.download, damaged=self._packed_files())
        files = self.files_of(split)
        if problems := [problem for stored in files if (problem := self._problem(stored))]:
            raise DataError(*problems)
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
