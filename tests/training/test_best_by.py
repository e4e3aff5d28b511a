"""Which validation round is the best one, and training that ends without a better one; scripted metrics."""

import json

import pytest

from capsexp.errors import UserError
from capsexp.training import checkpoint, train

SCRIPT = {  # by step, of 5 steps an epoch: accuracy, macro F1, loss
    5: (0.5, 0.4, 1.0),
    10: (0.7, 0.5, 0.9),
    15: (0.7, 0.6, 0.7),
    20: (0.6, 0.6, 0.8),
    25: (0.6, 0.3, 0.6),
    30: (0.6, 0.3, 0.9),
}
LONG = ("trainer.max_epochs=6", "trainer.limit_train_batches=5", "trainer.test=best")


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """Replace the metrics of validation by those of SCRIPT."""
    real = train.evaluate

    def evaluate(model, batches, loss, step, **options):
        metrics = real(model, batches, loss, step, **options)
        names = ("accuracy", "macro_f1", "loss")
        scripted = dict(zip(names, SCRIPT[step.number], strict=True)) if batches.count == 144 else {}
        return metrics | scripted

    monkeypatch.setattr(train, "evaluate", evaluate)


def best_step(path):
    return checkpoint.step_of(path / "checkpoints" / "best.pt")


def status(path):
    return json.loads((path / "status.json").read_text())


@pytest.mark.parametrize(
    ("best_by", "step"),
    [("null", 10), ("accuracy", 15), ("macro_f1", 15), ("loss", 25)],  # the loss decides between equal ones
)
def test_the_best_round_is_that_of_the_metric(tmp_path, train_tiny, best_by, step):
    train_tiny(tmp_path, *LONG, f"trainer.best_by={best_by}")
    assert best_step(tmp_path) == step
    assert status(tmp_path)["best"] == {"accuracy": SCRIPT[step][0], "step": step}


@pytest.mark.parametrize(
    ("best_by", "patience", "end"),
    [("null", 1, 15), ("null", 2, 20), ("accuracy", 2, 25), ("loss", 1, 20), ("loss", 2, 30)],
)
def test_training_ends_after_its_patience(tmp_path, train_tiny, capsys, best_by, patience, end):
    train_tiny(tmp_path, *LONG, f"trainer.best_by={best_by}", f"trainer.patience={patience}")
    ended = status(tmp_path)
    assert (ended["status"], ended["step"]) == ("completed", end)
    out = capsys.readouterr().out
    assert ("no validation round is better" in out) == (end < 30)


def test_patience_outlives_a_resume(tmp_path, train_tiny, monkeypatch):
    train_tiny(tmp_path / "whole", *LONG, "trainer.patience=2")
    settings = (*LONG, "trainer.patience=2")

    real = train.Training._save

    def stop_after_an_epoch(training):
        real(training)
        if training.state.step == 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "_save", stop_after_an_epoch)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path / "cut", *settings)
    train_tiny(tmp_path / "cut", *settings)
    whole, cut = (
        checkpoint.load(path / "checkpoints" / "best.pt") for path in (tmp_path / "whole", tmp_path / "cut")
    )
    assert status(tmp_path / "cut")["step"] == status(tmp_path / "whole")["step"] == 20
    assert cut["best_rank"] == whole["best_rank"] == [0.7]
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("setting", ["patience=1", "best_by=loss"])
def test_both_need_validation_images(tmp_path, train_tiny, setting):
    message = rf"trainer.{setting.split('=')[0]}: this run has no validation images"
    with pytest.raises(UserError, match=message):
        train_tiny(tmp_path, f"trainer.{setting}", "dataset.validation=0")


@pytest.mark.parametrize("patience", [0, -1])
def test_a_patience_below_1_is_refused(patience, tiny_components):
    with pytest.raises(UserError, match="patience must be >= 1"):
        tiny_components(f"trainer.patience={patience}")


def test_an_unknown_metric_is_refused(tiny_components):
    with pytest.raises(UserError, match="best_by"):
        tiny_components("trainer.best_by=f2")
