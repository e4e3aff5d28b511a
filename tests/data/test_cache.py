import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from capsexp.data import cache
from capsexp.data.cache import cached, fingerprint

ARRAY = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)


class Counted:
    """Makes the array, and counts how often."""

    def __init__(self, array=ARRAY):
        self.array, self.calls = array, 0

    def __call__(self):
        self.calls += 1
        return self.array


def kept(path, compute, *, key="a key", shape=ARRAY.shape):
    return cached(path, key=key, shape=shape, compute=compute)


def test_it_is_computed_once_and_then_read(tmp_path):
    compute = Counted()
    first, again = (kept(tmp_path / "kept", compute) for _ in range(2))
    assert compute.calls == 1
    assert (first == ARRAY).all()
    assert (again == ARRAY).all()
    assert again.flags.writeable
    assert os.listdir(tmp_path) == ["kept"]


def truncated(content):
    return content[:-1]


def longer(content):
    return content + b"\0"


def flipped_in_the_array(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def flipped_in_the_title(content):
    return bytes([content[0] ^ 1]) + content[1:]


def empty(content):
    return b""


def without_a_line(content):
    return content.replace(b"\n", b" ")


@pytest.mark.parametrize(
    "damage", [truncated, longer, flipped_in_the_array, flipped_in_the_title, empty, without_a_line]
)
def test_a_damaged_file_is_not_used_and_replaced(tmp_path, damage):
    path = tmp_path / "kept"
    kept(path, Counted())
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    compute = Counted()
    assert (kept(path, compute) == ARRAY).all()
    assert compute.calls == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize("changes", [{"key": "another key"}, {"shape": (4, 3, 5)}, {"shape": (3, 4, 4)}])
def test_a_file_that_was_made_for_something_else_is_not_used(tmp_path, changes):
    path = tmp_path / "kept"
    kept(path, Counted())
    other = np.zeros(changes.get("shape", ARRAY.shape), np.uint8)
    compute = Counted(other)
    assert (kept(path, compute, **changes) == other).all()
    assert compute.calls == 1


def test_where_nothing_can_be_written_it_is_computed_every_time(tmp_path, monkeypatch):
    def refuse(path, write):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache, "write_atomic", refuse)
    compute = Counted()
    for _ in range(2):
        assert (kept(tmp_path / "kept", compute) == ARRAY).all()
    assert compute.calls == 2
    assert os.listdir(tmp_path) == []


def test_a_mistake_in_the_computation_is_not_hidden(tmp_path):
    def broken():
        raise OSError("the source cannot be read")

    with pytest.raises(OSError, match="the source cannot be read"):
        kept(tmp_path / "kept", broken)


def test_processes_that_start_together_leave_one_whole_file(tmp_path):
    program = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        import numpy as np
        from capsexp.data.cache import cached

        def compute():
            time.sleep(0.2)
            return np.full((50, 100, 100), 7, np.uint8)

        print(cached(Path(sys.argv[1]), key="key", shape=(50, 100, 100), compute=compute).sum())
        """
    )
    path = tmp_path / "kept"
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) for _ in range(4)
    ]
    assert [process.communicate()[0].strip() for process in started] == [b"3500000"] * 4
    assert os.listdir(tmp_path) == ["kept"]
    compute = Counted()
    assert (kept(path, compute, key="key", shape=(50, 100, 100)) == 7).all()
    assert compute.calls == 0


def changed_to_the_same_size_and_time(path):
    stat = path.stat()
    path.write_bytes(b"b" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def changed_in_time_alone(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def changed_in_size_alone(path):
    stat = path.stat()
    os.truncate(path, stat.st_size + 1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "change", [changed_to_the_same_size_and_time, changed_in_time_alone, changed_in_size_alone]
)
def test_a_fingerprint_tells_a_file_from_what_it_was(tmp_path, change):
    path = tmp_path / "source"
    path.write_bytes(b"a" * 1_000_000)
    before = fingerprint(path)
    assert fingerprint(path) == before
    change(path)
    assert fingerprint(path) != before
