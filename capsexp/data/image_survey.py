"""What the headers of a set of images decide: channels, size, and how values become bytes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from capsexp.data.decode import Header, Reading, decode, full_scale, read_header
from capsexp.data.image_files import Entry
from capsexp.data.threads import refuse, try_files
from capsexp.errors import DataError
from capsexp.text import a_few

LOST = 16
"""An image whose smallest and largest byte are closer than this has lost its contrast."""

LOWEST_UPPER = 16
"""Colors of 16 bits whose upper 8 stay below this use 12 bits or fewer."""

Headers = Mapping[str, Header]


class Survey(NamedTuple):
    """How a set of images is read."""

    channels: int
    size: tuple[int, int]
    """Height and width, common to all images if they are not resized."""
    reading: Reading
    notes: tuple[str, ...]
    """Lines for the user."""


def survey(
    entries: Sequence[Entry],
    *,
    resize: tuple[int, int] | None,
    background: Literal["auto", "white", "black"],
    white_level: int | float | None,
) -> Survey:
    """Decide how a set of images is read.

    Args:
        entries: all images of the set.
        resize: the size in memory; None if all images have the same size.
        background: behind transparent pixels; `auto`: black if images lose their contrast on white.
        white_level: value of white for more than 8 bits, or None: from the largest value of the set.

    Raises:
        DataError: a line for each image that cannot be read; images differ in size; there is no reading for
            all of them.
    """
    headers = _headers(tuple(entries))
    white, white_note = _white(headers, "whole", white_level)
    float_white, float_note = _white(headers, "float", white_level)
    upper_note = _upper(headers)
    ground, ground_note = _background(headers, background)
    return Survey(
        channels=1 if all(header.is_gray for header in headers.values()) else 3,
        size=resize or _common_size(headers),
        reading=Reading(white, float_white, ground),
        notes=tuple(note for note in (white_note, float_note, upper_note, ground_note) if note),
    )


@functools.lru_cache(maxsize=2)
def _headers(entries: tuple[Entry, ...]) -> Headers:
    """Read all headers. A command builds its dataset twice, so the last ones are kept."""
    paths = [entry.path for entry in entries]
    headers, problems = try_files(read_header, paths)
    if problems:  # name the images that are damaged behind their headers, too
        _, problems = try_files(_read_whole, paths)
    refuse(problems)
    return dict(zip(paths, headers, strict=True))


def _read_whole(path: str) -> None:
    decode(path, 1 if read_header(path).is_gray else 3)


def _white(
    headers: Headers, pixels: Literal["whole", "float"], level: int | float | None
) -> tuple[int | float | None, str]:
    """Return the value of white for one kind of pixels, and a line about it; None without such images."""
    largest = {path: header.largest for path, header in headers.items() if header.pixels == pixels}
    if not largest:
        return None, ""
    path = max(largest, key=largest.__getitem__)
    most = largest[path]
    white = full_scale(most, pixels, path) if level is None else level
    kind = "gray of 16 or 32 bits" if pixels == "whole" else "floating point"
    source = "set dataset.white_level to change it" if level is None else "dataset.white_level"
    return white, (
        f"images in {kind}: {len(largest)}, with values up to {most:g}; {white:g} is read as white ({source})"
    )


def _background(
    headers: Headers, asked: Literal["auto", "white", "black"]
) -> tuple[Literal["white", "black"], str]:
    """Return what is behind transparent pixels, and a line about it."""
    on_white, on_black = _lost(headers, 0), _lost(headers, 1)
    if asked == "auto" and on_white and on_black:
        raise DataError(
            f"image_folder: images that lose their contrast on white: {len(on_white)} ({on_white[0]}); on "
            f"black: {len(on_black)} ({on_black[0]}); set dataset.background=white or black"
        )
    if asked == "auto":
        if not on_white:
            return "white", ""
        return "black", (
            "transparent areas are read as black; images that lose their contrast on white: "
            f"{len(on_white)} ({a_few(on_white)})"
        )
    lost = on_white if asked == "white" else on_black
    return asked, f"images that lose their contrast on {asked}: {len(lost)} ({a_few(lost)})" if lost else ""


def _lost(headers: Headers, ground: int) -> list[str]:
    """Return the images that have no contrast on this background, and some on the other."""
    contrasts = ((path, header.contrasts) for path, header in headers.items())
    return [path for path, both in contrasts if both and both[ground] < LOST <= both[1 - ground]]


def _upper(headers: Headers) -> str:
    """Return a line about colors of 16 bits; refuse those that the upper 8 bits do not show."""
    upper = {path: header.largest for path, header in headers.items() if header.pixels == "upper"}
    if upper and max(upper.values()) < LOWEST_UPPER:
        raise DataError(
            f"image_folder: the colors of {a_few(list(upper))} have 16 bits, of which the upper 8 are read, "
            f"and those are below {LOWEST_UPPER}; convert the images to 8 bits"
        )
    return f"images in colors of 16 bits, of which the upper 8 are read: {len(upper)}" if upper else ""


def _common_size(headers: Headers) -> tuple[int, int]:
    first_path, first = next(iter(headers.items()))
    for path, header in headers.items():
        if (header.height, header.width) != (first.height, first.width):
            raise DataError(
                f"image_folder: images differ in size (height x width): {first_path} is "
                f"{first.height}x{first.width}, {path} is {header.height}x{header.width}; "
                "set dataset.preprocess.resize=[HEIGHT,WIDTH]"
            )
    return (first.height, first.width)
