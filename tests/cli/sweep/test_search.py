"""Test hyperparameter search with optuna."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from capsexp.training.run_dir import RunDir

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra [optuna] is not installed")


def search(home, *overrides):
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"CAPSEXP_OUTPUTS": "outputs", "COLUMNS": "250", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-m", "capsexp", "train", "-m", "hydra/sweeper=search", *overrides],
        cwd=home,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.slow
def test_a_failed_trial_does_not_end_a_search_and_the_same_command_makes_the_same_trials(
    tmp_path, tiny_overrides
):
    overrides = ["plugins=[failing_loss]", "loss._target_=failing_loss.Loss", "+loss.how=well,raise"]
    overrides += [
        "hydra.sweeper.n_trials=4",
        "hydra.launcher.n_jobs=2",
        "trainer.max_steps=4",
        *tiny_overrides,
    ]

    def jobs():
        (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
        return {path.parent.name: RunDir(path.parent).status() for path in folder.glob("*/status.json")}

    first = search(tmp_path, *overrides)
    trials = jobs()
    ends = [status["status"] for status in trials.values()]
    assert len(ends) == 4
    assert {*ends} == {"completed", "failed"}
    assert first.returncode == 1
    assert "Traceback" not in first.stderr
    again = search(tmp_path, *overrides)
    assert {*jobs()} == {*trials}
    assert again.stdout.count(": already finished") == ends.count("completed")
    assert len(re.findall(": failed: KeyError: 'a bug'; see ", again.stdout)) == ends.count("failed")


@pytest.mark.slow
def test_a_search_without_validation_is_refused(tmp_path, tiny_overrides):
    overrides = ["dataset.validation=0", "hydra.sweeper.n_trials=1", "trainer.max_steps=1", *tiny_overrides]
    done = search(tmp_path, *overrides)
    assert done.returncode == 2
    assert "A trial needs a validation accuracy: dataset.validation > 0" in done.stderr
    assert "Traceback" not in done.stderr
