"""Contract of every dataset: each `conf/dataset/*.yaml` is tested automatically."""

import importlib
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from capsexp.config.build import build as build_node
from capsexp.config.compose import compose, to_plain
from capsexp.data.dataset import Dataset
from capsexp.data.preprocess import Preprocess

CONF = Path(__file__).parents[1] / "conf/dataset"
CONFIGS = sorted(CONF.rglob("*.yaml"))
NAMES = [path.stem for path in CONFIGS]


def resolve(target):
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def node(name, *, data_root="nowhere", path="nowhere"):
    overrides = [f"dataset={name}", f"data_root={data_root}"]
    overrides += [f"dataset.path={path}"] if name == "image_folder" else []
    return to_plain(compose("train", overrides, config_dir=None))["dataset"]


def build(name, **places):
    built = build_node(node(name, **places), at="dataset")
    assert isinstance(built.preprocess, Preprocess)
    return built


def write_own_images(folder):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def dataset(request, tmp_path):
    """The dataset with its real data; skips the test if they are missing."""
    root = os.environ.get("CAPSEXP_DATA", str(tmp_path / "nothing"))
    path = write_own_images(tmp_path / "images") if request.param == "image_folder" else "nowhere"
    built = build(request.param, data_root=root, path=path)
    if built.missing_files():
        pytest.skip(f"{request.param} is not under CAPSEXP_DATA={root}")
    return built


def test_there_are_datasets():
    assert len(CONFIGS) >= 6


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_the_class_in_the_module_of_its_own_name(name):
    target = node(name)["_target_"]
    assert target.rpartition(".")[0] == f"capsexp.dataset.{name}"
    assert issubclass(resolve(target), Dataset)
    assert resolve(target).name == name


@pytest.mark.parametrize("name", NAMES)
def test_the_keys_of_a_config_are_the_keywords_of_its_class(name):
    keywords = node(name)
    signature = inspect.signature(resolve(keywords.pop("_target_")))
    assert set(keywords) == set(signature.parameters)
    assert all(p.default is p.empty and p.kind is p.KEYWORD_ONLY for p in signature.parameters.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_config_starts_with_a_description(name):
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[1].startswith("# ")


def test_each_module_has_a_config():
    modules = Path(inspect.getfile(importlib.import_module("capsexp.dataset"))).parent.glob("*.py")
    assert sorted(path.stem for path in modules if path.stem != "__init__") == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name != "image_folder"])
def test_shape_and_classes_are_known_without_any_data(name):
    built = build(name)
    assert len(built.image_shape) == len(built.raw_shape) == 3
    assert built.image_shape[0] in (1, 2, 3)
    assert len(set(built.classes)) == len(built.classes) >= 2


@pytest.mark.parametrize("dataset", NAMES, indirect=True)
def test_images_and_labels_match_the_attributes(dataset):
    training, validation = dataset.read_training()
    test = dataset.read("test")
    assert validation.size > 0
    for split in (training, validation, test):
        assert split.images.dtype == torch.uint8
        assert tuple(split.images.shape[1:]) == dataset.raw_shape
        assert split.images.is_contiguous()
        # Nearly the whole range of bytes: resizing reduces it a little.
        assert split.images.min() < 16
        assert split.images.max() >= 240
    assert all("\n" not in line for line in dataset.caveats())
    for split in (training, test):
        assert split.labels.unique().tolist() == list(range(len(dataset.classes)))


@pytest.mark.parametrize("dataset", NAMES, indirect=True)
def test_batches_have_the_shapes_and_ranges_that_networks_expect(dataset):
    test = dataset.read("test")
    batches = dataset.batches(
        test, batch_size=8, seed=0, device="cpu", memory_format=torch.channels_last, limit=3
    )
    assert dataset.check_test() == batches.count
    label_axis = () if dataset.labels_per_image == 1 else (dataset.labels_per_image,)
    for batch in (*batches.training(0), *batches.in_order()):
        assert tuple(batch.images.shape[1:]) == dataset.image_shape
        assert tuple(batch.pixels.shape[1:]) == (*label_axis, *dataset.image_shape)
        assert tuple(batch.labels.shape[1:]) == tuple(batch.indices.shape[1:]) == label_axis
        assert batch.images.dtype == batch.pixels.dtype == torch.float32
        assert batch.images.isfinite().all()
        assert 0 <= batch.pixels.min() <= batch.pixels.max() <= 1
        assert 0 <= batch.labels.min() <= batch.labels.max() < len(dataset.classes)
        assert torch.equal(batch.labels, test.labels[batch.indices])
