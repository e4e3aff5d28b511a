"""Which settings runs are told apart by, and what each is called in a table."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capsexp.compare.runs import Run
from capsexp.errors import UserError, nearest

# In the order of their columns. `device` has no part in a run's results.
GROUPS = ("experiment", "dataset", "model", "routing", "loss", "optimizer", "trainer")


@dataclass(frozen=True)
class Column:
    """A column of a table of runs.

    Args:
        name: a setting's dotted key, a config group, or a figure's tag: what machine-readable forms have.
        title: what a table for people has.
        is_figure: whether a run computed it, and means of it can be formed.
    """

    name: str
    title: str
    is_figure: bool = False

    @property
    def is_setting(self) -> bool:
        """Whether it tells runs apart."""
        return not self.is_figure and self.name not in ("status", "run")

    @property
    def higher_is_better(self) -> bool:
        """Whether the best is the largest, as of accuracies. Settings begin with the smallest."""
        return self.is_figure and (self.name.endswith("accuracy") or self.name in ("steps", "epochs"))


FIGURES = (
    Column("validation/best_accuracy", "validation", is_figure=True),
    Column("test/accuracy", "test", is_figure=True),
    Column("steps", "steps", is_figure=True),
    Column("seconds", "time", is_figure=True),
)
# Where a run's recipe says what its paper came to: both in %, and the size of our training.
ERROR = Column("test/error", "test error, %", is_figure=True)
PAPER = Column("paper/error", "paper, %", is_figure=True)
TOTAL = Column("total", "of", is_figure=True)
EPOCHS = Column("epochs", "epochs", is_figure=True)
STATUS, RUN = Column("status", "status"), Column("run", "run")


def setting_columns(runs: Sequence[Run], *, without: Collection[str] = ()) -> list[Column]:
    """A column for each config group whose choice differs, then for each setting that differs beyond that.

    Args:
        runs: the runs of the table.
        without: settings and groups that get no column, such as `seed`.
    """
    keys = distinct_keys(runs)
    titles = short_titles(keys)
    groups = [group for group in GROUPS if _choices_differ(group, runs)]
    left = [key for key in keys if not {key, key.partition(".")[0]} & {*without} and key not in groups]
    typed = {key for run in runs for key in re.findall(r"[\w.]+(?==)", run.command)}
    columns = [Column(group, group) for group in groups if group not in without]
    return columns + [Column(key, titles[key]) for key in left if _tells_apart(key, groups, typed, runs)]


def figure_columns(runs: Iterable[Run]) -> list[Column]:
    """The columns of figures; with the paper's beside ours where any run has it."""
    if not any(run.paper for run in runs):
        return [*FIGURES]
    validation, test, steps, seconds = FIGURES
    return [validation, test, ERROR, PAPER, steps, TOTAL, EPOCHS, seconds]


def distinct_keys(runs: Iterable[Run]) -> list[str]:
    """All settings but those that only repeat another one, as model.routing.bias does routing.bias."""
    all_settings = [run.settings for run in runs]
    keys = list({key: None for settings in all_settings for key in settings})
    known = set(keys)

    def is_copy(key: str) -> bool:
        return any(end in known and _repeats(key, end, all_settings) for end in _ends(key) if end != key)

    return [key for key in keys if not is_copy(key)]


def short_titles(keys: Iterable[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other key, figure or group has."""
    taken = {*GROUPS, *(column.title for column in (*FIGURES, ERROR, PAPER, TOTAL, EPOCHS, STATUS, RUN))}
    ends = {key: _ends(key) for key in keys}
    owners = Counter(end for some in ends.values() for end in some)

    def is_own(end: str) -> bool:
        return owners[end] == 1 and end not in taken

    return {key: next((end for end in some if is_own(end)), key) for key, some in ends.items()}


def resolve(name: str, offered: Sequence[str], *, among: Collection[str] = ()) -> str:
    """The full name that is meant: itself, or the only one whose last parts it is.

    Args:
        name: as typed.
        offered: what it may be.
        among: more full names that count, but need not be told to the user.

    Raises:
        UserError: there is none, or more than one.
    """
    if name in offered or name in among:
        return name
    fitting = [full for full in offered if full.endswith(f".{name}")]
    if len(fitting) > 1:
        raise UserError(f"{name!r} may be {' or '.join(fitting)}: write more of it")
    if not fitting:
        raise UserError(f"unknown key {name!r}{nearest(name, offered)}")
    return fitting[0]


def text(value: Any) -> str:
    """A setting as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def frozen(value: Any) -> Any:
    """A setting's value as something that can be hashed and compared."""
    if isinstance(value, Mapping):
        return frozenset((key, frozen(part)) for key, part in value.items())
    return tuple(frozen(part) for part in value) if isinstance(value, list) else value


def _ends(key: str) -> list[str]:
    """hidden, decoder.hidden, model.decoder.hidden."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _repeats(key: str, original: str, all_settings: Iterable[Mapping[str, Any]]) -> bool:
    return all(
        key not in settings or (original in settings and settings[original] == settings[key])
        for settings in all_settings
    )


def _choices_differ(group: str, runs: Iterable[Run]) -> bool:
    return len({run.choices.get(group) for run in runs if run.choices}) > 1


def _tells_apart(key: str, groups: Collection[str], typed: Collection[str], runs: Sequence[Run]) -> bool:
    """Whether a setting differs between runs, and not just because the choice for its group does.

    Args:
        key: the setting.
        groups: config groups whose choice differs.
        typed: keys that somebody set on a command line, which is reason enough for a column.
        runs: the runs of the table.
    """
    group = key.partition(".")[0]
    by_choice: dict[str | None, list[Run]] = {}
    for run in runs:
        if run.settings:
            choice = run.choices.get(group) if group in groups else None
            by_choice.setdefault(choice, []).append(run)
    if any(_differs(key, alike) for alike in by_choice.values()):
        return True
    return key in typed and len({frozen(run.settings[key]) for run in runs if key in run.settings}) > 1


def _differs(key: str, runs: Sequence[Run]) -> bool:
    """Whether runs have different values, or some have none although their version of capsexp has the key."""
    having = [run for run in runs if key in run.settings]
    lacking = {run.version for run in runs if key not in run.settings}
    values = {frozen(run.settings[key]) for run in having}
    return len(values) > 1 or bool(lacking & {run.version for run in having})
