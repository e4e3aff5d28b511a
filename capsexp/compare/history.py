"""Read a run's metrics.jsonl. Only lines that contain a requested tag are parsed."""

import bisect
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from capsexp.compare.fields import get_count, get_number
from capsexp.compare.runs import Run
from capsexp.documents import damage, parse_json
from capsexp.errors import Notes, nearest
from capsexp.files import read_regular

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
NOT_TAGS = {"step", "epoch"}
LONGEST_LINE = 2**16
"""Bytes of the longest line that is parsed."""
MAX_VALUES = 2000
"""Values of a tag that curves are drawn from; from longer logs every k-th value is taken."""
MAX_SEARCHED = 100
"""Runs whose tags are listed for a message."""
Series = dict[int, float]
"""A metric by step, in the order of the steps."""


def all_values(run: Path, tags: Collection[str], notes: Notes) -> dict[str, Series]:
    """Return the values of some tags; a tag that the run lacks gets an empty series.

    Of a tag with more than `MAX_VALUES` values, every k-th and the last are returned. k is a power of two, so
    that the steps of runs of different lengths coincide. SPLIT/error is 100 minus SPLIT/accuracy, in %.
    """
    lines = _lines(run, notes)
    return {tag: _series(lines, tag, run, notes) or _errors(lines, tag, run, notes) for tag in tags}


def seconds_by_step(run: Path, notes: Notes) -> Series:
    """Return the seconds of training at the steps of a run's timing.jsonl; empty for older runs."""
    return _series(_lines(run, notes, TIMING), "training_seconds", run, notes)


def seconds_at(step: int, seconds: Series) -> float | None:
    """Return the seconds of training at a step, between two known ones on a line; None outside of them."""
    if step in seconds:
        return seconds[step]
    steps = list(seconds)
    place = bisect.bisect(steps, step)
    if place in (0, len(steps)):
        return None
    before, after = steps[place - 1], steps[place]
    share = (step - before) / (after - before)
    return seconds[before] + share * (seconds[after] - seconds[before])


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
    known = {name for run in islice(runs, MAX_SEARCHED) for name in logged_tags(run.path)}
    return f"no run has the metric {tag!r}{nearest(tag, known)}"


def _series(lines: Sequence[bytes], tag: str, run: Path, notes: Notes) -> Series:
    lines = [line for line in lines if _needle(tag) in line]
    interval = 1 << max(0, math.ceil(math.log2(len(lines) / MAX_VALUES))) if lines else 1
    chosen = lines[interval - 1 :: interval]
    if len(lines) % interval:
        chosen.append(lines[-1])
    values = ((entry["step"], get_number(entry, tag)) for entry in _entries(chosen, [tag], run, notes))
    return dict(sorted((step, value) for step, value in values if value is not None))


def _errors(lines: Sequence[bytes], tag: str, run: Path, notes: Notes) -> Series:
    split, _, name = tag.rpartition("/")
    if name != "error":
        return {}
    accuracies = _series(lines, f"{split}/accuracy", run, notes)
    return {step: 100 - 100 * value for step, value in accuracies.items()}


def _needle(tag: str) -> bytes:
    return json.dumps(tag).encode()


def _lines(run: Path, notes: Notes, name: str = METRICS) -> list[bytes]:
    """Return the lines of a file that look complete."""
    file = run / name
    try:
        lines = read_regular(file).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.warning(f"{file} cannot be read: {damage(error)}")
        return []
    last, complete = lines.pop(), [line for line in lines if _looks_complete(line)]
    if last:
        notes.warning(f"{file}: ignored the incomplete last line")
    if len(complete) < len(lines):
        _warn_of_damage(run, notes)
    return complete


def _looks_complete(line: bytes) -> bool:
    return line[:1] == b"{" and line[-1:] == b"}" and len(line) <= LONGEST_LINE


def _entries(
    lines: Iterable[bytes], tags: Collection[str], run: Path, notes: Notes
) -> Iterator[dict[str, Any]]:
    """Parse the lines that contain any of these tags."""
    needles = [_needle(tag) for tag in tags]
    for line in lines:
        if not any(needle in line for needle in needles):
            continue
        try:
            entry = parse_json(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and get_count(entry, "step") is not None:
            yield entry
        else:
            _warn_of_damage(run, notes)


def _warn_of_damage(run: Path, notes: Notes) -> None:
    notes.warning(f"{run / 'metrics.jsonl'}: ignored damaged lines")
