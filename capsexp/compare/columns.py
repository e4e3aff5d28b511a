"""The columns of a table of runs: which settings differ, and the title of each."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capsexp.compare.runs import Run
from capsexp.errors import UserError, nearest

# In column order. `device` is left out: it does not affect a run's results.
GROUPS = ("experiment", "dataset", "model", "routing", "loss", "optimizer", "trainer")


@dataclass(frozen=True)
class Column:
    """A column of a table of runs.

    Args:
        name: a setting's dotted key, a config group or a metric's tag; used in CSV and JSON.
        title: the heading in tables for people.
        is_metric: whether the column holds numbers that a run computed and that can be averaged.
        is_interval: whether each is a mean with an interval.
    """

    name: str
    title: str
    is_metric: bool = False
    is_interval: bool = False

    @property
    def is_setting(self) -> bool:
        """Whether the column holds a setting or the choice of a config group."""
        return not self.is_metric and self.name not in ("status", "run")

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better, as for accuracies. Settings sort from small to large."""
        return self.is_metric and (
            self.name.endswith("accuracy")
            or self.name in ("steps", "epochs", "images_per_second")
            or self.name.startswith("validation/fold")
        )


METRICS = (
    Column("validation/best_accuracy", "validation", is_metric=True),
    Column("test/accuracy", "test", is_metric=True),
    Column("steps", "steps", is_metric=True),
    Column("seconds", "time", is_metric=True),
)
# Shown if a run's recipe gives the paper's test error: both errors in %, and the length of our training.
ERROR = Column("test/error", "test error, %", is_metric=True)
PAPER = Column("paper/error", "paper, %", is_metric=True)
TOTAL = Column("total", "of", is_metric=True)
EPOCHS = Column("epochs", "epochs", is_metric=True)
STATUS, RUN = Column("status", "status"), Column("run", "run")


def setting_columns(runs: Sequence[Run], *, without: Collection[str] = ()) -> list[Column]:
    """Return a column for each config group whose choice differs, then for each other setting that differs.

    Args:
        runs: the runs of the table.
        without: settings and groups to leave out, such as `seed`.
    """
    keys = distinct_keys(runs)
    titles = short_titles(keys)
    groups = [group for group in GROUPS if _choices_differ(group, runs)]
    typed = {key for run in runs for key in _typed_keys(run.command)}
    candidates = [key for key in keys if not {key, key.partition(".")[0]} & {*without} and key not in groups]
    columns = [Column(group, group) for group in groups if group not in without]
    return columns + [Column(key, titles[key]) for key in candidates if _has_column(key, groups, typed, runs)]


def metric_columns(runs: Iterable[Run]) -> list[Column]:
    """Return the metric columns; with the paper's test error beside ours if any run has it."""
    if not any(run.paper for run in runs):
        return [*METRICS]
    validation, test, steps, seconds = METRICS
    return [validation, test, ERROR, PAPER, steps, TOTAL, EPOCHS, seconds]


def distinct_keys(runs: Iterable[Run]) -> list[str]:
    """Return the keys of all settings except copies, as model.routing.bias is of routing.bias."""
    all_settings = [run.settings for run in runs]
    keys = list({key: None for settings in all_settings for key in settings})
    known = set(keys)

    def is_copy(key: str) -> bool:
        return any(end in known and _repeats(key, end, all_settings) for end in _ends(key) if end != key)

    return [key for key in keys if not is_copy(key)]


def short_titles(keys: Iterable[str]) -> dict[str, str]:
    """Return, for each dotted key, its shortest suffix that is no other key's suffix, metric or group."""
    taken = {*GROUPS, *(column.title for column in (*METRICS, ERROR, PAPER, TOTAL, EPOCHS, STATUS, RUN))}
    ends = {key: _ends(key) for key in keys}
    counts = Counter(end for key_ends in ends.values() for end in key_ends)

    def is_unique(end: str) -> bool:
        return counts[end] == 1 and end not in taken

    return {key: next(filter(is_unique, key_ends), key) for key, key_ends in ends.items()}


def full_key(name: str, keys: Sequence[str], *, unlisted: Collection[str] = ()) -> str:
    """Return the key that a user means: the name itself, or the only key that ends in `.name`.

    Args:
        name: as typed.
        keys: the keys to choose from.
        unlisted: more keys that may be typed in full; error messages do not suggest them.

    Raises:
        UserError: no key matches, or more than one.
    """
    if name in keys or name in unlisted:
        return name
    matches = [key for key in keys if key.endswith(f".{name}")]
    if len(matches) > 1:
        raise UserError(f"{name!r} is ambiguous: write {' or '.join(matches)}")
    if not matches:
        raise UserError(f"unknown key {name!r}{nearest(name, keys)}")
    return matches[0]


def as_override(value: Any) -> str:
    """Return a setting's value as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def hashable(value: Any) -> Any:
    """Return a setting's value with lists and mappings made hashable."""
    if isinstance(value, Mapping):
        return frozenset((key, hashable(item)) for key, item in value.items())
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # NaN differs even from itself
    return tuple(hashable(item) for item in value) if isinstance(value, list) else value


def _ends(key: str) -> list[str]:
    """Return all suffixes of a key: hidden, decoder.hidden, model.decoder.hidden."""
    names = key.split(".")
    return [".".join(names[start:]) for start in range(len(names) - 1, -1, -1)]


def _repeats(key: str, original: str, all_settings: Iterable[Mapping[str, Any]]) -> bool:
    return all(
        key not in settings or (original in settings and settings[original] == settings[key])
        for settings in all_settings
    )


def _typed_keys(command: str) -> Iterator[str]:
    """Yield the keys of all KEY=VALUE in a command."""
    for text in command.split("=")[:-1]:
        # From the end: a search for the end of a long word would start at each of its letters.
        if backwards := re.match(r"[\w.]+", text[::-1]):
            yield backwards[0][::-1]


def _choices_differ(group: str, runs: Iterable[Run]) -> bool:
    return len({run.choices.get(group) for run in runs if run.choices}) > 1


def _has_column(key: str, groups: Collection[str], typed: Collection[str], runs: Sequence[Run]) -> bool:
    """Return whether a setting differs between runs, and not only because its group's choice differs.

    Args:
        key: the setting.
        groups: config groups whose choice differs.
        typed: keys that a user set on a command line; these get a column whenever they differ.
        runs: the runs of the table.
    """
    group = key.partition(".")[0]
    by_choice: dict[str | None, list[Run]] = {}
    for run in runs:
        if run.settings:
            choice = run.choices.get(group) if group in groups else None
            by_choice.setdefault(choice, []).append(run)
    if any(_differs(key, same_choice) for same_choice in by_choice.values()):
        return True
    return key in typed and len(_values(key, runs)) > 1


def _differs(key: str, runs: Sequence[Run]) -> bool:
    """Return whether runs differ in a setting.

    A run without the setting counts as different only if its version of capsexp knows the setting.
    """
    with_key = {run.version for run in runs if key in run.settings}
    without_key = {run.version for run in runs if key not in run.settings}
    return len(_values(key, runs)) > 1 or bool(with_key & without_key)


def _values(key: str, runs: Iterable[Run]) -> set[Any]:
    return {hashable(run.settings[key]) for run in runs if key in run.settings}
