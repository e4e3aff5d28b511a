"""The files that a run writes."""

import json

import pytest
import torch

from capsexp.training import checkpoint

STEPS = 15  # of a whole tiny run


def test_the_record_has_every_metric_and_no_time(tmp_path, train_tiny, metrics_of):
    results = train_tiny(tmp_path)
    lines = metrics_of(tmp_path)
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    names = {"loss", "margin", "reconstruction", "accuracy", "gradient_norm", "coupling_entropy/class_caps"}
    assert {f"train/{name}" for name in names} <= steps[0].keys()
    assert {"schedule/learning_rate", "schedule/reconstruction_weight"} <= steps[0].keys()
    assert steps[0]["train/loss"] == pytest.approx(
        steps[0]["train/margin"] + steps[0]["train/reconstruction"]
    )
    assert sum("validation/accuracy" in line for line in lines) == 3
    assert lines[-1]["test/accuracy"] == results["test/accuracy"]
    assert not any("second" in key or "time" in key for line in lines for key in line)


def test_the_learning_rate_follows_its_schedule(tmp_path, train_tiny, metrics_of, tiny_components):
    train_tiny(tmp_path, "optimizer.lr.every=1")
    rates = [line["schedule/learning_rate"] for line in metrics_of(tmp_path) if "train/loss" in line]
    assert rates == pytest.approx([0.001 * 0.96**step for step in range(STEPS)])


def test_metrics_of_layers_are_logged_every_few_steps(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path, "trainer.max_epochs=1", "trainer.log_every=2")
    rows = [row for row in metrics_of(tmp_path) if "train/accuracy" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert 0 <= row["train/coupling_entropy/class_caps"] <= 1
        assert 0 <= row["train/active/primary_caps"] <= 1


def test_the_best_checkpoint_is_that_of_the_best_validation(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path, "trainer.max_epochs=4")
    validated = {
        line["step"]: line["validation/accuracy"]
        for line in metrics_of(tmp_path)
        if "validation/accuracy" in line
    }
    best = max(validated, key=lambda step: (validated[step], -step))
    assert checkpoint.step_of(tmp_path / "checkpoints" / "best.pt") == best


def test_without_validation_images_the_last_weights_are_the_best(tmp_path, train_tiny):
    train_tiny(tmp_path, "dataset.validation=0", "trainer.max_epochs=2")
    checkpoints = tmp_path / "checkpoints"
    assert (checkpoints / "best.pt").resolve() == (checkpoints / "last.pt").resolve()


def test_the_moving_average_is_what_is_loaded(tmp_path, train_tiny, tiny_components, final_state):
    from capsexp.analysis.trained_run import load_model

    train_tiny(tmp_path, "trainer.ema_decay=0.5", "trainer.test=last")
    saved = final_state(tmp_path)
    model, _ = load_model(tiny_components("trainer.ema_decay=0.5"), tmp_path, weights="last")
    weight = model.state_dict()["conv.weight"]
    assert torch.equal(weight, saved["average"]["module.conv.weight"])
    assert not torch.equal(weight, saved["model"]["conv.weight"])


@pytest.mark.parametrize("overrides", [(), ("trainer.ema_decay=0.5",)], ids=["weights", "average"])
def test_reconstructions_are_those_of_the_evaluated_network(overrides, tmp_path, train_tiny, monkeypatch):
    from capsexp.training import train

    evaluated, shown = [], []
    evaluate, log_reconstructions = train.evaluate, train.log_reconstructions

    def spy_evaluate(model, *arguments, **options):
        evaluated.append(model)
        return evaluate(model, *arguments, **options)

    def spy_reconstructions(record, model, *arguments):
        shown.append(model)
        log_reconstructions(record, model, *arguments)

    monkeypatch.setattr(train, "evaluate", spy_evaluate)
    monkeypatch.setattr(train, "log_reconstructions", spy_reconstructions)
    train_tiny(tmp_path, *overrides)
    assert {id(model) for model in shown} == {id(model) for model in evaluated}
    assert len({id(model) for model in shown}) == 1


def test_a_profile_lists_the_operations_of_the_steps(tmp_path, train_tiny):
    train_tiny(tmp_path, "trainer.profile=true", "trainer.max_epochs=2")
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
