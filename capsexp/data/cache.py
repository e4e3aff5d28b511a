"""Bytes that take a while to compute, kept in a file that is used only if it is whole and still fits."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capsexp.files import write_atomic

Bytes = NDArray[np.uint8]

SAMPLES, SAMPLE_SIZE = 64, 4096
LONGEST_TITLE = 1024


def cached(path: Path, *, key: str, shape: tuple[int, ...], compute: Callable[[], Bytes]) -> Bytes:
    """An array of bytes out of a file, or else computed and kept there for the next time.

    ProcessGroup that start together may all compute it; each puts the same file in place, whole. Where no
    file can be written it is computed every time. The file may be deleted at any time.

    Args:
        path: the file, in a folder that exists.
        key: all that the array depends on, in one line; a file with another key is not used.
        shape: of the array.
        compute: makes the array.
    """
    found = _kept(path, key, shape)
    if found is not None:
        return found
    array = np.ascontiguousarray(compute())
    with contextlib.suppress(OSError):
        write_atomic(path, lambda file: _write(file, key, array))
    return array


def fingerprint(path: Path) -> str:
    """Tells a file from another in its place, or from itself before a change, without reading all of it.

    Size, time of the last change and samples from all over it. Size and time alone would take a copy that
    kept its time for the file that it replaced.
    """
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for sample in range(SAMPLES):
            file.seek(stat.st_size * sample // SAMPLES)
            digest.update(file.read(SAMPLE_SIZE))
    return digest.hexdigest()


def _kept(path: Path, key: str, shape: tuple[int, ...]) -> Bytes | None:
    try:
        with path.open("rb") as file:
            title = file.readline(LONGEST_TITLE)
            array = np.empty(shape, np.uint8)
            whole = file.readinto(array.data) == array.nbytes and not file.read(1)
    except OSError:
        return None
    return array if whole and title == _title(key, array) else None


def _write(file: Any, key: str, array: Bytes) -> None:
    file.write(_title(key, array))
    file.write(array.data)


def _title(key: str, array: Bytes) -> bytes:
    """The file's first line: what the bytes after it were made from, and their checksum."""
    return f"{key} {array.shape} {hashlib.sha256(array.data).hexdigest()}\n".encode()
