"""Training that ends at an accuracy: runs with scripted accuracies, and real runs that are killed."""

import json
import re

import pytest
import torch

from capsexp.analysis.evaluate_run import evaluate_run
from capsexp.errors import UserError
from capsexp.training import checkpoint, train
from capsexp.training.budget import Budget
from capsexp.training.state import State
from capsexp.training.trainer import Trainer

AFFINE = (
    "dataset=mnist_affine",
    "dataset@dataset.source=digits",
    "dataset.canvas=16",
    "dataset.preprocess.shift=4",
    "dataset.transforms=2",
)
FAMILIAR = (*AFFINE, "trainer.stop_on=familiar")
SPLITS = {144: "validation", 359: "familiar", 718: "test"}  # by their sizes
SCRIPT = {
    "validation": {5: 0.9, 10: 0.5, 15: 0.6},
    "familiar": {5: 0.3, 10: 0.8, 15: 0.95},
}


@pytest.fixture
def script(monkeypatch):
    """Replace the accuracies of validation by those of SCRIPT."""
    real = train.evaluate

    def evaluate(model, batches, loss, step, **options):
        metrics = real(model, batches, loss, step, **options)
        scripted = SCRIPT.get(SPLITS[batches.count])
        return metrics | {"accuracy": scripted[step.number]} if scripted else metrics

    monkeypatch.setattr(train, "evaluate", evaluate)


def status(path):
    return json.loads((path / "status.json").read_text())


def best_step(path):
    return checkpoint.step_of(path / "checkpoints" / "best.pt")


def test_familiar_images_end_the_training_and_these_weights_are_the_best(
    tmp_path, script, train_tiny, metrics_of, capsys
):
    results = train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.8")
    ended, lines = status(tmp_path), metrics_of(tmp_path)
    assert ended["stopped"] == {"on": "familiar", "accuracy": 0.8, "step": 10}
    assert (ended["status"], ended["step"], ended["total"]) == ("completed", 10, 15)
    assert ended["best"] == {"accuracy": 0.5, "step": 10}  # although an earlier validation was better
    assert best_step(tmp_path) == 10
    assert results["validation/best_accuracy"] == 0.5
    assert results["familiar/accuracy"] == ended["results"]["familiar/accuracy"] == 0.8
    validations = [line for line in lines if "validation/loss" in line]
    assert [(line["step"], line["familiar/accuracy"]) for line in validations] == [(5, 0.3), (10, 0.8)]
    output = capsys.readouterr().out
    assert output.count("familiar TEST images decide when training ends") == 1
    assert "stopped at step 10 of 15: accuracy 0.8000 on familiar images" in output


def test_validation_images_end_the_training_and_no_familiar_images_are_read(
    tmp_path, script, train_tiny, metrics_of, capsys
):
    results = train_tiny(tmp_path, *AFFINE, "trainer.stop_accuracy=0.9")
    assert status(tmp_path)["stopped"] == {"on": "validation", "accuracy": 0.9, "step": 5}
    assert best_step(tmp_path) == 5
    assert not any("familiar" in key for line in metrics_of(tmp_path) for key in line)
    assert "familiar/accuracy" not in results
    assert "TEST" not in capsys.readouterr().out


def test_an_accuracy_that_is_never_reached_is_reported_and_the_run_completes(
    tmp_path, script, train_tiny, capsys
):
    results = train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.96")
    ended = status(tmp_path)
    assert ended["stopped"] is None
    assert (ended["status"], ended["step"], ended["best"]["step"]) == ("completed", 15, 5)
    assert "test/accuracy" in results
    assert "an accuracy of 0.96 on familiar images was not reached" in capsys.readouterr().out


def test_without_the_setting_nothing_is_reported(tmp_path, train_tiny, capsys):
    train_tiny(tmp_path, *AFFINE)
    assert status(tmp_path)["stopped"] is None
    assert "reached" not in capsys.readouterr().out


def test_a_run_without_validation_images_can_stop_on_familiar_ones(tmp_path, script, train_tiny, metrics_of):
    results = train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.8", "dataset.source.validation=0")
    assert best_step(tmp_path) == 10
    assert status(tmp_path)["best"] is None
    assert results.keys() >= {"familiar/accuracy", "test/accuracy"}
    assert "validation/best_accuracy" not in results


def test_the_test_and_eval_use_the_weights_of_the_stop(tmp_path, train_tiny, tiny_components):
    """Without a script: the first validation of a real run ends it, at any accuracy."""
    overrides = (*FAMILIAR, "trainer.stop_accuracy=0.001", "trainer.limit_eval_batches=null")
    results = train_tiny(tmp_path, *overrides)
    assert status(tmp_path)["stopped"]["step"] == best_step(tmp_path) == 5
    settings = {"run": str(tmp_path), "weights": "best"}
    for split in ("familiar", "test"):
        values = evaluate_run(tiny_components(*overrides), {**settings, "split": split})
        assert values["accuracy"] == results[f"{split}/accuracy"]
    stopped = status(tmp_path)["stopped"]
    assert stopped["accuracy"] == results["familiar/accuracy"]


class StopAt(Exception):  # noqa: N818
    pass


def die(*arguments, **options):
    raise StopAt


def dying_at(step, split):
    """Return an `evaluate` that dies at one step and split."""
    real = train.evaluate

    def evaluate(model, batches, loss, position, **options):
        if position.number == step and SPLITS[batches.count] == split:
            raise StopAt
        return real(model, batches, loss, position, **options)

    return evaluate


def deaths():
    """Places where a run that stops at step 10 may die: the name to replace, and its replacement."""
    real_save = checkpoint.save

    def save_but_not_10(folder, state, *, step):
        if state["stopped"]:
            raise StopAt
        return real_save(folder, state, step=step)

    return {
        "in an early step": ("accumulate_gradients", die),
        "in the first validation": ("evaluate", dying_at(5, "familiar")),
        "in the last validation": ("evaluate", dying_at(10, "familiar")),
        "between the last validation and its checkpoint": ("checkpoint.save", save_but_not_10),
        "after its checkpoint": ("describe_end", die),
        "in the test": ("evaluate", dying_at(10, "test")),
    }


@pytest.mark.parametrize("place", list(deaths()))
def test_a_run_that_dies_anywhere_stops_at_the_same_step(
    place, tmp_path, script, monkeypatch, train_tiny, assert_same_run
):
    overrides = (*FAMILIAR, "trainer.stop_accuracy=0.8")
    name, replacement = deaths()[place]
    with monkeypatch.context() as patch:
        patch.setattr(f"capsexp.training.train.{name}", replacement)
        with pytest.raises(StopAt):
            train_tiny(tmp_path / "killed", *overrides)
    results = train_tiny(tmp_path / "killed", *overrides)
    assert results == train_tiny(tmp_path / "whole", *overrides)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert_same_run(killed, whole)
    assert status(killed)["stopped"] == status(whole)["stopped"]
    assert best_step(killed) == best_step(whole) == 10


def test_a_stopped_run_continues_only_if_a_higher_accuracy_is_asked_for(tmp_path, script, train_tiny):
    train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.8")
    train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.75", "resume=force")
    assert status(tmp_path)["stopped"]["step"] == 10
    train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.9", "resume=force")
    assert status(tmp_path)["stopped"] == {"on": "familiar", "accuracy": 0.95, "step": 15}
    assert best_step(tmp_path) == 15


def test_a_checkpoint_from_before_this_setting_is_accepted(tiny_components):
    components = tiny_components()
    model = components.new_model()
    state = State(model, components.new_optimizer(model.parameters(), lr=0.1), None, budget=Budget(9))
    saved = state.state_dict([{"random": torch.get_rng_state(), "random_cuda": []}])
    del saved["stopped"]
    state.stopped = {"on": "validation", "accuracy": 1.0, "step": 3}
    state.restore(saved)
    assert state.stopped is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.stop_on=familiar"],
            "trainer.stop_on: digits has no familiar test images beside its test",
        ),
        (
            ["dataset.validation=0"],
            "trainer.stop_accuracy: this run has no validation images to measure it on",
        ),
    ],
)
def test_missing_images_are_an_error_before_training(overrides, message, tmp_path, train_tiny):
    with pytest.raises(UserError, match=re.escape(message)):
        train_tiny(tmp_path, "trainer.stop_accuracy=0.5", *overrides)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("wrong", [0, -0.1, 1.01, 99])
def test_an_accuracy_is_a_fraction(wrong, tiny_components):
    with pytest.raises(UserError, match=rf"trainer: stop_accuracy must be in \(0, 1\], got {wrong}"):
        tiny_components(f"trainer.stop_accuracy={wrong}")


def test_an_accuracy_is_reached_in_spite_of_rounding(tiny_components):
    trainer: Trainer = tiny_components("trainer.stop_accuracy=0.9922").trainer
    for count in (9922, 9921):
        accuracy = torch.tensor([count / 10_000]).float().item()
        stop = trainer.check_stop({"validation/accuracy": accuracy - 1e-8}, 1)
        assert (stop is not None) is (count == 9922)
