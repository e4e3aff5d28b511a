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
from capsexp.dataset.affnist import FILE, URL, AffNIST, class_means, make_upright
from capsexp.errors import DataError, UserError

DIGITS = ("dataset@dataset.source=digits", "dataset.canvas=12", "dataset.preprocess.shift=2")
ORIGINALS, TRANSFORMS = 359, 2


def make(name, root, *overrides):
    overrides = [f"dataset={name}", f"data_root={root}", *overrides]
    return build(to_plain(compose("train", overrides, config_dir=None))["dataset"], at="dataset")


@pytest.fixture(scope="module")
def apply_affine(tmp_path_factory):
    """Affine transforms of the embedded digits, for a small file."""
    return make(
        "mnist_affine",
        tmp_path_factory.mktemp("none"),
        *DIGITS,
        "dataset.transforms=2",
        "dataset.scale=[0.8,1]",
    ).read("test")


@pytest.fixture
def world(tmp_path, monkeypatch, apply_affine):
    """`world(FIELD=VALUE, …)`: affNIST of the embedded digits; some fields of its file may be replaced."""
    monkeypatch.setattr(AffNIST, "originals", ORIGINALS)
    monkeypatch.setattr(AffNIST, "transforms", TRANSFORMS)

    def publish(*overrides, without=(), **fields):
        labels = apply_affine.labels.numpy().astype(np.uint8)
        original = {
            "affine_transforms": np.zeros((6, len(labels))),
            "image": apply_affine.images.reshape(-1, 144).numpy().T,
            "label_int": labels[None],
            "label_one_of_n": (np.arange(10)[:, None] == labels).astype(np.uint8),
        }
        content = {key: value for key, value in (original | fields).items() if key not in without}
        path = tmp_path / FILE
        path.parent.mkdir()
        savemat(path, {"affNISTdata": content})
        return make("affnist", tmp_path, *DIGITS, *overrides)

    return publish


def test_images_and_labels_are_read_in_the_files_order(world, apply_affine):
    dataset = world()
    test = dataset.read("test")
    assert torch.equal(test.images, apply_affine.images)
    assert torch.equal(test.labels, apply_affine.labels)
    assert test.images.is_contiguous()
    assert dataset.missing_files() == []
    dataset.require_files()


def test_images_in_column_order_are_transposed(world, apply_affine):
    columns = apply_affine.images.mT.reshape(-1, 144).numpy().T
    assert torch.equal(world(image=columns).read("test").images, apply_affine.images)


COUNT = ORIGINALS * TRANSFORMS


@pytest.mark.parametrize(
    ("fields", "message"),
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
def test_a_file_with_another_structure_is_refused_in_one_line(world, fields, message):
    dataset = world(**fields)
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        dataset.read("test")
    assert str(refused.value).startswith(str(dataset.path))
    assert "\n" not in str(refused.value)
    assert [line for line in dataset.problems() if message in line]


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-900], lambda content: b"", lambda content: b"x" * 999]
)
def test_a_file_that_is_not_a_matlab_file_is_refused_in_one_line(world, spoil):
    dataset = world()
    dataset.path.write_bytes(spoil(dataset.path.read_bytes()))
    with pytest.raises(DataError, match=r"test\.mat cannot be read as a MATLAB 5 file: .") as refused:
        dataset.read("test")
    assert "\n" not in str(refused.value)


def test_a_file_without_the_struct_is_refused(world):
    dataset = world()
    for content in ({"other": np.zeros(3)}, {"affNISTdata": np.zeros(3)}):
        savemat(dataset.path, content)
        with pytest.raises(
            DataError, match=r"affNISTdata must be a struct with image, .* got (nothing|no struct)"
        ):
            dataset.read("test")


def test_the_official_count_is_320000():
    assert AffNIST.originals * AffNIST.transforms == 320_000


def test_without_the_file_the_error_names_address_and_folder(tmp_path):
    dataset = make("affnist", tmp_path, *DIGITS)
    assert dataset.missing_files() == [FILE]
    message = rf"test\.mat is missing: download {re.escape(URL)} by hand and unpack it into"
    for attempt in (dataset.require_files, lambda: dataset.prepare(print), lambda: dataset.read("test")):
        with pytest.raises(DataError, match=message):
            attempt()
    lines = []
    assert prepare(dataset, print_line=lines.append, progress=print) == 1
    assert lines[0] == f"affnist: getting {FILE} in {tmp_path / 'affNIST'}"
    assert str(tmp_path / "affNIST") in lines[1]
    assert "dataset.test_pictures=expanded" in lines[1]
    assert dataset.problems() == [f"{dataset.path} is missing; it is in {URL}"]


def test_training_and_the_expanded_test_images_need_no_file(tmp_path):
    dataset = make("affnist", tmp_path, *DIGITS)
    assert dataset.read_training()[0].size + dataset.read_training()[1].size == 1438
    assert dataset.familiar().size == ORIGINALS
    expanded = make("affnist", tmp_path, *DIGITS, "dataset.test_pictures=expanded")
    assert expanded.missing_files() == expanded.problems() == expanded.caveats() == []
    expanded.require_files()
    assert torch.equal(expanded.read("test").images, dataset.familiar().images)


def test_a_complete_file_is_never_reported_as_verified(world):
    dataset, lines = world(), []
    assert verify(dataset, print_line=lines.append) == 1
    assert len(lines) == 1
    assert "no checksum is published to compare it with (sha256 " in lines[0]
    assert dataset.caveats() == [
        f"affnist: no checksum of {FILE} is published; only its structure was checked"
    ]


def test_a_source_with_other_channels_is_refused(tmp_path):
    overrides = ("dataset@dataset.source=cifar10", "dataset.canvas=44")
    with pytest.raises(
        UserError, match="source must have grayscale images in 10 classes, got 3 channels and 10"
    ):
        make("affnist", tmp_path, *overrides)


@pytest.fixture
def real_root(tmp_path):
    root = os.environ.get("CAPSEXP_DATA", str(tmp_path))
    if make("mnist_affine", root).missing_files():
        pytest.skip("MNIST is not under CAPSEXP_DATA")
    return root


def test_transposed_images_are_detected_by_the_means_of_their_classes(real_root):
    dataset = make("mnist_affine", real_root)
    test, originals = dataset.read("test"), dataset.centered(dataset.source.read("test"))
    assert torch.equal(make_upright(test.images, test.labels, originals), test.images)
    assert torch.equal(make_upright(test.images.mT, test.labels, originals), test.images)
    means, expected = class_means(test), class_means(originals)
    upright, transposed = ((means * reference).sum().item() for reference in (expected, expected.mT))
    assert upright > 1.1 * transposed


def test_the_official_file_holds_32_transforms_of_each_mnist_test_image(real_root):
    dataset = make("affnist", real_root)
    if dataset.missing_files():
        pytest.skip("affNIST is not under CAPSEXP_DATA")
    test, originals = dataset.read("test"), dataset.source.read("test")
    assert test.labels.bincount().tolist() == (32 * originals.labels.bincount()).tolist()
    means = class_means(test)
    expected = class_means(Split(dataset.centered(originals).images, originals.labels))
    assert (means * expected).sum() > 1.1 * (means * expected.mT).sum()
