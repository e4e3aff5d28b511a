"""Read the JSON files of a run directory, which may be damaged or somebody else's."""

import json
from pathlib import Path
from typing import Any

from capsexp.files import read_regular

LARGEST = 4 * 2**20
"""Bytes of the largest JSON or YAML file that is read."""


def read_json(path: Path, *, limit: int = LARGEST) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: no such file, not a regular file, or too large.
        ValueError: it is not JSON.
    """
    return parse_json(read_regular(path, limit=limit))


def parse_json(content: bytes) -> Any:
    """Return the content of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def damage(error: Exception) -> str:
    """Return in one line why a file cannot be read, without the name of the file."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split())[:200] or type(error).__name__
