"""What a run's metrics.jsonl says: its figures step by step. Only lines that are asked for are parsed."""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from capsexp.compare.runs import number
from capsexp.errors import Notes

NO_TAGS = {"step", "epoch"}
Series = dict[int, float]
"""A figure by step, in the order of the steps."""


def series(run: Path, tags: Collection[str], notes: Notes) -> dict[str, Series]:
    """All values of some tags; a tag that the run lacks has none."""
    found: dict[str, Series] = {tag: {} for tag in tags}
    for entry in _entries(_lines(run, notes), tags, run, notes):
        for tag in tags:
            if (value := number(entry, tag)) is not None:
                found[tag][entry["step"]] = value
    return {tag: dict(sorted(values.items())) for tag, values in found.items()}


def last_values(run: Path, tags: Collection[str], notes: Notes) -> dict[str, float]:
    """The last value of each tag that the run has. Reads from the end, so most lines are left alone."""
    found: dict[str, float] = {}
    wanted = set(tags)
    for entry in _entries(reversed(_lines(run, notes)), wanted, run, notes):
        for tag in list(wanted):
            if (value := number(entry, tag)) is not None:
                found[tag] = value
                wanted.remove(tag)
        if not wanted:
            break
    return found


def tags(run: Path) -> set[str]:
    """All tags that the run has, found without parsing."""
    found = re.findall(rb'"([^"\\]+)": ', b"\n".join(_lines(run, Notes())))
    return {tag.decode(errors="replace") for tag in set(found)} - NO_TAGS


def _lines(run: Path, notes: Notes) -> list[bytes]:
    """The lines that look whole."""
    file = run / "metrics.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.warning(str(error))
        return []
    last, whole = lines.pop(), [line for line in lines if line[:1] == b"{" and line[-1:] == b"}"]
    if last:
        notes.warning(f"{file}: the last line is half written and left out")
    if len(whole) < len(lines):
        _tell_of_damage(run, notes)
    return whole


def _entries(
    lines: Iterable[bytes], tags: Collection[str], run: Path, notes: Notes
) -> Iterator[dict[str, Any]]:
    """The lines that speak of any of these tags."""
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
            _tell_of_damage(run, notes)


def _tell_of_damage(run: Path, notes: Notes) -> None:
    notes.warning(f"{run / 'metrics.jsonl'}: damaged lines are left out")
