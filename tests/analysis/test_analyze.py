"""`capsexp analyze` from the command line, and the files it writes into the run directory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from capsexp.analysis.trained_run import TrainedRun
from capsexp.cli import entry as cli
from capsexp.errors import UserError

OF_OTHER_DATA = {"viewpoints"}  # tested with a synthetic dataset
FILES = (Path(__file__).parents[2] / "conf" / "study").glob("*.yaml")
STUDIES = sorted({path.stem for path in FILES} - OF_OTHER_DATA)

NEEDS = {"overlap": ("dataset=multimnist", "dataset@dataset.source=digits", "trainer.max_epochs=1")}
"""Overrides for the training of the run, for studies that need another run than the default one."""


def capsexp(*arguments, cwd):
    command = [sys.executable, "-m", "capsexp", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture
def analyze(monkeypatch, capsys):
    """Run the command in this process, which is faster than starting a new one."""

    def call(*arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["capsexp", "analyze", *arguments])
        return subprocess.CompletedProcess(arguments, cli.main(), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the run of a small network that is trained for six epochs."""
    folder = tmp_path_factory.mktemp("home")
    done = capsexp("train", "run=run", "device=cpu", "trainer.max_epochs=6", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_study_writes_figures_numbers_and_tensorboard_events(study, home, tmp_path, analyze):
    if study in NEEDS:
        home = tmp_path
        done = capsexp("train", "run=run", "device=cpu", *NEEDS[study], cwd=home)
        assert done.returncode == 0, done.stderr
    done = analyze(f"study={study}", "run=run", "limit=50", cwd=home)
    assert (done.returncode, done.stderr) == (0, "")
    numbers = json.loads((home / "run" / "studies" / f"{study}.json").read_text())
    assert numbers["limit"] == 50
    assert numbers["step"] > 0
    assert numbers["study"]["_target_"].startswith(f"capsexp.study.{study}.")
    figures = [Path(line) for line in done.stdout.splitlines() if line.endswith(".png")]
    assert figures
    for figure in figures:
        with Image.open(home / figure) as image:
            assert min(image.size) > 100
    events = EventAccumulator(str(home / "run" / "tb"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {f"{study}/{figure.stem}" for figure in figures} <= {*tags["images"]}
    assert "train/loss" in tags["scalars"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["study=perturbation"], "study=perturbation: no such option: did you mean 'perturbations'?"),
        (
            ["study=perturbations", "study.step=0"],
            "study: step must be > 0 and <= reach, got step 0 ",
        ),
        (["study=perturbations", "limit=0"], "limit: must be an integer >= 1 or null, got 0"),
        (["study=perturbations", "study.reach=far"], "study.reach: must be "),
        (["study=viewpoints"], "study=viewpoints is for runs on smallnorb, whose views are known; run is "),
    ],
)
def test_wrong_use_is_one_line(arguments, line, home, analyze):
    done = analyze("run=run", *arguments, cwd=home)
    assert done.returncode == 2
    (printed,) = done.stderr.splitlines()
    assert printed.startswith(f"capsexp: {line}")


def test_a_study_has_to_be_chosen(home, analyze):
    done = analyze("run=run", cwd=home)
    assert done.returncode == 2
    assert "study=" in done.stderr
    assert "reconstructions" in done.stderr


def test_another_run_has_its_own_network_and_the_same_limit(tmp_path, train_tiny, tiny_components):
    overrides = ["trainer.max_epochs=1"]
    train_tiny(tmp_path / "a", *overrides)
    train_tiny(tmp_path / "b", *overrides, "seed=1", "model.conv_channels=4")
    (tmp_path / "b" / ".hydra").mkdir()
    shutil.copy(tmp_path / "b" / "resolved_config.yaml", tmp_path / "b" / ".hydra" / "config.yaml")
    run = TrainedRun.restore(tiny_components(*overrides), tmp_path / "a", weights="best", limit=7)
    other = run.other_run(str(tmp_path / "b"))
    assert other.model.conv.out_channels == 4
    assert other.limit == 7
    assert sum(len(batch.labels) for batch, _ in other.outputs()) == 7
    with pytest.raises(UserError, match=r"none is not a run directory"):
        other.other_run(str(tmp_path / "none"))
