import struct

import numpy as np
import pytest

from capsexp.data.norb_file import open_norb
from capsexp.errors import DataError

NUMBERS = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
BYTES = NUMBERS.tobytes()


def write(path, *header, data=BYTES):
    path.write_bytes(struct.pack(f"<{len(header)}I", *header) + data)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "some-dat.mat"


def opened(path):
    return open_norb(path, dtype="uint8", shape=NUMBERS.shape)


def test_an_array_of_bytes_is_mapped_into_memory(file):
    numbers = opened(write(file, 0x1E3D4C55, 4, 2, 3, 4, 5))
    assert isinstance(numbers, np.memmap)
    assert numbers.dtype == np.uint8
    assert (numbers == NUMBERS).all()


@pytest.mark.parametrize("shape", [(6,), (3, 2)])
def test_fewer_than_three_dimensions_are_padded_with_ones(file, shape):
    values = np.array([0, 1, -2, 3, 70_000, 5], "<i4").reshape(shape)
    padding = [1] * (3 - len(shape))
    write(file, 0x1E3D4C54, len(shape), *shape, *padding, data=values.tobytes())
    numbers = open_norb(file, dtype="int32", shape=shape)
    assert numbers.shape == shape
    assert (numbers == values).all()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((0x1E3D4C54, 4, 2, 3, 4, 5), "the magic number of uint8 must be 0x1E3D4C55, got 0x1E3D4C54"),
        ((0x554C3D1E, 4, 2, 3, 4, 5), "the magic number of uint8 must be 0x1E3D4C55, got 0x554C3D1E"),
        ((0x1E3D4C55, 3, 2, 3, 4, 5), "the number of dimensions must be 4, got 3"),
        ((0x1E3D4C55, 4, 7, 3, 4, 5), "dimension 1 must be 2, got 7"),
        ((0x1E3D4C55, 4, 2, 3, 5, 4), "dimension 3 must be 4, got 5"),
    ],
)
def test_another_header_is_reported(file, header, message):
    with pytest.raises(DataError, match=rf"some-dat\.mat: {message}"):
        opened(write(file, *header))


def test_padding_that_is_not_one_is_reported(file):
    write(file, 0x1E3D4C54, 1, 2, 1, 9, data=bytes(8))
    with pytest.raises(DataError, match="dimension 3 must be 1, got 9"):
        open_norb(file, dtype="int32", shape=(2,))


@pytest.mark.parametrize("size", [0, 3, 7, 23, 24, 143, 145])
def test_a_file_of_another_size_is_reported(file, size):
    write(file, 0x1E3D4C55, 4, 2, 3, 4, 5, data=BYTES + b"\0")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match=rf"some-dat\.mat: must have 144 bytes, got {size}"):
        opened(file)


def test_a_file_that_cannot_be_read_is_reported(file):
    with pytest.raises(DataError, match=r"cannot read .*some-dat\.mat: No such file"):
        opened(file)
