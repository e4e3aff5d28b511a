import os
import re

import numpy as np
import pytest
import torch
from scipy.io import savemat

from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.data.prepare import prepare, verify
from capsexp.data.split import Split
from capsexp.dataset.affnist import FILE, URL, AffNIST, class_means, upright
from capsexp.errors import DataError, UserError

DIGITS = ("dataset@dataset.source=digits", "dataset.canvas=12", "dataset.preprocess.shift=2")
ORIGINALS, TRANSFORMS = 359, 2


def make(name, root, *overrides):
    words = [f"dataset={name}", f"data_root={root}", *overrides]
    return build(to_plain(compose("train", words, config_dir=None))["dataset"], at="dataset")


@pytest.fixture(scope="module")
def apply_affine(tmp_path_factory):
    """Affine transforms of the embedded digits: what the file of a small world holds."""
    return make(
        "mnist_affine",
        tmp_path_factory.mktemp("none"),
        *DIGITS,
        "dataset.transforms=2",
        "dataset.scale=[0.8,1]",
    ).read("test")


@pytest.fixture
def world(tmp_path, monkeypatch, apply_affine):
    """`world(FIELD=VALUE, …)`: affNIST of the embedded digits, whose file has some fields otherwise."""
    monkeypatch.setattr(AffNIST, "originals", ORIGINALS)
    monkeypatch.setattr(AffNIST, "transforms", TRANSFORMS)

    def publish(*overrides, without=(), **fields):
        labels = apply_affine.labels.numpy().astype(np.uint8)
        right = {
            "affine_transforms": np.zeros((6, len(labels))),
            "image": apply_affine.images.reshape(-1, 144).numpy().T,
            "label_int": labels[None],
            "label_one_of_n": (np.arange(10)[:, None] == labels).astype(np.uint8),
        }
        content = {key: value for key, value in (right | fields).items() if key not in without}
        path = tmp_path / FILE
        path.parent.mkdir()
        savemat(path, {"affNISTdata": content})
        return make("affnist", tmp_path, *DIGITS, *overrides)

    return publish


def test_pictures_and_labels_of_the_file_are_read_in_its_order(world, apply_affine):
    dataset = world()
    test = dataset.read("test")
    assert torch.equal(test.images, apply_affine.images)
    assert torch.equal(test.labels, apply_affine.labels)
    assert test.images.is_contiguous()
    assert dataset.missing_files() == []
    dataset.require_files()


def test_pictures_that_run_down_the_columns_are_set_upright(world, apply_affine):
    columns = apply_affine.images.mT.reshape(-1, 144).numpy().T
    assert torch.equal(world(image=columns).read("test").images, apply_affine.images)


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


COUNT = ORIGINALS * TRANSFORMS


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"without": ("image",)}, "must be a struct with image, label_int, label_one_of_n, got a struct of"),
        ({"without": ("label_int",)}, "must be a struct with image, label_int, label_one_of_n, got"),
        ({"image": np.zeros((144, COUNT))}, "image must be uint8, got float64"),
        ({"image": np.zeros((144, COUNT - 1), np.uint8)}, f"image must be 144x{COUNT}, got 144x{COUNT - 1}"),
        ({"image": np.zeros((COUNT, 144), np.uint8)}, f"image must be 144x{COUNT}, got {COUNT}x144"),
        ({"image": np.zeros((12, 12, COUNT), np.uint8)}, f"image must be 144x{COUNT}, got 12x12x{COUNT}"),
        ({"label_int": np.zeros((1, 5), np.uint8)}, f"label_int must be 1x{COUNT}, got 1x5"),
        ({"label_int": np.full((1, COUNT), 10, np.uint8)}, r"label_int must be 0 … 9, got [10]"),
        ({"label_int": np.full((1, COUNT), 0.5)}, "label_int must be 0 … 9, got [0.5]"),
        ({"label_one_of_n": np.zeros((9, COUNT))}, f"label_one_of_n must be 10x{COUNT}, got 9x{COUNT}"),
        (
            {"label_one_of_n": np.ones((10, COUNT))},
            "label_one_of_n must have a 1 at label_int and 0 elsewhere",
        ),
    ],
)
def test_a_file_that_is_not_as_documented_is_refused_in_one_line(world, fields, told):
    dataset = world(**fields)
    with pytest.raises(DataError, match=re.escape(told)) as refused:
        dataset.read("test")
    assert str(refused.value).startswith(str(dataset.path))
    assert "\n" not in str(refused.value)
    assert [line for line in dataset.problems() if told in line]


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-900], lambda content: b"", lambda content: b"x" * 999]
)
def test_a_file_that_is_cut_off_or_another_is_refused_in_one_line(world, spoil):
    dataset = world()
    dataset.path.write_bytes(spoil(dataset.path.read_bytes()))
    with pytest.raises(DataError, match=r"test\.mat cannot be read as a MATLAB 5 file: .") as refused:
        dataset.read("test")
    assert "\n" not in str(refused.value)


def test_a_file_with_something_else_is_refused(world):
    dataset = world()
    for content in ({"other": np.zeros(3)}, {"affNISTdata": np.zeros(3)}):
        savemat(dataset.path, content)
        with pytest.raises(
            DataError, match=r"affNISTdata must be a struct with image, .* got (nothing|no struct)"
        ):
            dataset.read("test")


def test_the_official_count_is_320000():
    assert AffNIST.originals * AffNIST.transforms == 320_000


def test_without_the_file_one_line_says_what_to_get_and_where_to_put_it(tmp_path):
    dataset = make("affnist", tmp_path, *DIGITS)
    assert dataset.missing_files() == [FILE]
    told = rf"test\.mat is missing: get {re.escape(URL)} by hand and unpack it into"
    for ask in (dataset.require_files, lambda: dataset.prepare(print), lambda: dataset.read("test")):
        with pytest.raises(DataError, match=told):
            ask()
    lines = []
    assert prepare(dataset, say=lines.append, progress=print) == 1
    assert lines[0] == f"affnist: getting {FILE} in {tmp_path / 'affNIST'}"
    assert str(tmp_path / "affNIST") in lines[1]
    assert "dataset.test_pictures=expanded" in lines[1]
    assert dataset.problems() == [f"{dataset.path} is missing; it is in {URL}"]


def test_training_and_the_expanded_test_pictures_need_no_file(tmp_path):
    dataset = make("affnist", tmp_path, *DIGITS)
    assert dataset.read_training()[0].size + dataset.read_training()[1].size == 1438
    assert dataset.familiar().size == ORIGINALS
    expanded = make("affnist", tmp_path, *DIGITS, "dataset.test_pictures=expanded")
    assert expanded.missing_files() == expanded.problems() == expanded.caveats() == []
    expanded.require_files()
    assert torch.equal(expanded.read("test").images, dataset.familiar().images)


def test_a_whole_file_is_never_called_verified(world):
    dataset, lines = world(), []
    assert verify(dataset, say=lines.append) == 1
    assert len(lines) == 1
    assert "no checksum is published to compare it with (sha256 " in lines[0]
    assert dataset.caveats() == [
        f"affnist: no checksum of {FILE} is published; its structure alone was checked"
    ]


def test_a_source_of_another_kind_is_refused(tmp_path):
    words = ("dataset@dataset.source=cifar10", "dataset.canvas=44")
    with pytest.raises(
        UserError, match="source must have grey pictures in 10 classes, got 3 channels and 10"
    ):
        make("affnist", tmp_path, *words)


@pytest.fixture
def real_root(tmp_path):
    root = os.environ.get("CAPSEXP_DATA", str(tmp_path))
    if make("mnist_affine", root).missing_files():
        pytest.skip("MNIST is not under CAPSEXP_DATA")
    return root


def test_mirrored_pictures_are_known_from_the_means_of_their_classes(real_root):
    dataset = make("mnist_affine", real_root)
    test, originals = dataset.read("test"), dataset._centred(dataset.source.read("test"))
    assert torch.equal(upright(test.images, test.labels, originals), test.images)
    assert torch.equal(upright(test.images.mT, test.labels, originals), test.images)
    means, expected = class_means(test), class_means(originals)
    along, down = ((means * one).sum().item() for one in (expected, expected.mT))
    assert along > 1.1 * down


def test_the_official_file_holds_32_transforms_of_each_mnist_test_picture(real_root):
    dataset = make("affnist", real_root)
    if dataset.missing_files():
        pytest.skip("affNIST is not under CAPSEXP_DATA")
    test, originals = dataset.read("test"), dataset.source.read("test")
    assert test.labels.bincount().tolist() == (32 * originals.labels.bincount()).tolist()
    means = class_means(test)
    expected = class_means(Split(dataset._centred(originals).images, originals.labels))
    assert (means * expected).sum() > 1.1 * (means * expected.mT).sum()
