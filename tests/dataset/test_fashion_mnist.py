import pytest
from torchvision import datasets

from capsexp.data.preprocess import Preprocess
from capsexp.dataset.fashion_mnist import FOLDER, FashionMNIST
from capsexp.errors import DataError


def fashion_mnist(root):
    preprocess = Preprocess.identity(shift=2)
    return FashionMNIST(root=str(root), download=False, validation=5000, split_seed=0, preprocess=preprocess)


def test_names_and_files_agree_with_torchvision():
    assert list(FashionMNIST.classes) == datasets.FashionMNIST.classes
    published = [name for name, _ in datasets.FashionMNIST.resources]
    assert sorted(remote.name for remote in FashionMNIST.files) == sorted(FOLDER + name for name in published)
    assert all(remote.url.startswith("https://") for remote in FashionMNIST.files)


def test_files_with_other_content_are_refused(tmp_path):
    (tmp_path / FOLDER).mkdir(parents=True)
    for remote in FashionMNIST.files:
        (tmp_path / remote.contents[0].name).write_bytes(b"something else")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte is damaged or .*: expected md5 f4a8"):
        fashion_mnist(tmp_path).read("train")


def test_the_error_for_missing_files_names_what_to_do(tmp_path):
    with pytest.raises(DataError, match="dataset fashion_mnist is not complete under"):
        fashion_mnist(tmp_path).read("test")
