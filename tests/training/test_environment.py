import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from capsexp.training import environment as module
from capsexp.training.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def environment(run):
    run.path.mkdir(exist_ok=True)
    run.write_environment("cpu (2 threads)")
    return json.loads((run.path / "env.json").read_text())


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Replace the folder of the code by a git checkout."""
    folder = tmp_path / "code"
    (folder / "capsexp").mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(folder / "capsexp" / "training" / "environment.py"))

    def git(*arguments):
        name = ["-c", "user.name=x", "-c", "user.email=x@example.invalid", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", folder, *name, *arguments], check=True, capture_output=True)

    git("init")
    (folder / "a.py").write_text("one\n")
    git("add", "a.py")
    git("commit", "-m", "a")
    return folder


def test_the_environment_has_versions_machine_and_owner(run):
    env = environment(run)
    assert set(env["versions"]) == set(module.PACKAGES)
    assert (env["pid"], env["device"], env["cores"]) == (os.getpid(), "cpu (2 threads)", os.cpu_count())
    assert env["cpu"]


@pytest.mark.parametrize(
    ("content", "model"),
    [("processor\t: 0\nmodel name\t: A Processor\n", "A Processor"), ("Features\t: neon\n", "an arm")],
)
def test_the_model_of_the_processor_is_kept(monkeypatch, content, model):
    monkeypatch.setattr(Path, "read_text", lambda path: content)
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(module.platform, "machine", lambda: "an arm")
    assert module._processor() == model


def test_outside_a_checkout_there_is_no_commit_and_no_patch(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "__file__", str(tmp_path / "site-packages" / "capsexp" / "training" / "environment.py")
    )
    assert (environment(run)["commit"], environment(run)["dirty"]) == (None, False)
    assert not (run.path / "dirty.patch").exists()


def test_without_git_there_is_no_commit_and_no_patch(run, checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(Path("nowhere")))
    assert environment(run)["commit"] is None
    assert not (run.path / "dirty.patch").exists()


def test_a_clean_checkout_has_a_commit_and_no_patch(run, checkout):
    env = environment(run)
    assert re.fullmatch("[0-9a-f]{40}", env["commit"])
    assert env["dirty"] is False
    assert not (run.path / "dirty.patch").exists()


def test_uncommitted_changes_are_written_as_a_patch(run, checkout):
    (checkout / "a.py").write_text("two\n")
    assert environment(run)["dirty"] is True
    assert "-one\n+two\n" in (run.path / "dirty.patch").read_text()
