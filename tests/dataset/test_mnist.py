import gzip
import os
from pathlib import Path

import pytest
import torch

from capsexp.data.preprocess import Preprocess
from capsexp.dataset.mnist import FOLDER, MNIST
from capsexp.errors import DataError


def mnist(root, *, download=False):
    preprocess = Preprocess.identity(shift=2)
    return MNIST(root=str(root), download=download, validation=5000, split_seed=0, preprocess=preprocess)


@pytest.fixture
def real():
    root = os.environ.get("CAPSEXP_DATA")
    if root is None or mnist(root).missing_files():
        pytest.skip("MNIST is not under CAPSEXP_DATA")
    return Path(root)


@pytest.fixture
def copy(real, tmp_path):
    """A data root with links to the files, to damage."""
    (tmp_path / FOLDER).mkdir(parents=True)
    for path in (real / FOLDER).glob("*-ubyte"):
        (tmp_path / FOLDER / path.name).symlink_to(path)
    return tmp_path


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


def test_the_published_dataset_is_read(real):
    training, validation = mnist(real).read_training()
    test = mnist(real).read("test")
    assert (training.size, validation.size, test.size) == (55_000, 5_000, 10_000)
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    everything = torch.cat([training.images, validation.images])
    assert everything.double().mean().item() == pytest.approx(255 * 0.1307, abs=0.02)


def test_gz_files_alone_are_enough(real, tmp_path):
    (tmp_path / FOLDER).mkdir(parents=True)
    packed = list((real / FOLDER).glob("*.gz"))
    if not packed:
        pytest.skip("no .gz files beside the unpacked ones")
    for path in packed:
        (tmp_path / FOLDER / path.name).symlink_to(path)
    dataset = mnist(tmp_path)
    assert torch.equal(dataset.read("test").images, mnist(real).read("test").images)
    assert dataset.missing_files() == []
    name = "t10k-labels-idx1-ubyte"
    packed_labels = (real / FOLDER / f"{name}.gz").read_bytes()
    assert (tmp_path / FOLDER / name).read_bytes() == gzip.decompress(packed_labels)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "longer"])
def test_a_damaged_file_is_reported_and_not_read(copy, damage):
    path = copy / FOLDER / "t10k-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-1]
    elif damage == "flipped":
        content[5000] ^= 1
    else:
        content += b"\0"
    replace(path, content)
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte is damaged or .*: expected sha256 ff7b"):
        mnist(copy).read("test")
    assert mnist(copy).problems()[0].startswith(str(path))


def test_reading_one_split_does_not_verify_the_other(copy):
    replace(copy / FOLDER / "t10k-labels-idx1-ubyte", b"")
    assert mnist(copy).read("train").size == 60_000


def test_the_error_for_missing_files_names_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"dataset mnist is not complete under .*train-images-idx3-ubyte"):
        mnist(tmp_path).read("train")
    assert len(mnist(tmp_path).missing_files()) == 4
    assert len(mnist(tmp_path).problems()) == 4


def test_a_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mnist("~/data").root == tmp_path / "data"


def test_every_address_is_https():
    assert all(remote.url.startswith("https://") for remote in MNIST.files)
