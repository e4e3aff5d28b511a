"""Test sweeps with the launchers for clusters, in their single-machine modes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capsexp.training.run_dir import RunDir


@pytest.fixture
def sweep(tmp_path):
    """`sweep(*ARGUMENTS)` starts `capsexp train` as a process, with its output in a file."""
    started = []

    def start(*arguments):
        with open(tmp_path / "output", "w") as output:
            command = [sys.executable, "-m", "capsexp", "train", *arguments, "hydra.sweep.dir=sweep"]
            paths = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
            variables = {"COLUMNS": "250", "PYTHONPATH": paths, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
            started.append(
                subprocess.Popen(
                    command, cwd=tmp_path, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT
                )
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def runs(folder):
    return sorted(
        (RunDir(path.parent) for path in folder.glob("sweep/*/status.json")), key=lambda run: run.path
    )


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_resumes_bit_for_bit(sweep, tmp_path, tiny_overrides):
    pytest.importorskip("submitit", reason="the extra [slurm] is not installed")
    # The job gets the signal of a preemption from itself, at a step of its own: the test waits for no moment.
    loss = ["plugins=[failing_loss]", "loss._target_=failing_loss.Loss", "+loss.how=preempted"]
    overrides = [*tiny_overrides, *loss, "trainer.save_every=100000", "trainer.max_epochs=2"]
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "seed=0"]
    assert sweep("-m", *launcher, *overrides).wait(600) == 0, (tmp_path / "output").read_text()
    assert sweep(*overrides, "run=whole").wait(600) == 0, (tmp_path / "output").read_text()
    (run,) = runs(tmp_path)
    assert (run.path / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    last = run.status()
    assert last["status"] == "completed"
    assert last["pid"] != int((tmp_path / "fixed").read_text())
    (resume,) = last["resumes"]
    assert resume["step"] > 0


@pytest.mark.slow
def test_jobs_run_under_ray(sweep, tmp_path, tiny_overrides):
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    arguments = ["hydra/launcher=ray", "seed=0,1", *tiny_overrides, "trainer.max_steps=2"]
    assert sweep("-m", *arguments).wait(500) == 0, (tmp_path / "output").read_text()
    assert [run.status()["status"] for run in runs(tmp_path)] == ["completed"] * 2
