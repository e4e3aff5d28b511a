"""Processes that the tests' server forks are like those that Python starts."""

import os
import signal
import subprocess
import sys

import fork_server
import pytest

from capsexp.child import python_command

# The working folder is the first in which `python -m` looks for capsexp.
MAIN = """
import os, signal, sys
print(os.getcwd(), sys.argv[1:], os.environ["GIVEN"], os.environ.get("HOME"), sys.path[:2])
print(sys.stdout.encoding, os.getsid(0) == os.getpid(), os.listdir("/dev/fd"), __name__)
print(os.read(0, 100), *[str(signal.getsignal(number))[:27] for number in (signal.SIGCHLD, signal.SIGINT)],
      file=sys.stderr, flush=True)
os.kill(os.getpid(), int(os.environ.get("SIGNAL", "0")))
sys.exit(7)
"""


@pytest.fixture
def start(tmp_path):
    """Start `python -m capsexp` with another program for capsexp, in a process that is `forked` or not."""
    (tmp_path / "capsexp").mkdir()
    (tmp_path / "capsexp" / "__init__.py").touch()
    (tmp_path / "capsexp" / "__main__.py").write_text(MAIN)

    def call(*, forked, **options):
        variables = options.pop("variables", {}) | ({} if forked else {fork_server.NO_FORK: "1"})
        environment = {name: value for name, value in os.environ.items() if name != "HOME"}
        process = subprocess.Popen(
            [sys.executable, "-m", "capsexp", "run", "a=b"],
            cwd=tmp_path,
            env=environment | {"GIVEN": "é"} | variables,
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
            **options,
        )
        assert (process._connection is not None) == forked
        output = process.communicate(b"typed")
        return process.returncode, *output

    return call


@pytest.mark.parametrize("new_session", [False, True])
def test_a_forked_process_has_its_own_folder_environment_files_and_session(new_session, start, tmp_path):
    code, output, errors = start(forked=True, start_new_session=new_session)
    assert code == 7
    assert f"{tmp_path} ['run', 'a=b'] é None ['{tmp_path}', " in output.decode()
    assert f" {new_session} ['0', '1', '2', " in output.decode()
    assert errors.startswith(b"b'typed' 0 <built-in function default_")
    if not new_session:
        assert (code, output, errors) == start(forked=False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_ends_a_forked_process(number, start):
    assert start(forked=True, variables={"SIGNAL": str(int(number))})[0] == -number


def test_jobs_of_a_sweep_are_forked(tmp_path):
    code = "from capsexp.cli import main; print(__name__, sys.argv, flush=True); sys.exit(main())"
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    command = [*python_command(code), "--version"]
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        assert process._connection is not None
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert output.startswith(b"__main__ ['-c', '--version']\ncapsexp ")


def test_another_start_of_the_interpreter_is_no_fork(start):
    code, output, _ = start(forked=False, variables={"PYTHONIOENCODING": "latin-1"})
    assert code == 7
    assert b" \xe9 " in output
