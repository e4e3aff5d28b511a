import numpy as np
import pytest
from image_examples import RAMP, png_of_16_bits, save, with_alpha

from capsexp.data.decode import Reading
from capsexp.data.image_files import Entry
from capsexp.data.image_survey import survey
from capsexp.errors import DataError

SHAPE = RAMP * (RAMP > 100)
WHITE_INK, LIGHT_INK, BLACK_INK = (with_alpha((tone,) * 3, SHAPE) for tone in (255, 245, 0))
OPAQUE = np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 255)])
CLEAR = np.zeros((6, 8, 4), np.uint8)


def surveyed(folder, *images, resize=None, background="auto", white_level=None, ending="png"):
    entries = []
    for number, pixels in enumerate(images):
        path = save(folder / f"{number}.{ending}", pixels)
        status = path.stat()
        entries.append(Entry(str(path), status.st_size, status.st_mtime_ns))
    return survey(entries, resize=resize, background=background, white_level=white_level)


@pytest.mark.parametrize(
    ("tops", "white"),
    [([1], 1), ([9, 255], 255), ([200, 256], 1023), ([10, 4095], 4095), ([4096], 16383), ([7, 65535], 65535)],
)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_one_white_is_chosen_for_all_gray_images_and_said(tmp_path, tops, white, ending):
    found = surveyed(tmp_path, *(np.full((6, 8), top, np.uint16) for top in tops), RAMP, ending=ending)
    assert (found.channels, found.size, found.reading) == (1, (6, 8), Reading(white=white))
    assert found.notes == (
        f"images in gray of 16 or 32 bits: {len(tops)}, with values up to {max(tops)}; {white} is read as "
        "white (set dataset.white_level to change it)",
    )


def test_floats_and_whole_numbers_have_a_white_each(tmp_path):
    images = [np.full((6, 8), 0.7, np.float32), np.full((6, 8), 4000, np.int32)]
    assert surveyed(tmp_path, *images, ending="tif").reading == Reading(white=4095, float_white=1)
    assert surveyed(tmp_path, *images, ending="tif", white_level=5000).reading[:2] == (5000, 5000)


def test_bytes_need_no_line(tmp_path):
    found = surveyed(tmp_path, RAMP, np.dstack([RAMP] * 3), OPAQUE)
    assert (found.channels, found.reading, found.notes) == (3, Reading(), ())


@pytest.mark.parametrize(
    ("images", "background"),
    [
        ([BLACK_INK], "white"),
        ([WHITE_INK], "black"),
        ([LIGHT_INK], "black"),
        ([WHITE_INK, OPAQUE, RAMP], "black"),
        ([BLACK_INK, OPAQUE, CLEAR], "white"),
        ([CLEAR, OPAQUE], "white"),
        ([with_alpha((200, 30, 30), SHAPE)], "white"),
    ],
)
def test_the_background_keeps_the_contrast_of_all_images(tmp_path, images, background):
    found = surveyed(tmp_path, *images)
    assert found.reading.background == background
    assert len(found.notes) == (background == "black")


def test_ink_that_no_background_shows_is_refused_unless_one_is_chosen(tmp_path):
    message = r"on white: 2 \(.*1\.png\); on black: 1 \(.*0\.png\); set dataset\.background=white or black"
    with pytest.raises(DataError, match=message):
        surveyed(tmp_path, BLACK_INK, WHITE_INK, WHITE_INK)
    found = surveyed(tmp_path, BLACK_INK, WHITE_INK, WHITE_INK, background="black")
    assert found.reading.background == "black"
    assert found.notes == (f"images that lose their contrast on black: 1 ({tmp_path / '0.png'})",)


@pytest.mark.parametrize(("top", "refused"), [(255, True), (4095, True), (65535, False)])
def test_colors_of_16_bits_that_fill_only_the_lower_are_refused(tmp_path, top, refused):
    path = png_of_16_bits(tmp_path / "x.png", np.full((6, 8, 3), top))
    entry = Entry(str(path), 1, 1)
    if not refused:
        assert survey([entry], resize=None, background="auto", white_level=None).channels == 3
        return
    with pytest.raises(DataError, match=r"colors of .*x\.png have 16 bits, .* convert the images to 8 bits"):
        survey([entry], resize=None, background="auto", white_level=None)


def test_all_unreadable_files_are_named(tmp_path):
    entries = []
    for number in range(30):
        path = tmp_path / f"{number:02d}.png"
        path.write_bytes(b"text" * number)
        entries.append(Entry(str(path), 0, 0))
    with pytest.raises(DataError) as caught:
        survey(entries, resize=None, background="auto", white_level=None)
    assert [line.split(" cannot")[0][-6:] for line in caught.value.problems[:20]] == [
        f"{number:02d}.png" for number in range(20)
    ]
    assert caught.value.problems[20:] == ("and 10 more images like these",)
