import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from capsexp.data import cache
from capsexp.data.cache import cached, file_fingerprint

ARRAY = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)


class Counted:
    """Returns the array and counts the calls."""

    def __init__(self, array=ARRAY):
        self.array, self.calls = array, 0

    def __call__(self):
        self.calls += 1
        return self.array


def read_cached(path, compute, *, key="a key", shape=ARRAY.shape):
    return cached(path, key=key, shape=shape, compute=compute)


def test_an_array_is_computed_once_and_then_read(tmp_path):
    compute = Counted()
    first, again = (read_cached(tmp_path / "cached", compute) for _ in range(2))
    assert compute.calls == 1
    assert (first == ARRAY).all()
    assert (again == ARRAY).all()
    assert again.flags.writeable
    assert os.listdir(tmp_path) == ["cached"]


def truncated(content):
    return content[:-1]


def longer(content):
    return content + b"\0"


def flipped_in_the_array(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def flipped_in_the_header(content):
    return bytes([content[0] ^ 1]) + content[1:]


def empty(content):
    return b""


def without_a_newline(content):
    return content.replace(b"\n", b" ")


@pytest.mark.parametrize(
    "damage", [truncated, longer, flipped_in_the_array, flipped_in_the_header, empty, without_a_newline]
)
def test_a_damaged_file_is_replaced(tmp_path, damage):
    path = tmp_path / "cached"
    read_cached(path, Counted())
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    compute = Counted()
    assert (read_cached(path, compute) == ARRAY).all()
    assert compute.calls == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize("changes", [{"key": "another key"}, {"shape": (4, 3, 5)}, {"shape": (3, 4, 4)}])
def test_a_file_with_another_key_or_shape_is_not_used(tmp_path, changes):
    path = tmp_path / "cached"
    read_cached(path, Counted())
    other = np.zeros(changes.get("shape", ARRAY.shape), np.uint8)
    compute = Counted(other)
    assert (read_cached(path, compute, **changes) == other).all()
    assert compute.calls == 1


def test_an_array_is_computed_every_time_if_the_file_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path, write):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache, "write_atomic", refuse)
    compute = Counted()
    for _ in range(2):
        assert (read_cached(tmp_path / "cached", compute) == ARRAY).all()
    assert compute.calls == 2
    assert os.listdir(tmp_path) == []


def test_an_error_in_the_computation_is_raised(tmp_path):
    def broken():
        raise OSError("the source cannot be read")

    with pytest.raises(OSError, match="the source cannot be read"):
        read_cached(tmp_path / "cached", broken)


def test_concurrent_processes_leave_one_complete_file(tmp_path):
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
    path = tmp_path / "cached"
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) for _ in range(4)
    ]
    assert [process.communicate()[0].strip() for process in started] == [b"3500000"] * 4
    assert os.listdir(tmp_path) == ["cached"]
    compute = Counted()
    assert (read_cached(path, compute, key="key", shape=(50, 100, 100)) == 7).all()
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
def test_the_fingerprint_changes_with_the_file(tmp_path, change):
    path = tmp_path / "source"
    path.write_bytes(b"a" * 1_000_000)
    before = file_fingerprint(path)
    assert file_fingerprint(path) == before
    change(path)
    assert file_fingerprint(path) != before
