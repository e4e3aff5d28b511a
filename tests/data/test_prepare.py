import gzip
import hashlib

import numpy as np
import pytest
import torch

from capsexp.data.download import RemoteFile, StoredFile
from capsexp.data.prepare import list_datasets, prepare, verify
from capsexp.data.preprocess import Preprocess
from capsexp.data.published import PublishedDataset
from capsexp.data.split import Split
from capsexp.dataset.digits import Digits
from capsexp.errors import DataError

CONTENTS = {"train": bytes(range(16)), "test": bytes(range(8))}
PREPROCESS = Preprocess.identity()


def remote(name, content):
    packed = gzip.compress(content, mtime=0)
    stored = StoredFile(f"toy/{name}", f"sha256:{hashlib.sha256(content).hexdigest()}")
    sha256 = hashlib.sha256(packed).hexdigest()
    return RemoteFile(f"toy/{name}.gz", f"https://example.invalid/{name}.gz", sha256, (stored,))


class Toy(PublishedDataset):
    name = "toy"
    classes = ("a", "b")
    file_shape = (1, 2, 2)
    files = tuple(remote(name, content) for name, content in CONTENTS.items())

    def _needs(self, stored, split):
        return stored.name == f"toy/{split}"

    def _load(self, split):
        content = np.fromfile(self._verified(split)[split], dtype=np.uint8)
        images = torch.from_numpy(content).view(-1, 1, 2, 2)
        return Split(images, torch.arange(len(images)) % 2)


def toy(root):
    return Toy(root=str(root), download=False, validation=0, split_seed=0, preprocess=PREPROCESS)


@pytest.fixture
def packed(tmp_path):
    """A data root with the archives, not unpacked."""
    (tmp_path / "toy").mkdir()
    for name, content in CONTENTS.items():
        (tmp_path / f"toy/{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    return tmp_path


def silent(activity, done, total):
    pass


def test_prepare_unpacks_and_verifies(packed):
    lines = []
    assert prepare(toy(packed), print_line=lines.append, progress=silent) == 0
    folder = packed / "toy"
    assert lines == [f"toy: getting toy/train, toy/test in {folder}", f"toy: verified in {folder}"]
    assert toy(packed).read("train").size == 4


def test_prepare_of_a_prepared_dataset_only_verifies(packed):
    prepare(toy(packed), print_line=lambda line: None, progress=silent)
    lines = []
    assert prepare(toy(packed), print_line=lines.append, progress=silent) == 0
    assert lines == [f"toy: verified in {packed / 'toy'}"]


def test_prepare_prints_why_it_failed(packed):
    path = packed / "toy/train.gz"
    path.write_bytes(path.read_bytes()[:-1])
    lines = []
    assert prepare(toy(packed), print_line=lines.append, progress=silent) == 1
    assert "train.gz is damaged or incomplete" in lines[-1]


def test_verify_lists_every_bad_file(packed):
    prepare(toy(packed), print_line=lambda line: None, progress=silent)
    (packed / "toy/train").write_bytes(b"")
    (packed / "toy/test").unlink()
    lines = []
    assert verify(toy(packed), print_line=lines.append) == 1
    assert len(lines) == 2
    assert "toy/train is damaged or incomplete" in lines[0]
    assert lines[1].endswith("toy/test is missing")


def test_an_embedded_dataset_has_nothing_to_verify():
    lines = []
    digits = Digits(validation=0, split_seed=0, preprocess=PREPROCESS)
    assert prepare(digits, print_line=lines.append, progress=silent) == 0
    assert lines == ["digits: verified (embedded)"]


def test_list_returns_state_size_and_folder(packed, tmp_path_factory):
    embedded = Digits(validation=0, split_seed=0, preprocess=PREPROCESS)
    datasets = {"toy": toy(packed), "absent": toy(tmp_path_factory.mktemp("empty")), "digits": embedded}
    absent, digits, incomplete = list_datasets(datasets)
    assert (absent.name, absent.state, absent.size) == ("absent", "missing", 0)
    assert (digits.name, digits.state, digits.folder) == ("digits", "embedded", None)
    assert (incomplete.state, incomplete.folder) == ("incomplete", packed / "toy")
    prepare(datasets["toy"], print_line=lambda line: None, progress=silent)
    present = list_datasets(datasets)[2]
    assert present.state == "present"
    assert present.size == sum(p.stat().st_size for p in (packed / "toy").iterdir())


def test_the_files_of_the_test_split_are_verified_without_reading_it(packed):
    prepare(toy(packed), print_line=lambda line: None, progress=silent)
    assert toy(packed).check_test() is None
    (packed / "toy/train").write_bytes(b"damaged")
    toy(packed).check_test()
    (packed / "toy/test").write_bytes(b"damaged")
    with pytest.raises(DataError, match="toy/test "):
        toy(packed).check_test()
