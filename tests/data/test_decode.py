import os
import socket
import stat

import numpy as np
import pytest
import torch
from image_examples import RAMP, png_of_16_bits, save, with_alpha
from PIL import Image

from capsexp.data.decode import Reading, decode, read_header
from capsexp.errors import DataError

KINDS = [("a.png", "uint16"), ("b.tif", "uint16"), ("c.tif", "int32"), ("d.tif", "float32")]
"""File names, and the types of the values in them."""

READERS = [lambda path: decode(path, 3), read_header]


def bytes_of(path, channels=1, **reading):
    return decode(str(path), channels, Reading(**reading)).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("x.png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("y.tif", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")),
        *(("x.jpg", mode) for mode in ("L", "RGB", "CMYK")),
        *(("x.gif", mode) for mode in ("L", "P")),
        *((f"x.{ending}", "RGB") for ending in ("bmp", "ppm", "webp", "jp2", "jfif", "avif")),
        *((f"x.{ending}", "L") for ending in ("pgm", "PNG", "apng")),
    ],
)
def test_every_format_and_mode_is_read(tmp_path, name, mode, channels):
    path = str(save(tmp_path / name, np.dstack([RAMP] * 3), mode))
    image = decode(path, channels)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (channels, 6, 8))
    header = read_header(path)
    assert (header.height, header.width, header.pixels) == (6, 8, "byte")
    assert header.is_gray == (mode in ("1", "L", "LA") and not name.endswith(("gif", "avif")))


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(RAMP // (number + 1)) for number in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert (bytes_of(tmp_path / "x.gif") == RAMP).all()


@pytest.mark.parametrize(
    ("largest", "white", "kinds"),
    [
        (1, 1, KINDS),
        (200, 255, KINDS),
        (1000, 1023, KINDS),
        (4000, 4095, KINDS),
        (16000, 16383, KINDS),
        (50000, 65535, KINDS),
        (2**20, 2**24 - 1, KINDS[2:]),
    ],
)
def test_values_are_scaled_by_the_range_of_the_set(tmp_path, largest, white, kinds):
    for name, dtype in kinds:
        values = (np.linspace(0, 1, 48).reshape(6, 8) * largest).astype(dtype)
        path = save(tmp_path / name, values)
        assert read_header(str(path)).largest == values.max()
        reading = {"float_white" if dtype == "float32" else "white": white}
        expected = values.astype(float) * 255 / white
        assert np.abs(bytes_of(path, **reading)[0] - expected).max() < 1
        assert (bytes_of(path) == bytes_of(path, **reading)).all()  # an image of no set is its own set


def test_whole_numbers_keep_their_upper_8_bits(tmp_path):
    for bits in (8, 10, 12, 14, 16):
        values = np.random.default_rng(bits).integers(0, 2**bits, (6, 8), dtype=np.uint16)
        path = save(tmp_path / f"{bits}.png", values)
        assert (bytes_of(path, white=2**bits - 1)[0] == values >> (bits - 8)).all()


def test_all_images_of_a_set_have_the_same_scale(tmp_path):
    dark, bright = (save(tmp_path / f"{top}.png", np.full((2, 2), top, np.uint16)) for top in (300, 3000))
    assert [bytes_of(path, white=4095).max() for path in (dark, bright)] == [300 >> 4, 3000 >> 4]


def test_floats_a_little_beside_0_and_1_are_black_and_white(tmp_path):
    path = save(tmp_path / "x.tif", np.array([[-0.02, 0.5, 1.04]], np.float32))
    assert bytes_of(path).tolist() == bytes_of(path, float_white=1).tolist() == [[[0, 128, 255]]]


def test_values_above_white_are_white_and_far_above_it_refused(tmp_path):
    path = save(tmp_path / "x.png", np.array([[0, 4095, 6000]], np.uint16))
    assert bytes_of(path, white=4095).tolist() == [[[0, 255, 255]]]
    with pytest.raises(DataError, match=r"x\.png has values up to 6000, but white is 255 in its set"):
        bytes_of(path, white=255)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0, np.nan]], "has pixels that are nan or inf"),
        ([[0, np.inf]], "has pixels that are nan or inf"),
        ([[-1, 1]], r"has negative pixels \(down to -1\)"),
        ([[0, 3.5]], r"has floating-point values up to 3\.5, which do not show what is white: .*white_level"),
    ],
)
def test_values_without_a_meaning_are_refused_by_training_and_prediction(tmp_path, values, message):
    path = str(save(tmp_path / "x.tif", np.array(values, np.float32)))
    with pytest.raises(DataError, match=message):
        decode(path, 1)


@pytest.mark.parametrize("channels", [3, 4])
def test_of_colors_of_16_bits_the_upper_8_are_read(tmp_path, channels):
    path = png_of_16_bits(tmp_path / "x.png", np.full((2, 2, channels), 0xABCD))
    assert (bytes_of(path, 3) == 0xAB).all() or channels == 4
    header = read_header(str(path))
    assert (header.pixels, header.largest) == ("upper", 0xAB)


@pytest.mark.parametrize(("background", "ground"), [("white", 255), ("black", 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L with a transparent gray"])
def test_transparent_pixels_show_the_background(tmp_path, mode, background, ground):
    alpha = np.array([[0, 255], [255, 0]], np.uint8)
    path = tmp_path / "x.png"
    image = Image.fromarray(with_alpha((100, 100, 100), alpha))
    if mode == "P":
        image = Image.fromarray(np.array([[1, 0], [0, 1]], np.uint8), "P")
        image.putpalette([100, 100, 100, 7, 7, 7])
        image.save(path, transparency=1)
    elif mode == "L with a transparent gray":
        Image.fromarray(np.where(alpha, 100, 7).astype(np.uint8)).save(path, transparency=7)
    else:
        image.convert(mode).save(path)
    assert bytes_of(path, background=background).tolist() == [[[ground, 100], [100, ground]]]
    assert read_header(str(path)).contrasts == (155, 100)


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def make_postscript(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


def make_bomb(path):
    Image.new("1", (20_000, 20_000)).save(path)


def make_truncated(path):
    save(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:6000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_fifo, "it is not a regular file"),
        (make_socket, "(it is not a regular file|No such device or address)"),
        (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
        (lambda path: path.mkdir(), "(it is not a regular file|Is a directory)"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (make_postscript, "it is not an image of a known format"),
        (lambda path: path.write_bytes(b""), "it is not an image of a known format"),
        (make_bomb, "it has more than 178,956,970 pixels"),
        (make_truncated, "image file is truncated"),
    ],
)
def test_a_file_that_is_no_image_is_one_line(tmp_path, make, message, recwarn):
    path = tmp_path / "x.png"
    make(path)
    with pytest.raises(DataError, match=rf"x\.png .*: {message}") as caught:
        decode(str(path), 3)
    assert "\n" not in str(caught.value)
    assert caught.value.problems == (str(caught.value),)


def test_no_program_is_started_for_postscript(tmp_path, monkeypatch):
    started = tmp_path / "started"
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))
    make_postscript(tmp_path / "x.png")
    for read in READERS:
        with pytest.raises(DataError):
            read(str(tmp_path / "x.png"))
    assert not started.exists()


@pytest.mark.parametrize(
    "values",
    [{"white": 0}, {"white": "255"}, {"float_white": float("nan")}, {"background": "red"}],
)
def test_a_stored_reading_is_checked(values):
    stored = Reading(white=4095, background="black")
    assert Reading.from_plain(stored._asdict()) == stored
    with pytest.raises(ValueError, match=r"(white|background) must be"):
        Reading.from_plain(stored._asdict() | values)
