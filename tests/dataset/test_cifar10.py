import os
import pickle
from pathlib import Path

import pytest

from capsexp.data.preprocess import Preprocess
from capsexp.dataset.cifar10 import CHECKSUMS, CIFAR10, FOLDER
from capsexp.errors import DataError


def cifar10(root):
    preprocess = Preprocess.identity(
        crop=24, flip=True, brightness=63, contrast=[0.2, 1.8], standardise="last"
    )
    return CIFAR10(root=str(root), download=False, validation=5000, split_seed=0, preprocess=preprocess)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_the_published_dataset_is_read():
    root = os.environ.get("CAPSEXP_DATA")
    if root is None or cifar10(root).missing_files():
        pytest.skip("CIFAR-10 is not under CAPSEXP_DATA")
    assert cifar10(root).problems() == []
    train, test = cifar10(root).read("train"), cifar10(root).read("test")
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    means = (train.images[::10].double().mean((0, 2, 3)) / 255).tolist()
    assert means == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.005)


def test_a_pickle_that_is_not_the_published_one_is_never_opened(tmp_path):
    folder, trap = tmp_path / FOLDER, tmp_path / "trap"
    folder.mkdir()
    for name in CHECKSUMS:
        (folder / name).write_bytes(pickle.dumps(Hostile(trap)))
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"batches\.meta is damaged or incomplete: expected sha256 f962"):
            cifar10(tmp_path).read(split)
    assert not trap.exists()


def test_each_split_verifies_its_own_files():
    dataset = cifar10("nowhere")
    needed = {
        split: {Path(stored.name).name for stored in dataset.files_of(split)} for split in ("train", "test")
    }
    assert needed["test"] == {"batches.meta", "test_batch"}
    assert needed["train"] == {"batches.meta"} | {f"data_batch_{number}" for number in range(1, 6)}


def test_the_error_for_missing_files_names_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"cifar10 is not complete .*cs\.toronto\.edu/~kriz/cifar-10-python"):
        cifar10(tmp_path).read("train")
