"""The components of a trained run have its own data, unless the command names others."""

import shutil

import pytest
from image_examples import write_noise
from omegaconf import OmegaConf
from PIL import Image

from capsexp.analysis.run_components import run_components
from capsexp.analysis.trained_run import TrainedRun
from capsexp.config.build import build_components
from capsexp.config.saved import load_saved_config
from capsexp.config.settings import with_setting
from capsexp.data.manifest import FILE, Manifest
from capsexp.errors import UserError

CLASSES = ("cat", "dog")


@pytest.fixture
def new_run(tmp_path, tiny_config):
    """A function that makes the directory of a run, with its config and its data, but without a network."""

    def make(*overrides):
        config, path = tiny_config(*overrides), tmp_path / "run"
        (path / ".hydra").mkdir(parents=True)
        (path / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        build_components(config, plugins=[]).dataset.manifest().save(path)
        return path

    return make


@pytest.fixture
def run(new_run, tmp_path):
    """The directory of a run of images."""
    return new_run(
        "dataset=image_folder", f"dataset.path={write_noise(tmp_path / 'animals', CLASSES, count=6)}"
    )


def components(run, **changes):
    config = load_saved_config(run)
    for key, value in changes.items():
        config = with_setting(config, key.replace("__", "."), value)
    return run_components(config, plugins=[])


def test_a_run_has_the_classes_and_files_that_it_stored(run, tmp_path):
    manifest = Manifest.load(run)
    (tmp_path / "animals" / "cat").rename(tmp_path / "animals" / "zebra")
    built = components(run)
    assert built.dataset.classes == ("cat", "dog")
    assert built.dataset.stored == manifest
    assert built.remarks == ()
    with pytest.raises(UserError, match="this run learned cat, dog"):
        built.dataset.read("test")


def test_without_its_folder_a_run_has_its_network_and_classes(run, tmp_path):
    shutil.rmtree(tmp_path / "animals")
    built = components(run)
    assert built.dataset.classes == ("cat", "dog")
    assert built.new_model() is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [("dataset__preprocess__resize", [9, 9]), ("trainer__batch_size", 7), ("seed", 5)],
)
def test_other_settings_do_not_change_the_data(key, value, run):
    built = components(run, **{key: value})
    assert built.dataset.stored is not None
    assert built.remarks == ()


def test_a_moved_folder_is_that_of_the_run(run, tmp_path):
    moved = (tmp_path / "animals").rename(tmp_path / "moved")
    built = components(run, dataset__path=str(moved))
    assert built.remarks == ()
    assert built.dataset.read("test").size == len(Manifest.load(run).files["test"])


def test_a_copy_with_a_changed_image_is_not_that_of_the_run(run, tmp_path):
    copy = shutil.copytree(tmp_path / "animals", tmp_path / "copy")
    Image.open(copy / "cat" / "0.png").transpose(Image.Transpose.ROTATE_90).save(copy / "cat" / "0.png")
    built = components(run, dataset__path=str(copy))
    assert built.remarks != ()
    assert built.dataset.read("test").size > 0


def test_other_images_of_the_same_classes_are_evaluated_with_a_remark(run, tmp_path):
    other = write_noise(tmp_path / "other", CLASSES, count=6)
    (other / "cat" / "0.png").unlink()
    built = components(run, dataset__path=str(other))
    assert built.dataset.folder == other
    assert built.dataset.stored is None
    (remark,) = built.caveats()
    assert remark.startswith(f"dataset.path was '{tmp_path / 'animals'}', is '{other}'")


@pytest.mark.parametrize("classes", [("dog", "emu"), ("cat",), ("Cat", "dog"), ("dog", "cat", "emu")])
def test_other_classes_are_refused(classes, run, tmp_path):
    other = write_noise(tmp_path / "other", classes, count=6)
    with pytest.raises(UserError) as caught:
        components(run, dataset__path=str(other))
    assert len(caught.value.problems) == 1
    assert str(other) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("test_seed", 1), ("test_share", 0.5), ("validation", 1), ("split_seed", 3), ("background", "black")],
)
def test_a_setting_that_decides_the_splits_has_a_remark(key, value, run):
    built = components(run, **{f"dataset__{key}": value})
    assert built.remarks[0].startswith(f"dataset.{key} was ")
    assert built.dataset.stored is None


def test_a_relative_path_is_the_same_folder_from_elsewhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert components(run, dataset__path="animals").remarks == ()
    monkeypatch.chdir(run)
    write_noise(run / "animals", ("dog", "cat", "emu"), count=6)
    with pytest.raises(
        UserError, match=r"run/animals has the classes cat, dog, emu; this run learned cat, dog"
    ):
        components(run, dataset__path=f"{run}/animals")


def test_the_source_of_a_derived_dataset_belongs_to_the_run_too(new_run, tmp_path):
    animals = write_noise(tmp_path / "animals", CLASSES, count=6)
    run = new_run(
        "dataset=multimnist",
        "dataset@dataset.source=image_folder",
        f"dataset.source.path={animals}",
        "model.primary_stride=1",
    )
    (animals / "cat").rename(animals / "zebra")
    assert components(run).dataset.classes == ("cat", "dog")
    pairs = components(run, dataset__pair_seed=3)
    assert pairs.remarks[0].startswith("dataset.pair_seed was 0, is 3")
    for built in (components(run), pairs):
        with pytest.raises(UserError, match="this run learned cat, dog"):
            built.dataset.read("test")
    with pytest.raises(UserError, match="dog, zebra; this run learned cat, dog"):
        components(run, dataset__source__test_seed=1)


@pytest.mark.parametrize("key", ["dataset__split_seed", "dataset__validation"])
def test_a_fixed_dataset_has_a_remark_for_other_splits(key, new_run):
    run = new_run("dataset=digits")
    assert components(run).caveats() == []
    assert components(run, **{key: 11}).caveats()[0].startswith(key.replace("__", ".") + " was ")


def test_downloading_is_no_other_dataset(new_run, tmp_path):
    run = new_run("dataset=mnist", f"data_root={tmp_path}")
    assert components(run, dataset__download=True).caveats() == []
    assert components(run, dataset__root=str(tmp_path / "other")).caveats() == []


def test_other_files_in_another_data_root_are_evaluated_with_a_remark(new_run, tmp_path):
    for number, place in enumerate(("here", "there")):
        (tmp_path / place / "affNIST").mkdir(parents=True)
        (tmp_path / place / "affNIST" / "test.mat").write_bytes(bytes([number]) * 100_000)
    run = new_run("dataset=affnist", f"data_root={tmp_path}/here")
    there = str(tmp_path / "there")
    (remark,) = components(run, dataset__root=there, dataset__source__root=there).remarks
    assert "affNIST/test.mat is not what this run was trained with" in remark
    shutil.copy(tmp_path / "here/affNIST/test.mat", tmp_path / "there/affNIST/test.mat")
    assert components(run, dataset__root=there, dataset__source__root=there).remarks == ()
    (tmp_path / "here/affNIST/test.mat").write_bytes(b"\x02" * 100_000)
    with pytest.raises(UserError, match="is not what this run was trained with"):
        components(run).dataset.read("test")


def test_another_dataset_needs_the_same_classes(new_run, tiny_config, tmp_path):
    run = new_run("dataset=mnist", f"data_root={tmp_path}")
    other = tiny_config("dataset=fashion_mnist", f"data_root={tmp_path}")["dataset"]
    with pytest.raises(UserError, match=r"has the classes T-shirt/top, .*; this run learned 0, 1, "):
        run_components({**load_saved_config(run), "dataset": other}, plugins=[])
    digits = tiny_config("dataset=digits")["dataset"]
    assert run_components({**load_saved_config(run), "dataset": digits}, plugins=[]).remarks != ()


def test_a_run_of_an_earlier_version_reads_its_folder_and_says_so(run, tmp_path):
    (run / FILE).unlink()
    built = components(run)
    assert built.dataset.stored is None
    assert built.remarks == (
        "an earlier version began this run and stored no list of its images: those drawn for testing and "
        "validation may be others now",
    )


def test_a_damaged_manifest_is_one_line_for_every_reader(run):
    (run / FILE).write_text("{")
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        TrainedRun.load(run)
