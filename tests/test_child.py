"""Python processes of our own do not import what lies in the working directory."""

import os
import subprocess
import sys

import pytest

from capsexp.child import protect_children, python_command


@pytest.fixture
def shadowed(tmp_path, monkeypatch):
    """Work in a folder with a file that would replace a module of Python."""
    (tmp_path / "secrets.py").write_text("raise SystemExit('imported from the working directory')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_code_in_a_new_process_imports_from_where_this_process_does(shadowed, tmp_path_factory, monkeypatch):
    own = tmp_path_factory.mktemp("own")
    (own / "my_plugin.py").write_text("NAME = 'mine'\n")
    monkeypatch.syspath_prepend(own)
    done = run([*python_command("import secrets, my_plugin; print(my_plugin.NAME, sys.argv[1])"), "given"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine given\n", "")


@pytest.mark.parametrize("entry", ["", "."])
def test_a_chosen_working_directory_counts_everywhere(entry, shadowed, monkeypatch):
    monkeypatch.syspath_prepend(entry)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert run(python_command("import secrets")).returncode == 1
    protect_children()
    assert "PYTHONSAFEPATH" not in os.environ


def test_processes_of_others_are_protected(shadowed, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".", str(shadowed))])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.delenv("PYTHONSAFEPATH")
    command = [sys.executable, "-m", "base64", "-h"]  # any module that imports others
    (shadowed / "getopt.py").write_text("raise SystemExit('imported from the working directory')\n")
    assert "working directory" in run(command).stderr
    protect_children()
    assert "working directory" not in run(command).stderr


def test_a_working_directory_that_was_deleted_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    protect_children()
