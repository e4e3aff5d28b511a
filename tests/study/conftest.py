"""A small trained run, one for each test."""

import pytest

from capsexp.analysis.trained_run import TrainedRun


@pytest.fixture
def trained_run(tmp_path, train_tiny, tiny_components):
    """`trained_run(*OVERRIDES, limit=…)`: a run after two epochs on embedded digits."""

    def train(*overrides, limit=None):
        settings = [
            "trainer.max_epochs=2",
            "trainer.limit_train_batches=40",
            "trainer.batch_size=32",
            *overrides,
        ]
        train_tiny(tmp_path / "run", *settings)
        return TrainedRun.restore(tiny_components(*settings), tmp_path / "run", weights="best", limit=limit)

    return train
