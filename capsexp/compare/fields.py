"""Values of a run's files, which may be damaged or somebody else's: of the wrong type, or out of range."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from capsexp.config.settings import Published
from capsexp.errors import is_integer, is_number

LARGEST_COUNT = 2**53
"""Steps beyond this are not exact as floats."""
LATEST_TIME = 253_402_300_800  # seconds from 1970 to the year 10000
LONGEST_NAME = 1000  # characters


def get_number(node: Mapping[str, Any], key: str) -> float | None:
    """Return a number, also an infinite one or NaN; None if it is missing or not a number."""
    value = node.get(key)
    try:
        return float(value) if is_number(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def get_count(node: Mapping[str, Any], key: str) -> int | None:
    """Return a number of steps; None if it is missing or cannot be one."""
    value = node.get(key)
    return value if is_integer(value) and 0 <= value <= LARGEST_COUNT else None


class Files(NamedTuple):
    """What the files of a run say that tables show."""

    status: Mapping[str, Any]
    """status.json as `capsexp.compare.runs.read_status` returns it."""
    settings: Mapping[str, Any]
    """See `capsexp.compare.runs.Run`."""
    paper: Published | None
    command: str
    version: str | None


class Fields:
    """The content of a file, and which of its keys have values that cannot be right.

    Args:
        content: the keys and values of the file.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self.wrong: list[str] = []

    def section(self, key: str) -> "Fields":
        """Return the keys and values below a key; without any if it is missing."""
        value = self._content.get(key)
        section = Fields(value if isinstance(value, Mapping) else {})
        section.wrong = self.wrong
        self._check(key, value, isinstance(value, Mapping))
        return section

    def between(self, key: str, low: int | float, high: int | float) -> float | None:
        """Return a finite number of a range; None if it is missing or wrong."""
        value = get_number(self._content, key)
        is_right = value is not None and math.isfinite(value) and low <= value <= high
        self._check(key, self._content.get(key), is_right)
        return value if is_right else None

    def time(self, key: str) -> float | None:
        """Return seconds since 1970, or of a duration; None if it is missing or wrong."""
        return self.between(key, 0, LATEST_TIME)

    def accuracy(self, key: str) -> float | None:
        """Return an accuracy; None if it is missing or wrong."""
        return self.between(key, 0, 1)

    def count(self, key: str) -> int | None:
        """Return a number of steps; None if it is missing or wrong."""
        value = get_count(self._content, key)
        self._check(key, self._content.get(key), value is not None)
        return value

    def name(self, key: str) -> str | None:
        """Return a short text; None if it is missing or wrong."""
        value = self._content.get(key)
        is_right = isinstance(value, str) and len(value) <= LONGEST_NAME
        self._check(key, value, is_right)
        return value if is_right else None

    def text(self, key: str) -> str:
        """Return a text; empty if it is missing or wrong."""
        value = self._content.get(key)
        self._check(key, value, isinstance(value, str))
        return value if isinstance(value, str) else ""

    def names(self) -> dict[str, str]:
        """Return all keys whose values are short texts."""
        names = {key: self.name(key) for key in self._content if len(key) <= LONGEST_NAME}
        return {key: name for key, name in names.items() if name is not None}

    def _check(self, key: str, value: Any, is_right: bool) -> None:
        if value is not None and not is_right and key not in self.wrong:
            self.wrong.append(key)
