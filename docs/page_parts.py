"""What the scripts that generate parts of pages share: markers, tables, numbers."""

from collections.abc import Sequence
from typing import Any, TypeVar

NONE = "–"  # noqa: RUF001
CURVE_POINTS = 60
"""Points of a curve that a data file keeps."""
T = TypeVar("T")


def replace_part(page: str, name: str, content: str, *, origin: str) -> str:
    """Return a page with new content between the markers of a part.

    Args:
        page: the text.
        name: of the part; its markers are `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
        content: Markdown.
        origin: the name of the page's file, for the message.

    Raises:
        SystemExit: the page lacks the markers.
    """
    begin, end = markers(name)
    head, found_begin, rest = page.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise SystemExit(f"{origin} needs the lines {begin} and {end}")
    return f"{head}{begin}\n\n{content}\n{end}{tail}"


def markers(name: str) -> tuple[str, str]:
    """Return the lines around a generated part of a page."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    every = [titles, ["---"] * len(titles), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in every)


def rounded(number: int | float) -> int | float:
    """Return a number with six digits: more would change with the order of a sum."""
    return number if isinstance(number, int) else float(f"{number:.6g}")


def few(points: Sequence[T], most: int = CURVE_POINTS) -> Sequence[T]:
    """Return every k-th of some points, at most so many."""
    return points[:: -(-len(points) // most) or 1]


def plain(value: Any) -> dict[str, Any]:
    """Return the numbers of a `Spread` or an `Interval`, as JSON has them."""
    return {name: rounded(number) for name, number in vars(value).items() if number is not None}
