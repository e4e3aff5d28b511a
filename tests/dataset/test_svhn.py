import hashlib

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from capsexp.data.checked_files import RemoteFile, StoredFile
from capsexp.data.preprocess import Preprocess
from capsexp.dataset.svhn import FOLDER, SVHN
from capsexp.errors import DataError


def svhn(root):
    preprocess = Preprocess.identity()
    return SVHN(root=str(root), download=False, validation=0, split_seed=0, preprocess=preprocess)


@pytest.fixture
def invented(tmp_path, monkeypatch):
    """A small file in the published format, with its own checksums."""
    path = tmp_path / FOLDER / "test_32x32.mat"
    path.parent.mkdir()
    pixels = np.arange(32 * 32 * 3 * 4, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3, 4)
    scipy.io.savemat(path, {"X": pixels, "y": np.array([[1], [10], [9], [2]], dtype=np.uint8)})
    content = path.read_bytes()
    stored = StoredFile(FOLDER + path.name, f"sha256:{hashlib.sha256(content).hexdigest()}")
    monkeypatch.setattr(SVHN, "files", (RemoteFile(stored.name, "https://example.org", "0", (stored,)),))
    published = {"test": ["", path.name, hashlib.md5(content).hexdigest()]}
    monkeypatch.setattr(datasets.SVHN, "split_list", published)
    return tmp_path, pixels


def test_axes_and_labels_are_converted(invented):
    root, pixels = invented
    split = svhn(root).read("test")
    assert split.labels.tolist() == [1, 0, 9, 2]
    assert (split.images.numpy() == pixels.transpose(3, 2, 0, 1)).all()


def test_a_damaged_file_is_reported(invented):
    root, _ = invented
    path = root / FOLDER / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_32x32\.mat is damaged or incomplete: expected sha256"):
        svhn(root).read("test")


def test_the_error_for_missing_files_names_an_https_address(tmp_path):
    with pytest.raises(
        DataError, match=r"svhn is not complete .*https://ufldl\.stanford\.edu/housenumbers/train"
    ):
        svhn(tmp_path).read("train")
