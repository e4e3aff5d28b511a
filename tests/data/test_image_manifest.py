"""A folder of images that belongs to a run: what the run stored decides, and each change is reported."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from capsexp.data.manifest import Manifest
from capsexp.data.preprocess import Preprocess
from capsexp.dataset.image_folder import ImageFolder
from capsexp.errors import DataError

CLASSES = ("cat", "dog", "emu")
SETTINGS = {
    "test_share": 0.3,
    "test_seed": 0,
    "background": "auto",
    "white_level": None,
    "validation": 0.2,
    "split_seed": 0,
}


def write_image(path, *, seed, dtype=np.uint8, largest=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, largest, (4, 5), endpoint=True)
    Image.fromarray(pixels.astype(dtype)).save(path)


def write_folder(root, *, seed=0, **keywords):
    for label, name in enumerate(CLASSES):
        for number in range(8):
            write_image(root / name / f"{number}.png", seed=[seed, label, number], **keywords)
    return root


def settings(path):
    return {"path": str(path), "preprocess": Preprocess.identity(), **SETTINGS}


@pytest.fixture
def animals(tmp_path):
    return write_folder(tmp_path / "animals")


@pytest.fixture
def manifest(animals):
    stored = ImageFolder(**settings(animals)).manifest()
    return Manifest.from_json(stored.to_json().encode())


def of_run(animals, manifest):
    return ImageFolder.from_manifest(manifest=manifest, **settings(animals))


def all_splits(dataset):
    return [*dataset.read_training(), dataset.read("test")]


def test_an_unchanged_folder_gives_the_same_splits(animals, manifest):
    new, again = ImageFolder(**settings(animals)), of_run(animals, manifest)
    assert again.classes == new.classes == CLASSES
    assert (again.raw_shape, again.reading) == (new.raw_shape, new.reading)
    for expected, split in zip(all_splits(new), all_splits(again), strict=True):
        assert split.size > 0
        assert torch.equal(split.images, expected.images)
        assert torch.equal(split.labels, expected.labels)
    assert again.caveats() == []
    assert again.manifest() == manifest


def rename_class(root):
    (root / "cat").rename(root / "zebra")


def swap_classes(root):
    (root / "cat").rename(root / "other")
    (root / "dog").rename(root / "cat")
    (root / "other").rename(root / "dog")


def remove_class(root):
    shutil.rmtree(root / "cat")


def remove_images(root):
    for path in root.glob("cat/*.png"):
        path.unlink()
    write_image(root / "cat" / "new.png", seed=1)


def change_images(root):
    for path in root.glob("cat/*.png"):
        write_image(path, seed=99)


def append_byte(root):
    for path in root.glob("cat/*.png"):
        path.write_bytes(path.read_bytes() + b"\0")


def replace_by_links(root):
    for path in root.glob("cat/*.png"):
        path.unlink()
        path.symlink_to(root / "dog" / path.name)


def replace_by_folders(root):
    for path in root.glob("cat/*.png"):
        path.unlink()
        path.mkdir()


def replace_folder(root):
    shutil.rmtree(root)
    write_folder(root, seed=7)


def divide(root):
    for name in CLASSES:
        (root / name).rename(root.parent / name)
        for split in ("train", "test"):
            shutil.copytree(root.parent / name, root / split / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_class, "animals: the classes are dog, emu, zebra; this run learned cat, dog, emu"),
        (remove_class, "animals: the classes are dog, emu; this run learned cat, dog, emu"),
        (swap_classes, "images are changed: cat/"),
        (remove_images, "missing: cat/"),
        (change_images, "changed: cat/"),
        (append_byte, "changed: cat/"),
        (replace_by_links, "changed: cat/"),
        (replace_by_folders, "not a regular file|missing|Is a directory"),
        (replace_folder, "images are changed: cat/"),
        (divide, "missing: cat/"),
        (shutil.rmtree, "animals does not exist; name it with dataset.path=FOLDER"),
    ],
)
def test_other_data_are_refused_in_every_split(change, message, animals, manifest):
    change(animals)
    dataset = of_run(animals, manifest)
    assert dataset.classes == CLASSES
    assert dataset.raw_shape == (1, 4, 5)
    for read in (dataset.read_training, lambda: dataset.read("test"), dataset.require_files):
        with pytest.raises(DataError, match=message) as caught:
            read()
        assert all("\n" not in line for line in caught.value.problems)


def test_a_change_in_one_split_leaves_the_others(animals, manifest):
    write_image(animals / manifest.files["train"][0].path, seed=99)
    dataset = of_run(animals, manifest)
    assert dataset.read("test").size == len(manifest.files["test"])
    with pytest.raises(DataError, match="changed"):
        dataset.read_training()


@pytest.mark.parametrize("name", ["cat/new.png", "cat/more/new.png", "zebra/new.png"])
def test_an_added_image_is_told_and_not_used(name, animals, manifest):
    before = all_splits(of_run(animals, manifest))
    write_image(animals / name, seed=99)
    dataset = of_run(animals, manifest)
    for expected, split in zip(before, all_splits(dataset), strict=True):
        assert torch.equal(split.images, expected.images)
    assert dataset.classes == CLASSES
    (line,) = dataset.caveats()
    assert line == f"image_folder: 1 image was added to {animals} later and not used: {name}"


def test_a_brighter_image_does_not_change_how_the_others_are_read(tmp_path):
    root = write_folder(tmp_path / "x-rays", dtype=np.uint16, largest=4000)
    stored = ImageFolder(**settings(root)).manifest()
    write_image(root / "cat" / "bright.png", seed=1, dtype=np.uint16, largest=60000)
    assert of_run(root, stored).reading.white == 4095 != ImageFolder(**settings(root)).reading.white


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"file_shape": [2, 4, 5]},
        {"reading": {"white": -1}},
        {"reading": {"white": "x"}},
        {"reading": {"white": float("inf")}},
        {"reading": {"background": "red"}},
    ],
)
def test_a_manifest_that_is_not_that_of_a_folder_is_refused(changes, animals, manifest):
    content = {**manifest.__dict__, **changes, "file_shape": tuple(changes.get("file_shape", (1, 4, 5)))}
    with pytest.raises(DataError, match=r"data\.json"):
        of_run(animals, Manifest(**content))
