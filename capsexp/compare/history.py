"""Read a run's metrics.jsonl. Only lines that contain a requested tag are parsed."""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from capsexp.compare.runs import Run, get_number
from capsexp.errors import Notes, nearest

NOT_TAGS = {"step", "epoch"}
Series = dict[int, float]
"""A metric by step, in the order of the steps."""


def all_values(run: Path, tags: Collection[str], notes: Notes) -> dict[str, Series]:
    """Return all values of some tags; a tag that the run lacks gets an empty series."""
    series: dict[str, Series] = {tag: {} for tag in tags}
    for entry in _entries(_lines(run, notes), tags, run, notes):
        for tag in tags:
            if (value := get_number(entry, tag)) is not None:
                series[tag][entry["step"]] = value
    return {tag: dict(sorted(values.items())) for tag, values in series.items()}


def last_values(run: Path, tags: Collection[str], notes: Notes) -> dict[str, float]:
    """Return the last value of each tag that the run has. Read from the end, so that few lines are parsed."""
    values: dict[str, float] = {}
    missing = set(tags)
    for entry in _entries(reversed(_lines(run, notes)), missing, run, notes):
        for tag in list(missing):
            if (value := get_number(entry, tag)) is not None:
                values[tag] = value
                missing.remove(tag)
        if not missing:
            break
    return values


def logged_tags(run: Path) -> set[str]:
    """Return all tags that the run has. Nothing is parsed."""
    keys = re.findall(rb'"([^"\\]+)": ', b"\n".join(_lines(run, Notes())))
    return {key.decode(errors="replace") for key in set(keys)} - NOT_TAGS


def unknown_tag(tag: str, runs: Iterable[Run]) -> str:
    """Return the message for a tag that no run has, with the nearest one that exists."""
    known = {name for run in runs for name in logged_tags(run.path)}
    return f"no run has the metric {tag!r}{nearest(tag, known)}"


def _lines(run: Path, notes: Notes) -> list[bytes]:
    """Return the lines that look complete."""
    file = run / "metrics.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.warning(str(error))
        return []
    last, complete = lines.pop(), [line for line in lines if line[:1] == b"{" and line[-1:] == b"}"]
    if last:
        notes.warning(f"{file}: ignored the incomplete last line")
    if len(complete) < len(lines):
        _warn_of_damage(run, notes)
    return complete


def _entries(
    lines: Iterable[bytes], tags: Collection[str], run: Path, notes: Notes
) -> Iterator[dict[str, Any]]:
    """Parse the lines that contain any of these tags."""
    needles = [f'"{tag}"'.encode() for tag in tags]
    for line in lines:
        if not any(needle in line for needle in needles):
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            yield entry
        else:
            _warn_of_damage(run, notes)


def _warn_of_damage(run: Path, notes: Notes) -> None:
    notes.warning(f"{run / 'metrics.jsonl'}: ignored damaged lines")
