"""Output that nobody reads, closed descriptors, and full disks."""

import os
import pty
import subprocess
import sys

import pytest

from capsexp.cli.streams import Guarded, Output

MODULE = (sys.executable, "-m", "capsexp")


def unread_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


def closed_terminal():
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize(
    ("make", "code", "unread"), [(unread_pipe, 0, 141), (closed_terminal, 0, 141), (full_disk, 1, 1)]
)
def test_what_cannot_be_written_is_dropped_and_the_exit_code_says_so(make, code, unread, capsys):
    descriptor = make()
    with Output(descriptor, "w") as output, Output(os.devnull, "w") as other:
        for _ in range(3):
            assert output.write(b"lost") == 4
        streams = Guarded(output, other)
        assert (streams.exit_code(0, unread=0), streams.exit_code(0, unread=141)) == (code, unread)
        assert streams.exit_code(2, unread=141) == 2
    lines = capsys.readouterr().err.splitlines()
    assert {*lines} <= {"capsexp: cannot write the output: No space left on device"}
    assert bool(lines) == (make is full_disk)


def test_what_can_be_written_is_written(tmp_path):
    with open(tmp_path / "out", "wb") as file, Output(os.dup(file.fileno()), "w") as output:
        assert output.write(b"text") == 4
    assert (tmp_path / "out").read_bytes() == b"text"


@pytest.mark.parametrize(
    ("closed", "code"),
    [("<&-", 0), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 1), ("| true", 141)],
)
def test_closed_descriptors_end_no_command(closed, code, tmp_path):
    (tmp_path / "file").touch()
    text = "import sys; from capsexp.cli import main; code = main(); taken = open('file').fileno() <= 2\n"
    text += "sys.exit(code or taken)"  # a file that is opened must not get the number of a closed descriptor
    shell = f"set -o pipefail; '{sys.executable}' -c \"{text}\" --help {closed}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code
    lost = "capsexp: cannot write the output: No space left on device\n"
    assert done.stderr == (lost if code == 1 else "")


def test_a_run_goes_on_to_its_end_when_nobody_reads_what_it_prints(tmp_path, tiny_overrides):
    write = unread_pipe()
    command = [*MODULE, "train", "run=run", *tiny_overrides, "trainer.max_steps=2"]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"completed"' in (tmp_path / "run" / "status.json").read_text()
