"""Select runs by directories and by filters such as iterations=3 or status=failed."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from capsexp.compare import find, runs
from capsexp.compare.columns import as_override, distinct_keys, full_key
from capsexp.compare.runs import STATUSES, Run
from capsexp.errors import Notes, UserError, is_number, nearest

_COMMA = re.compile(r",(?![^\[]*\])")  # outside brackets


def select(arguments: Sequence[str], notes: Notes) -> list[Run]:
    """Return the runs below some directories that pass all filters.

    Args:
        arguments: directories, and filters KEY=VALUE[,VALUE…]. Without a directory: the output root.
        notes: collects errors in the arguments, and warnings about files.
    """
    filters = [argument for argument in arguments if "=" in argument and not Path(argument).is_dir()]
    folders = [Path(argument) for argument in arguments if argument not in filters]
    if folders:
        found = runs.read_below(folders, notes)
    else:
        root = find.default_root()
        found = runs.read_all(find.find(root, notes) if root.is_dir() else [], notes)
        if not found:
            notes.warning(f"{root}: no runs yet; start one with `capsexp train`")
    if not found:
        return []
    passing = [{run.path for run in _passing(condition, found, notes)} for condition in filters]
    selected = [run for run in found if all(run.path in paths for paths in passing)]
    if not selected and all(passing):
        notes.warning(f"no run has {' and '.join(filters)}")
    return selected


def _passing(condition: str, found: list[Run], notes: Notes) -> list[Run]:
    """Return the runs that pass one filter; all of them, with an error noted, if the filter is invalid."""
    name, _, expected = condition.partition("=")
    try:
        key = full_key(name, ["status", *_groups(found), *distinct_keys(found)], unlisted=_keys(found))
    except UserError as error:
        for problem in error.problems:
            notes.error(f"{condition}: {problem}")
        return found
    values = _COMMA.split(expected)
    if key == "status" and (wrong := [value for value in values if value not in STATUSES]):
        notes.error(f"{condition}: unknown status {wrong[0]!r}{nearest(wrong[0], STATUSES)}")
        return found
    passing = [run for run in found if any(_matches(run, key, value) for value in values)]
    if not passing and found:
        notes.warning(f"no run has {condition}{_known_values(key, found)}")
    return passing


def _known_values(key: str, found: Iterable[Run]) -> str:
    """Return the values that runs have, for a message; empty if there are too many."""
    values = sorted({as_override(value) for run in found if (value := _value(run, key)) is not None})
    return f"; values: {', '.join(values)}" if key != "status" and 0 < len(values) <= 20 else ""


def _value(run: Run, key: str) -> Any:
    """Return the value that a filter tests; None if the run has none."""
    if key == "status":
        return run.status
    return run.settings[key] if key in run.settings else run.choices.get(key)


def _matches(run: Run, key: str, expected: str) -> bool:
    value = _value(run, key)
    if is_number(value):
        return _parse_number(expected) == value
    if value is None:
        return expected == "null" and key in run.settings
    return as_override(value).replace(" ", "") == expected.replace(" ", "")


def _parse_number(string: str) -> float | None:
    try:
        return float(string)
    except ValueError:
        return None


def _groups(found: Iterable[Run]) -> list[str]:
    return sorted({group for run in found for group in run.choices})


def _keys(found: Iterable[Run]) -> set[str]:
    return {key for run in found for key in run.settings}
