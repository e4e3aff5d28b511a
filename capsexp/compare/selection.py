"""Which runs a command is about: directories, and filters such as iterations=3 or status=failed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capsexp.compare import runs
from capsexp.compare.columns import distinct_keys, resolve, text
from capsexp.compare.runs import STATUSES, Run, is_number
from capsexp.errors import Notes, UserError, nearest

_COMMA = re.compile(r",(?![^\[]*\])")  # not within a list


def select(words: Sequence[str], notes: Notes) -> list[Run]:
    """The runs below the directories among the words that pass the filters among them.

    Args:
        words: directories, and filters KEY=VALUE[,VALUE…]; without a directory, the output root is meant.
        notes: gets what is wrong with them, and with files.
    """
    filters = [word for word in words if "=" in word and not Path(word).is_dir()]
    folders = [Path(word) for word in words if word not in filters]
    if folders:
        found = runs.read_all(runs.find_all(folders, notes), notes)
    else:
        root = runs.default_root()
        found = runs.read_all(runs.find(root, notes) if root.is_dir() else [], notes)
        if not found:
            notes.warning(f"{root}: no runs yet; `capsexp train` makes one")
    if not found:
        return []
    passing = [{run.path for run in _passing(word, found, notes)} for word in filters]
    kept = [run for run in found if all(run.path in some for some in passing)]
    if not kept and all(passing):
        notes.warning(f"no run has {' and '.join(filters)}")
    return kept


def _passing(word: str, found: list[Run], notes: Notes) -> list[Run]:
    """The runs that one filter lets through: all of them, with a note, if it cannot be understood."""
    name, _, wanted = word.partition("=")
    try:
        key = resolve(name, ["status", *_groups(found), *distinct_keys(found)], among=_keys(found))
    except UserError as error:
        for problem in error.problems:
            notes.error(f"{word}: {problem}")
        return found
    values = _COMMA.split(wanted)
    if key == "status" and (wrong := [value for value in values if value not in STATUSES]):
        notes.error(f"{word}: unknown status {wrong[0]!r}{nearest(wrong[0], STATUSES)}")
        return found
    passing = [run for run in found if any(_is(run, key, value) for value in values)]
    if not passing and found:
        there = sorted({text(value) for run in found if (value := _value(run, key)) is not None})
        known = f"; there is {', '.join(there)}" if key != "status" and 0 < len(there) <= 20 else ""
        notes.warning(f"no run has {word}{known}")
    return passing


def _value(run: Run, key: str) -> Any:
    """What a filter looks at; None for what the run has not."""
    if key == "status":
        return run.status
    return run.settings[key] if key in run.settings else run.choices.get(key)


def _is(run: Run, key: str, wanted: str) -> bool:
    value = _value(run, key)
    if is_number(value):
        return _as_number(wanted) == value
    if value is None:
        return wanted == "null" and key in run.settings
    return text(value).replace(" ", "") == wanted.replace(" ", "")


def _as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _groups(found: Iterable[Run]) -> list[str]:
    return sorted({group for run in found for group in run.choices})


def _keys(found: Iterable[Run]) -> Mapping[str, None]:
    return {key: None for run in found for key in run.settings}
