"""A file cache for arrays of bytes that are slow to compute, verified by key and checksum."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from capsexp.files import write_atomic

Bytes = NDArray[np.uint8]

SAMPLES, SAMPLE_SIZE = 64, 4096
LONGEST_HEADER = 1024


def cached(path: Path, *, key: str, shape: tuple[int, ...], compute: Callable[[], Bytes]) -> Bytes:
    """Read an array from a cache file, or compute it and write the file.

    Processes that start together may all compute the array; each writes the same file atomically. Where the
    file cannot be written, the array is computed every time. The file may be deleted at any time.

    Args:
        path: the file, in a folder that exists.
        key: everything that the array depends on, in one line; a file with another key is not used.
        shape: of the array.
        compute: returns the array.
    """
    stored = _read(path, key, shape)
    if stored is not None:
        return stored
    array = np.ascontiguousarray(compute())
    with contextlib.suppress(OSError):
        write_atomic(path, lambda file: _write(file, key, array))
    return array


def file_fingerprint(path: Path) -> str:
    """Return a hash that detects a changed or replaced file without reading all of it.

    It covers size, modification time and samples from the whole file. Size and time alone would miss a
    replacement that preserves the time.
    """
    stat = path.stat()
    return _sampled(path, stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}")


def content_fingerprint(path: Path) -> str:
    """Return a hash of size and samples of a file: the same for a copy, and quick for a huge file."""
    size = path.stat().st_size
    return f"sampled:{_sampled(path, size, str(size))}"


def _sampled(path: Path, size: int, start: str) -> str:
    digest = hashlib.sha256(start.encode())
    with path.open("rb") as file:
        for sample in range(SAMPLES):
            file.seek(size * sample // SAMPLES)
            digest.update(file.read(SAMPLE_SIZE))
    return digest.hexdigest()


def _read(path: Path, key: str, shape: tuple[int, ...]) -> Bytes | None:
    try:
        with path.open("rb") as file:
            header = file.readline(LONGEST_HEADER)
            array = np.empty(shape, np.uint8)
            whole = file.readinto(array.data) == array.nbytes and not file.read(1)
    except OSError:
        return None
    return array if whole and header == _header(key, array) else None


def _write(file: IO[bytes], key: str, array: Bytes) -> None:
    file.write(_header(key, array))
    file.write(array.data)


def _header(key: str, array: Bytes) -> bytes:
    """Return the file's first line: the key, the array's shape and the checksum of its bytes."""
    return f"{key} {array.shape} {hashlib.sha256(array.data).hexdigest()}\n".encode()
