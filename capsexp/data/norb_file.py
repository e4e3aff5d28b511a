"""The file format of the NORB data sets: a magic number, the dimensions, then the numbers; all little endian.

It is described at https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capsexp.errors import DataError

MAGIC = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}
LEAST_DIMENSIONS = 3
"""The header has room for at least so many; those that an array has not are 1."""


def open_norb(path: Path, *, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The numbers of an unpacked file, read from the disk when they are looked at.

    Args:
        path: the file.
        dtype: `uint8` or `int32`.
        shape: what the file must hold.

    Raises:
        DataError: a field of the header or the size of the file is another; it cannot be read.
    """
    fields = list(_header(dtype, shape))
    offset = 4 * len(fields)
    try:
        with path.open("rb") as file:
            header = file.read(offset)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    found = np.frombuffer(header[: len(header) // 4 * 4], "<u4").tolist()
    for (name, expected), got in zip(fields, found, strict=False):
        if got != expected:
            raise DataError(f"{path}: {name} must be {_shown(name, expected)}, got {_shown(name, got)}")
    little_endian = np.dtype(dtype).newbyteorder("<")
    expected_size = offset + little_endian.itemsize * int(np.prod(shape))
    if size != expected_size:
        raise DataError(f"{path}: must have {expected_size} bytes, got {size}")
    return np.memmap(path, little_endian, "r", offset, shape)


def _header(dtype: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Name and value of each field."""
    yield f"the magic number of {dtype}", MAGIC[dtype]
    yield "the number of dimensions", len(shape)
    padding = (1,) * (LEAST_DIMENSIONS - len(shape))
    for place, size in enumerate((*shape, *padding), start=1):
        yield f"dimension {place}", size


def _shown(name: str, value: int) -> str:
    return f"0x{value:08X}" if "magic" in name else str(value)
