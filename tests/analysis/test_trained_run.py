"""`TrainedRun`: load a run, predict, evaluate, without side effects on the process."""

import copy
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from capsexp.analysis.evaluate_run import evaluate_run
from capsexp.analysis.trained_run import TrainedRun, load_model
from capsexp.errors import UserError
from capsexp.training import device


@pytest.fixture
def saved(tmp_path, train_tiny):
    """`saved(*OVERRIDES)`: the directory of a trained run, with its config where the commands write it."""

    def save(*overrides):
        path = tmp_path / "run"
        train_tiny(path, *overrides)
        (path / ".hydra").mkdir()
        shutil.copy(path / "resolved_config.yaml", path / ".hydra" / "config.yaml")
        return path

    return save


def test_a_loaded_run_has_its_network_classes_step_and_config(saved):
    path = saved("trainer.max_steps=4", "trainer.test=none")
    run = TrainedRun.load(path, weights="last")
    assert run.path == path
    assert not run.model.training
    assert run.classes == tuple("0123456789")
    assert run.step.number == run.step.total == 4
    assert run.dataset is run.components.dataset
    assert run.dataset.name == "digits"
    assert run.config["trainer"]["max_steps"] == 4
    assert run.config["run"] == str(path)
    assert TrainedRun.load(str(path), weights=2).step.number == 2
    assert repr(run) == f"TrainedRun({path}: CapsNet on digits, step 4)"


def test_evaluation_repeats_the_eval_command(saved, tiny_components):
    path = saved("trainer.limit_eval_batches=null")
    run = TrainedRun.load(path)
    for split in ("test", "validation", "train"):
        config = {"run": str(path), "weights": "best", "split": split}
        assert run.evaluate(split) == evaluate_run(tiny_components("trainer.limit_eval_batches=null"), config)
    assert run.evaluate(limit=50) == run.evaluate(limit=50) != run.evaluate()
    assert run.evaluate(limit=10**6) == run.evaluate()
    with pytest.raises(UserError, match="limit: must be an integer >= 1 or null, got 0"):
        run.evaluate(limit=0)
    with pytest.raises(UserError, match=r"split: must be 'test', .* got 'all'"):
        run.evaluate("all")


def test_predictions_are_those_that_evaluation_counts(saved):
    run = TrainedRun.load(saved("trainer.limit_eval_batches=null", "trainer.batch_size=64"))
    images, labels = run.dataset.read("test")
    predictions = run.predict(images)
    assert (predictions.labels == labels).float().mean().item() == pytest.approx(run.evaluate()["accuracy"])
    assert predictions.labels.dtype == torch.int64
    assert predictions.probabilities.shape == (len(images), 10)
    assert torch.equal(predictions.probabilities.argmax(1), predictions.labels)
    assert predictions.classes == tuple(str(label) for label in predictions.labels.tolist())
    assert predictions.reconstructions.shape == (len(images), *run.dataset.image_shape)
    assert 0 <= predictions.reconstructions.min() <= predictions.reconstructions.max() <= 1


def test_bytes_floats_arrays_and_a_single_image_give_the_same_predictions(saved):
    run = TrainedRun.load(saved("trainer.max_steps=4", "trainer.test=none"), weights="last")
    images = run.dataset.read("test").images[:5]
    expected = run.predict(images)
    for same in (images.float() / 255, images.double() / 255, images.numpy(), np.asarray(images) / 255):
        assert torch.equal(run.predict(same).probabilities, expected.probabilities)
    single = run.predict(images[0])
    torch.testing.assert_close(single.probabilities, expected.probabilities[:1])


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 9),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(0, 1, 8, 8),
        torch.zeros(8),
        torch.full((1, 1, 8, 8), 255.0),
        torch.full((1, 1, 8, 8), -0.1),
        torch.full((1, 1, 8, 8), float("nan")),
        torch.zeros(1, 1, 8, 8, dtype=torch.int64),
    ],
)
def test_other_images_are_one_clear_error(images, saved):
    run = TrainedRun.load(saved("trainer.max_steps=2", "trainer.test=none"), weights="last")
    with pytest.raises(ValueError, match="images must "):
        run.predict(images)


def test_a_dataset_that_resizes_takes_images_of_any_size(saved):
    run = TrainedRun.load(
        saved("dataset.preprocess.resize=12", "trainer.max_steps=2", "trainer.test=none"), weights="last"
    )
    small = run.dataset.preprocess.resize_all(torch.randint(0, 256, (3, 1, 40, 30), dtype=torch.uint8))
    large = torch.randint(0, 256, (3, 1, 40, 30), dtype=torch.uint8)
    assert run.predict(large).labels.shape == (3,)
    resized = run.dataset.preprocess.resize_all(large)
    assert torch.equal(run.predict(large).probabilities, run.predict(resized).probabilities)
    assert run.predict(small).labels.shape == (3,)
    with pytest.raises(ValueError, match="images must "):
        run.predict(torch.zeros(3, 3, 40, 30))


def test_a_dataset_of_two_labels_per_image_gives_two_labels(saved):
    path = saved(
        "dataset=multimnist",
        "dataset@dataset.source=digits",
        "trainer.max_steps=2",
        "trainer.test=none",
        "model.primary_stride=1",
    )
    run = TrainedRun.load(path, weights="last")
    predictions = run.predict(torch.rand(3, *run.dataset.raw_shape))
    assert predictions.labels.shape == (3, 2)
    assert [len(names) for names in predictions.classes] == [2, 2, 2]
    assert predictions.reconstructions.shape == (3, 2, *run.dataset.image_shape)


def global_state():
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "matmul": (torch.get_float32_matmul_precision(), torch.backends.cudnn.deterministic),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "hydra": GlobalHydra.instance().hydra,
        "store": copy.deepcopy(ConfigStore.instance().repo),
        "path": list(sys.path),
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
    }


def tuned_device():
    settings = {"threads": 2, "memory_format": "channels_last", "allocator": "tuned", "deterministic": True}
    return device.Device(name="cpu", **settings)


def test_loading_predicting_and_evaluating_change_no_global_state(saved, monkeypatch):
    path = saved("device.threads=3", "device.deterministic=true", "trainer.max_steps=4", "trainer.test=none")
    monkeypatch.setattr(device, "tune_allocator", lambda: pytest.fail("the allocator was tuned"))
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    before = global_state()
    run = TrainedRun.load(path, weights="last")
    run.predict(torch.rand(2, *run.dataset.raw_shape, generator=torch.Generator().manual_seed(0)))
    run.evaluate(limit=10)
    tuned = run.components._replace(device=tuned_device())
    TrainedRun.restore(tuned, path, weights="last")
    load_model(tuned, path, weights=4)
    after = global_state()
    for name, value in before.items():
        assert after[name] == value, name


def test_predictions_need_no_dataset_files(saved, tmp_path, tiny_config):
    path = saved("trainer.max_steps=2", "trainer.test=none", "dataset.preprocess.resize=28")
    config = OmegaConf.load(path / ".hydra" / "config.yaml")
    config.dataset = tiny_config("dataset=mnist", f"data_root={tmp_path / 'nothing'}")["dataset"]
    OmegaConf.save(config, path / ".hydra" / "config.yaml")
    run = TrainedRun.load(path, weights="last")
    assert run.dataset.name == "mnist"
    assert run.predict(torch.rand(2, 1, 28, 28)).labels.shape == (2,)
    with pytest.raises(UserError, match="mnist"):
        run.evaluate()


def test_the_device_can_be_chosen(saved):
    path = saved("trainer.max_steps=2", "trainer.test=none")
    run = TrainedRun.load(path, weights="last", device="cpu")
    assert run.components.device.torch_device.type == "cpu"
    assert run.config["device"]["name"] == "cpu"
    with pytest.raises(UserError, match=r"device\.name: must be .*, got 'tpu'"):
        TrainedRun.load(path, device="tpu")


def test_what_cannot_be_loaded_is_one_clear_error(saved, tmp_path):
    with pytest.raises(UserError, match="none is not a run directory"):
        TrainedRun.load(tmp_path / "none")
    path = saved("trainer.max_steps=2", "trainer.test=none")
    with pytest.raises(UserError, match="77"):
        TrainedRun.load(path, weights=77)
    checkpoint = path / "checkpoints" / "step-00000002.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="do not match the sha256"):
        TrainedRun.load(path, weights="last")
    (path / ".hydra" / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match="cannot be read"):
        TrainedRun.load(path)


def test_a_config_that_names_a_foreign_class_is_refused(saved):
    path = saved("trainer.max_steps=2", "trainer.test=none")
    config = path / ".hydra" / "config.yaml"
    config.write_text(re.sub(r"capsexp\.loss\.margin\.\w+", "builtins.dict", config.read_text()))
    with pytest.raises(UserError, match="may not be built from a config"):
        TrainedRun.load(path, weights="last")
