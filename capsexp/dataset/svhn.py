"""SVHN, cropped digits: house numbers in street photographs, 32x32, color."""

import torch
from torchvision import datasets

from capsexp.data.checked_files import RemoteFile, StoredFile
from capsexp.data.published import PublishedDataset
from capsexp.data.split import Split, SplitName

URL = "https://ufldl.stanford.edu/housenumbers/"
FOLDER = "svhn/"


def _file(name: str, sha256: str) -> RemoteFile:
    return RemoteFile(FOLDER + name, URL + name, sha256, (StoredFile(FOLDER + name, f"sha256:{sha256}"),))


class SVHN(PublishedDataset):
    """73,257 training and 26,032 test images in 10 classes, without the extra training images."""

    name = "svhn"
    training_size = 73_257
    classes = tuple("0123456789")
    file_shape = (3, 32, 32)
    test_count = 26_032
    files = (
        _file("train_32x32.mat", "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
        _file("test_32x32.mat", "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
    )

    def _needs(self, stored: StoredFile, split: SplitName) -> bool:
        return stored.name.startswith(FOLDER + split)

    def _load(self, split: SplitName) -> Split:
        self._verified(split)
        # The files have class 10 for the digit 0; torchvision changes it to 0.
        source = datasets.SVHN(str(self.root / FOLDER), split=split, download=False)
        return Split(torch.from_numpy(source.data).contiguous(), torch.from_numpy(source.labels))
