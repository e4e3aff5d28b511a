"""A run stores its data when it begins, and notices other data when it resumes."""

import pytest
import torch
from image_examples import write_noise
from PIL import Image

from capsexp.config.build import build_components
from capsexp.data.dataset import Dataset
from capsexp.data.manifest import FILE, Manifest
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split
from capsexp.dataset.multimnist import MultiMNIST
from capsexp.errors import DataError, UserError
from capsexp.training.run_data import data_to_resume, keep_data, keep_fingerprints
from capsexp.training.run_dir import RunDir
from capsexp.training.train import train as train_in


class Arrays(Dataset):
    """A user's own dataset without files that capsexp knows."""

    name = "arrays"
    classes = ("a", "b")
    file_shape = (1, 4, 4)

    def __init__(self, value: int = 0, *, resize: int | None = None) -> None:
        self.value = value
        super().__init__(preprocess=Preprocess.identity(resize=resize), validation=2, split_seed=0)

    def _load(self, split):
        images = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
        images[3] = self.value if split == "test" else self.value // 2
        return Split(images, torch.arange(8) % 2)


def pairs(value=0):
    return MultiMNIST(source=Arrays(value), shift=0, pad=0, pair_seed=0, test_partners=1)


def start(run, dataset, *, force=False):
    """What the start of a training does; returns the lines that it prints."""
    lines = []
    keep_data(run, dataset, force=force, report=lines.append)
    dataset.read_training()
    dataset.read("test")
    keep_fingerprints(run, dataset, report=lines.append)
    return lines


@pytest.mark.parametrize("make", [Arrays, pairs, lambda value=0: Arrays(value, resize=3)])
def test_arrays_are_known_by_their_checksums(make, tmp_path):
    assert start(tmp_path, make()) == []
    stored = Manifest.load(tmp_path)
    assert set(stored.fingerprints) == {"the train split", "the test split"}
    assert start(tmp_path, make()) == []
    assert Manifest.load(tmp_path) == stored
    lines = start(tmp_path, make(7), force=True)
    assert lines == [
        f"arrays: the {split} split is not what this run was trained with (another checksum); "
        "the run continues with the data as they are now"
        for split in ("test", "train")
    ]
    assert Manifest.load(tmp_path) != stored


@pytest.mark.parametrize("value", [1, 7])
def test_arrays_that_changed_are_refused_when_they_are_read(value, tmp_path):
    start(tmp_path, Arrays())
    dataset = Arrays.from_manifest(manifest=Manifest.load(tmp_path), value=value)
    with pytest.raises(DataError, match="arrays: the test split is not what this run was trained with"):
        dataset.read("test")


@pytest.fixture
def animals(tmp_path):
    """A folder of images of three classes."""
    return write_noise(tmp_path / "animals", ("cat", "dog", "emu"), count=8)


@pytest.fixture
def train(animals, train_tiny, tiny_config, tmp_path):
    """Train a tiny run on the images, or go on with it as the command does."""
    always = (
        "dataset=image_folder",
        f"dataset.path={animals}",
        "trainer.max_steps=2",
        "trainer.batch_size=4",
    )

    def run(*overrides):
        config = tiny_config(*always, *overrides)
        directory = RunDir(tmp_path / "run")
        manifest = data_to_resume(config, directory.path)
        components = build_components(config, plugins=[], manifest=manifest)
        with directory.locked(), directory.track_status({}):
            directory.check_config(config, resume=config["resume"], command=[])
            return train_in(components, directory, config)

    return run


def test_a_run_of_images_resumes_with_those_that_it_began_with(train, animals, tmp_path, capsys):
    results = train()
    stored = (tmp_path / "run" / FILE).read_bytes()
    Image.open(animals / "cat" / "0.png").save(animals / "cat" / "new.png")
    capsys.readouterr()
    assert train() == results
    assert f"1 image was added to {animals} later and not used: cat/new.png" in capsys.readouterr().out
    assert (tmp_path / "run" / FILE).read_bytes() == stored
    (animals / "cat").rename(animals / "zebra")
    with pytest.raises(UserError, match="this run learned cat, dog, emu"):
        train()
    assert (tmp_path / "run" / FILE).read_bytes() == stored


def test_force_goes_on_with_the_data_as_they_are_and_says_so(train, animals, tmp_path, capsys):
    train()
    (animals / "cat" / "0.png").rename(animals / "cat" / "moved.png")
    with pytest.raises(UserError, match=r"1 image is missing: cat/0\.png") as caught:
        train()
    assert "resume=force" in caught.value.problems[-1]
    capsys.readouterr()
    train("resume=force")
    out = capsys.readouterr().out
    assert "1 image is missing: cat/0.png; the run continues with the data as they are now" in out
    assert "1 image is new: cat/moved.png; the run continues with the data as they are now" in out
    train()


def test_a_run_of_an_earlier_version_resumes_and_says_what_is_unknown(train, tmp_path, capsys):
    train()
    (tmp_path / "run" / FILE).unlink()
    capsys.readouterr()
    train()
    assert "an earlier version began this run and stored no list of its images" in capsys.readouterr().out
    train()
    assert "an earlier version" not in capsys.readouterr().out


def test_components_without_the_manifest_are_compared_with_it(animals, tmp_path, tiny_config):
    def dataset():
        overrides = ("dataset=image_folder", f"dataset.path={animals}")
        return build_components(tiny_config(*overrides), plugins=[]).dataset

    keep_data(tmp_path, dataset(), force=False, report=print)
    (animals / "cat" / "0.png").unlink()
    with pytest.raises(UserError, match=r"missing: cat/0\.png"):
        keep_data(tmp_path, dataset(), force=False, report=print)


def test_a_damaged_manifest_is_replaced_by_force_only(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        start(tmp_path, Arrays())
    (line,) = start(tmp_path, Arrays(), force=True)
    assert line.endswith("it is replaced")
    assert start(tmp_path, Arrays()) == []


def test_another_dataset_in_the_config_is_told_as_such(train, animals):
    train()
    other = animals.rename(animals.with_name("others"))
    with pytest.raises(UserError, match=r"dataset\.path: was '.*animals', is '.*others'"):
        train(f"dataset.path={other}")
