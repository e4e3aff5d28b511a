import gzip
import hashlib
import io
import urllib.error

import numpy as np
import pytest
import torch

from capsexp.data import download
from capsexp.data.checked_files import RemoteFile, StoredFile
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


@pytest.fixture
def no_network(monkeypatch):
    def open_url(url):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(download, "open_url", open_url)


def test_prepare_prints_why_it_failed(packed, no_network):
    path = packed / "toy/train.gz"
    path.write_bytes(path.read_bytes()[:-1])
    lines = []
    assert prepare(toy(packed), print_line=lines.append, progress=silent) == 1
    assert "cannot download https://example.invalid/train.gz" in lines[-1]
    assert path.is_file()


def test_prepare_replaces_what_is_damaged_and_says_so(packed, monkeypatch):
    archives = {
        f"https://example.invalid/{name}.gz": gzip.compress(content, mtime=0)
        for name, content in CONTENTS.items()
    }
    requested = []

    def open_url(url):
        requested.append(url)
        answer = io.BytesIO(archives[url])
        answer.headers = {}
        return answer

    monkeypatch.setattr(download, "open_url", open_url)
    for name in CONTENTS:
        (packed / f"toy/{name}.gz").write_bytes(b"<html>404</html>")
    (packed / "toy/train").write_bytes(b"half")
    lines = []
    assert prepare(toy(packed), print_line=lines.append, progress=silent) == 0
    assert requested == list(archives)
    assert lines == [
        f"toy: getting toy/test in {packed / 'toy'}",
        "toy: replacing toy/train: not the published files",
        f"toy: verified in {packed / 'toy'}",
    ]


@pytest.mark.parametrize("action", [verify, prepare], ids=["verify", "prepare"])
@pytest.mark.parametrize("name", ["toy/train.gz", "toy/train"])
def test_the_other_form_under_a_files_name_is_taken(name, action, packed, no_network):
    content = CONTENTS["train"]
    (packed / "toy/train.gz").unlink()
    (packed / name).write_bytes(content if name.endswith(".gz") else gzip.compress(content, mtime=0))
    lines = []
    options = {"progress": silent} if action is prepare else {}
    assert action(toy(packed), print_line=lines.append, **options) == 0
    assert lines[-1] == f"toy: verified in {packed / 'toy'}"
    assert (packed / "toy/train").read_bytes() == content


@pytest.mark.parametrize("name", ["toy/train.gz", "toy/train"])
def test_reading_takes_the_other_form_too(name, packed):
    content = CONTENTS["train"]
    (packed / "toy/train.gz").unlink()
    (packed / name).write_bytes(content if name.endswith(".gz") else gzip.compress(content, mtime=0))
    assert toy(packed).read("train").size == 4


def test_reading_damaged_files_names_all_of_them_and_the_command_that_helps(packed):
    dataset = toy(packed)
    prepare(dataset, print_line=lambda line: None, progress=silent)
    for name in CONTENTS:
        (packed / f"toy/{name}").write_bytes(b"<html>404</html>")
    dataset._needs = lambda stored, split: True
    with pytest.raises(DataError) as caught:
        dataset.read("train")
    for name, problem in zip(CONTENTS, caught.value.problems, strict=True):
        assert f"toy/{name} is damaged or incomplete" in problem
        assert problem.endswith("`capsexp data prepare toy` replaces it")


def test_verify_lists_every_bad_file(packed):
    prepare(toy(packed), print_line=lambda line: None, progress=silent)
    (packed / "toy/train").write_bytes(b"")
    (packed / "toy/test").unlink()
    (packed / "toy/test.gz").unlink()
    lines = []
    assert verify(toy(packed), print_line=lines.append) == 1
    assert len(lines) == 2
    assert "toy/train is damaged or incomplete" in lines[0]
    assert lines[1].endswith("toy/test is missing")
    path = packed / "toy/test.gz"
    path.write_bytes(b"<html>404</html>")
    remark = f"; {path}: damaged or not the published file; `capsexp data prepare toy` replaces it"
    assert toy(packed).problems()[1].endswith(f"toy/test is missing{remark}")


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
