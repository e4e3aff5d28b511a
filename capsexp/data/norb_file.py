"""The file format of the NORB datasets: a magic number, the dimensions, then the numbers; all little endian.

Described at https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from capsexp.errors import DataError, refuse

MAGIC = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}
LEAST_DIMENSIONS = 3
"""The header lists at least this many; those that an array does not have are 1."""


def open_norb(path: Path, *, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Map an unpacked file into memory; numbers are read from disk on access.

    Args:
        path: the file.
        dtype: `uint8` or `int32`.
        shape: the shape that the file must have.

    Raises:
        DataError: the file cannot be read, or its header or its size differs.
    """
    fields = list(_header(dtype, shape))
    offset = 4 * len(fields)
    try:
        with path.open("rb") as file:
            header = file.read(offset)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    values = np.frombuffer(header[: len(header) // 4 * 4], "<u4").tolist()
    for (name, expected), value in zip(fields, values, strict=False):
        if value != expected:
            raise DataError(f"{path}: {name} must be {_text(name, expected)}, got {_text(name, value)}")
    little_endian = np.dtype(dtype).newbyteorder("<")
    expected_size = offset + little_endian.itemsize * int(np.prod(shape))
    if size != expected_size:
        raise DataError(f"{path}: must have {expected_size} bytes, got {size}")
    return np.memmap(path, little_endian, "r", offset, shape)


def check_values(
    path: Path, table: Int64[Tensor, "N F"], names: Sequence[str], values: Sequence[Sequence[int]]
) -> None:
    """Check that each column of a table has exactly the given values.

    Args:
        path: the file, for messages.
        table: the numbers of the file.
        names: of the columns, for messages.
        values: the sorted values of each column.

    Raises:
        DataError: a column has another value, or misses one.
    """
    for column, name, allowed in zip(table.T, names, values, strict=True):
        values_in_file = column.unique().tolist()
        if values_in_file != list(allowed):
            raise DataError(
                f"{path}: the values of {name} must be {list(allowed)}, got {values_in_file[:40]}"
            )


def _header(dtype: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Yield the name and value of each field."""
    yield f"the magic number of {dtype}", MAGIC[dtype]
    yield "the number of dimensions", len(shape)
    padding = (1,) * (LEAST_DIMENSIONS - len(shape))
    for number, size in enumerate((*shape, *padding), start=1):
        yield f"dimension {number}", size


def _text(name: str, value: int) -> str:
    return f"0x{value:08X}" if "magic" in name else str(value)


def held_out_instances(chosen: int | Sequence[int] | None, instances: Sequence[int]) -> tuple[int, ...]:
    """Return the instances of every class that a setting `validation_instance` holds out for validation.

    Args:
        chosen: the setting: one of them, several, or None for none.
        instances: all of the training split.

    Raises:
        ValueError: there is no such instance, one is there twice, or none is left to train on.
    """
    if chosen is None:
        return ()
    held_out = (chosen,) if isinstance(chosen, int) else tuple(chosen)
    if not 0 < len({*held_out} & {*instances}) == len(held_out) < len(instances):
        known = ", ".join(map(str, instances))
        refuse(f"validation_instance must be null, one of {known}, or a list of some of them, got {chosen}")
    return held_out
