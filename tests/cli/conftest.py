"""A trained run, made by commands in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

MODULE = (sys.executable, "-m", "capsexp")


def run_command(
    *arguments: object, cwd: Path, start: Sequence[str] = MODULE, **variables: str
) -> subprocess.CompletedProcess[str]:
    folders = {"CAPSEXP_OUTPUTS": str(cwd / "outputs"), "CAPSEXP_DATA": str(cwd / "data"), "COLUMNS": "200"}
    return subprocess.run(
        [*start, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **folders, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def script() -> tuple[str, ...]:
    """The console script."""
    return (str(Path(sys.executable).with_name("capsexp")),)


@pytest.fixture(scope="session")
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in a process of its own: `shell("train", cwd=FOLDER, start=script, VARIABLE="x")`."""
    return run_command


@pytest.fixture
def no_runs(tmp_path):
    """Check that the test leaves no run behind."""
    yield
    assert not (tmp_path / "outputs").exists()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder to work in."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home, script):
    """`capsexp train trainer=smoke run=run seed=3`, as a process that has ended."""
    return run_command("train", "trainer=smoke", "run=run", "seed=3", start=script, cwd=home)


@pytest.fixture
def at_home(trained, home, monkeypatch):
    """Work where the trained run is."""
    monkeypatch.chdir(home)
    return home
