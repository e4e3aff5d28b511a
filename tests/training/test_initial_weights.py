"""`model.init_from`: the weights of another run as the start of a new one."""

import json

import pytest
import torch

from capsexp.errors import UserError
from capsexp.training import checkpoint
from capsexp.training.initial_weights import load_initial_weights

SHORT = ("trainer.max_epochs=1", "trainer.test=none")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tmp_path_factory.mktemp("other")


@pytest.fixture
def trained(other, train_tiny):
    """A finished run, trained once for all tests."""
    if not (other / "status.json").exists():
        train_tiny(other, *SHORT, "seed=3")
    return other


def weights_of(path, name="best.pt"):
    return checkpoint.load(path / "checkpoints" / name)["model"]


def test_all_weights_of_the_same_network_are_copied(trained, tiny_components):
    model = tiny_components().new_model()
    line = load_initial_weights(model, str(trained))
    for name, value in weights_of(trained).items():
        assert torch.equal(model.state_dict()[name], value), name
    count = len(model.state_dict())
    assert line.startswith(f"init_from: {count} of {count} tensors are those of {trained} at step ")
    assert ";" not in line


def test_what_does_not_fit_is_named_and_keeps_its_start(trained, tiny_components):
    torch.manual_seed(0)
    model = tiny_components("model.decoder=null", "model.class_dim=5").new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    line = load_initial_weights(model, str(trained))
    saved = weights_of(trained)
    for name, value in model.state_dict().items():
        expected = saved[name] if saved[name].shape == value.shape else before[name]
        assert torch.equal(value, expected), name
    assert "of another shape: " in line
    assert "only in that run: decoder." in line


def test_a_run_starts_with_them_says_so_and_resumes_without_them(trained, tmp_path, train_tiny, capsys):
    settings = (*SHORT, f"model.init_from={trained}", "optimizer.lr=1e-30")
    train_tiny(tmp_path / "run", *settings)
    for name, value in weights_of(tmp_path / "run", "last.pt").items():
        torch.testing.assert_close(value, weights_of(trained)[name])
    assert "init_from: " in capsys.readouterr().out
    train_tiny(tmp_path / "run", *settings, "resume=force")
    assert "init_from: " not in capsys.readouterr().out


def test_the_moving_average_is_copied_where_there_is_one(tmp_path, train_tiny, tiny_components):
    train_tiny(tmp_path, *SHORT, "trainer.ema_decay=0.5")
    model = tiny_components().new_model()
    load_initial_weights(model, str(tmp_path))
    average = checkpoint.load(tmp_path / "checkpoints" / "best.pt")["average"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, average[f"module.{name}"]), name


def test_bad_places_are_refused(trained, tmp_path, tiny_components):
    model = tiny_components().new_model()
    with pytest.raises(UserError, match="is no run directory"):
        load_initial_weights(model, str(tmp_path / "nowhere"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_initial_weights(model, str(tmp_path))
    with pytest.raises(UserError, match="fits this network"):
        load_initial_weights(torch.nn.Linear(1, 1), str(trained))
    with pytest.raises(UserError, match=r"model.init_from: must be the directory of a run, or null, got 3"):
        tiny_components("model.init_from=3")


def test_a_run_of_an_earlier_version_has_no_other_start(trained, tmp_path, train_tiny):
    file = trained / "resolved_config.yaml"
    text = file.read_text()
    assert "init_from: null" in text
    file.write_text(text.replace("  init_from: null\n", ""))
    try:
        train_tiny(trained, *SHORT, "seed=3")
    finally:
        file.write_text(text)
    assert json.loads((trained / "status.json").read_text())["status"] == "completed"
