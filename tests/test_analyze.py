"""`capsexp analyze` from the command line, and what it leaves in the run's directory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STUDIES = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "study").glob("*.yaml"))


def capsexp(*words, cwd):
    command = [sys.executable, "-m", "capsexp", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the run of a small network that has learnt something."""
    folder = tmp_path_factory.mktemp("home")
    done = capsexp("train", "run=run", "device=cpu", "trainer.max_epochs=6", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_study_leaves_figures_numbers_and_its_page_in_tensorboard(study, home):
    done = capsexp("analyze", f"study={study}", "run=run", "limit=200", cwd=home)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads((home / "run" / "studies" / f"{study}.json").read_text())
    assert told["limit"] == 200
    assert told["step"] > 0
    assert told["study"]["_target_"].startswith(f"capsexp.study.{study}.")
    figures = [Path(line) for line in done.stdout.splitlines() if line.endswith(".png")]
    assert figures
    for figure in figures:
        with Image.open(home / figure) as picture:
            assert min(picture.size) > 100
    events = EventAccumulator(str(home / "run" / "tb"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {f"{study}/{figure.stem}" for figure in figures} <= {*tags["images"]}
    assert "train/loss" in tags["scalars"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["study=perturbation"], "study=perturbation: no such option: did you mean 'perturbations'?"),
        (
            ["study=perturbations", "study.step=0"],
            "study: step must be > 0 and <= reach, got step 0 ",
        ),
        (["study=perturbations", "limit=0"], "limit: must be an integer >= 1 or null, got 0"),
        (["study=perturbations", "study.reach=far"], "study.reach: must be "),
    ],
)
def test_wrong_use_is_one_line(words, line, home):
    done = capsexp("analyze", "run=run", *words, cwd=home)
    assert done.returncode == 2
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"capsexp: {line}")


def test_a_study_has_to_be_chosen(home):
    done = capsexp("analyze", "run=run", cwd=home)
    assert done.returncode == 2
    assert "study=" in done.stderr
    assert "reconstructions" in done.stderr
