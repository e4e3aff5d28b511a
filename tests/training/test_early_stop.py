"""Training that ends at an accuracy: rounds with scripted accuracies, and real runs that are killed."""

import json
import re

import pytest
import torch

from capsexp.analysis.evaluate_run import evaluate_run
from capsexp.errors import UserError
from capsexp.training import checkpoint, train
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
PARTS = {144: "validation", 359: "familiar", 718: "test"}  # by their counts
SCRIPT = {
    "validation": {5: 0.9, 10: 0.5, 15: 0.6},
    "familiar": {5: 0.3, 10: 0.8, 15: 0.95},
}


@pytest.fixture
def script(monkeypatch):
    """Let the accuracies of validation rounds be these, by part and step."""
    real = train.evaluate

    def told(model, batches, loss, step, **options):
        values = real(model, batches, loss, step, **options)
        scripted = SCRIPT.get(PARTS[batches.count])
        return values | {"accuracy": scripted[step.number]} if scripted else values

    monkeypatch.setattr(train, "evaluate", told)


def status(path):
    return json.loads((path / "status.json").read_text())


def best_step(path):
    return checkpoint.step_of(path / "checkpoints" / "best.pt")


def test_familiar_pictures_end_the_training_and_their_weights_are_the_best(
    tmp_path, script, train_tiny, metrics_of, capsys
):
    results = train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.8")
    told, lines = status(tmp_path), metrics_of(tmp_path)
    assert told["stopped"] == {"on": "familiar", "accuracy": 0.8, "step": 10}
    assert (told["status"], told["step"], told["total"]) == ("completed", 10, 15)
    assert told["best"] == {"accuracy": 0.5, "step": 10}  # although an earlier round was better
    assert best_step(tmp_path) == 10
    assert results["validation/best_accuracy"] == 0.5
    assert results["familiar/accuracy"] == told["results"]["familiar/accuracy"] == 0.8
    rounds = [line for line in lines if "validation/loss" in line]
    assert [(line["step"], line["familiar/accuracy"]) for line in rounds] == [(5, 0.3), (10, 0.8)]
    said = capsys.readouterr().out
    assert said.count("familiar TEST pictures decide when training ends") == 1
    assert "stopped at step 10 of 15: accuracy 0.8000 on familiar pictures" in said


def test_validation_pictures_end_the_training_without_a_look_at_others(
    tmp_path, script, train_tiny, metrics_of, capsys
):
    results = train_tiny(tmp_path, *AFFINE, "trainer.stop_accuracy=0.9")
    assert status(tmp_path)["stopped"] == {"on": "validation", "accuracy": 0.9, "step": 5}
    assert best_step(tmp_path) == 5
    assert not any("familiar" in key for line in metrics_of(tmp_path) for key in line)
    assert "familiar/accuracy" not in results
    assert "TEST" not in capsys.readouterr().out


def test_an_accuracy_that_is_never_reached_is_told_and_the_run_is_whole(tmp_path, script, train_tiny, capsys):
    results = train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.96")
    told = status(tmp_path)
    assert told["stopped"] is None
    assert (told["status"], told["step"], told["best"]["step"]) == ("completed", 15, 5)
    assert "test/accuracy" in results
    assert "an accuracy of 0.96 on familiar pictures was not reached" in capsys.readouterr().out


def test_without_the_setting_nothing_is_said_of_it(tmp_path, train_tiny, capsys):
    train_tiny(tmp_path, *AFFINE)
    assert status(tmp_path)["stopped"] is None
    assert "reached" not in capsys.readouterr().out


def test_a_run_without_validation_pictures_can_match_familiar_ones(tmp_path, script, train_tiny, metrics_of):
    results = train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.8", "dataset.source.validation=0")
    assert best_step(tmp_path) == 10
    assert status(tmp_path)["best"] is None
    assert results.keys() >= {"familiar/accuracy", "test/accuracy"}
    assert "validation/best_accuracy" not in results


def test_the_test_and_eval_have_the_weights_that_were_matched(tmp_path, train_tiny, tiny_parts):
    """No script: the first round of a real run ends it, at whatever accuracy."""
    overrides = (*FAMILIAR, "trainer.stop_accuracy=0.001", "trainer.limit_eval_batches=null")
    results = train_tiny(tmp_path, *overrides)
    assert status(tmp_path)["stopped"]["step"] == best_step(tmp_path) == 5
    told = {"run": str(tmp_path), "weights": "best"}
    for part in ("familiar", "test"):
        values = evaluate_run(tiny_parts(*overrides), {**told, "split": part})
        assert values["accuracy"] == results[f"{part}/accuracy"]
    stopped = status(tmp_path)["stopped"]
    assert stopped["accuracy"] == results["familiar/accuracy"]


class StopAt(Exception):  # noqa: N818
    pass


def die(*arguments, **options):
    raise StopAt


def dying_at(step, part):
    """`evaluate` that dies at one step and part."""
    real = train.evaluate

    def evaluate(model, batches, loss, position, **options):
        if position.number == step and PARTS[batches.count] == part:
            raise StopAt
        return real(model, batches, loss, position, **options)

    return evaluate


def deaths():
    """Where a run that is matched at step 10 may die, by name: what to replace, and by what."""
    real_save = checkpoint.save

    def save_but_not_10(folder, state, *, step):
        if state["stopped"]:
            raise StopAt
        return real_save(folder, state, step=step)

    return {
        "in an early step": ("gradients", die),
        "in the first round": ("evaluate", dying_at(5, "familiar")),
        "in the last round": ("evaluate", dying_at(10, "familiar")),
        "between the last round and its checkpoint": ("checkpoint.save", save_but_not_10),
        "after its checkpoint": ("ending", die),
        "in the test": ("evaluate", dying_at(10, "test")),
    }


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("place", list(deaths()))
def test_a_run_that_dies_anywhere_stops_where_it_would_have(place, tmp_path, script, monkeypatch, train_tiny):
    overrides = (*FAMILIAR, "trainer.stop_accuracy=0.8")
    name, replacement = deaths()[place]
    with monkeypatch.context() as patch:
        patch.setattr(f"capsexp.training.train.{name}", replacement)
        with pytest.raises(StopAt):
            train_tiny(tmp_path / "killed", *overrides)
    results = train_tiny(tmp_path / "killed", *overrides)
    assert results == train_tiny(tmp_path / "whole", *overrides)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_same(*(checkpoint.load(path / "checkpoints" / "last.pt") for path in (killed, whole)))
    assert status(killed)["stopped"] == status(whole)["stopped"]
    assert best_step(killed) == best_step(whole) == 10


def test_a_stopped_run_goes_on_when_more_is_asked_for_and_not_otherwise(tmp_path, script, train_tiny):
    train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.8")
    train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.75", "resume=force")
    assert status(tmp_path)["stopped"]["step"] == 10
    train_tiny(tmp_path, *FAMILIAR, "trainer.stop_accuracy=0.9", "resume=force")
    assert status(tmp_path)["stopped"] == {"on": "familiar", "accuracy": 0.95, "step": 15}
    assert best_step(tmp_path) == 15


def test_a_checkpoint_from_before_this_setting_is_taken(tiny_parts):
    parts = tiny_parts()
    model = parts.new_model()
    state = State(model, parts.new_optimizer(model.parameters(), lr=0.1), None)
    saved = state.state_dict([{"random": torch.get_rng_state(), "random_cuda": []}])
    del saved["stopped"]
    state.stopped = {"on": "validation", "accuracy": 1.0, "step": 3}
    state.restore(saved)
    assert state.stopped is None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["trainer.stop_on=familiar"],
            "trainer.stop_on: digits has no familiar test pictures beside its test",
        ),
        (
            ["dataset.validation=0"],
            "trainer.stop_accuracy: this run has no validation pictures to reach it on",
        ),
    ],
)
def test_pictures_that_are_not_there_are_refused_before_training(overrides, told, tmp_path, train_tiny):
    with pytest.raises(UserError, match=re.escape(told)):
        train_tiny(tmp_path, "trainer.stop_accuracy=0.5", *overrides)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("wrong", [0, -0.1, 1.01, 99])
def test_an_accuracy_is_a_share(wrong, tiny_parts):
    with pytest.raises(UserError, match=rf"trainer: stop_accuracy must be in \(0, 1\], got {wrong}"):
        tiny_parts(f"trainer.stop_accuracy={wrong}")


def test_an_accuracy_of_whole_pictures_is_reached_in_spite_of_rounding(tiny_parts):
    trainer: Trainer = tiny_parts("trainer.stop_accuracy=0.9922").trainer
    for count in (9922, 9921):
        shares = torch.tensor([count / 10_000]).float().item()
        assert (trainer.stop({"validation/accuracy": shares - 1e-8}, 1) is not None) is (count == 9922)
