import os
import subprocess
import sys

import pytest

from capsexp.errors import UserError
from capsexp.locks import is_locked, locked

HOLDER = """
import sys, time
from pathlib import Path
from capsexp.locks import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1]).with_name("slept").touch()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "a.lock"


@pytest.fixture
def hold(path):
    """`hold(SECONDS)`: another process that holds the lock."""
    processes = []

    def start(seconds):
        command = [sys.executable, "-c", HOLDER, str(path), str(seconds)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "locked\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_lock_is_held_until_the_block_ends(path):
    assert not is_locked(path)
    with locked(path):
        assert is_locked(path)
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert not is_locked(path)


def test_a_held_lock_is_refused_with_the_name_of_its_owner(path, hold):
    owner = hold(60)
    refusal = rf"^busy: process {owner.pid} on .+$"
    with pytest.raises(UserError, match=refusal), locked(path, refusal="busy: {}".format):
        raise AssertionError("two owners")
    owner.kill()
    owner.wait()
    with locked(path):
        pass


def test_a_held_lock_can_be_waited_for(path, hold):
    hold(0.5)
    with locked(path, wait=True):
        assert path.with_name("slept").exists()
