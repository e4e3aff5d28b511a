"""A trained subject, small enough to be made for each file of tests."""

import pytest

from capsexp.analysis.trained_run import TrainedRun, load_model


@pytest.fixture
def subject(tmp_path, train_tiny, tiny_parts):
    """`subject(*OVERRIDES, limit=…)`: a network after two epochs on embedded digits."""

    def make(*overrides, limit=None):
        words = [
            "trainer.max_epochs=2",
            "trainer.limit_train_batches=40",
            "trainer.batch_size=32",
            *overrides,
        ]
        train_tiny(tmp_path / "run", *words)
        parts = tiny_parts(*words)
        path = tmp_path / "run"
        model, step = load_model(parts, path, weights="best")
        return TrainedRun(model, parts, path=path, step=step, limit=limit)

    return make
