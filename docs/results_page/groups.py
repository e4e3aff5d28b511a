"""Records that differ only in their seed, and how their numbers are shown."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from page_parts import NONE

from capsexp.compare.means import Spread, spread
from results_page import store
from results_page.store import Data, Record


class Group(NamedTuple):
    """Records with equal recipe and settings."""

    records: tuple[Record, ...]
    numbers: tuple[int, ...]
    """Of the records in the list of all runs, from 1."""

    @property
    def first(self) -> Record:
        """The record whose recipe, settings and row are those of all."""
        return self.records[0]

    def errors(self, name: str = "error", *, several_crops: bool = False) -> Spread | None:
        """Return the test error over the records that have one, in %; of one crop, or of several."""
        tests = [
            test for run in self.records for test in run["tests"] if (test["crops"] > 1) == several_crops
        ]
        values = [test[name] for test in tests if name in test]
        return spread(values) if values else None

    @property
    def main_error(self) -> Spread | None:
        """The error of one crop, or of several where there is no other."""
        return self.errors() or self.errors(several_crops=True)

    def mean(self, field: str) -> float | None:
        """Return the mean of a field over the records that have it."""
        values = [run[field] for run in self.records if run.get(field) is not None]
        return sum(values) / len(values) if values else None

    def distinct(self, show: Callable[[Record], str]) -> str:
        """Return what the records say, each text once."""
        return "; ".join(dict.fromkeys(text for run in self.records if (text := show(run)))) or NONE


def groups(data: Data) -> list[Group]:
    """Return the groups in the order of their first records."""
    found: dict[Any, list[tuple[int, Record]]] = {}
    for number, run in enumerate(data["runs"], 1):
        found.setdefault((run["kept"], store.settings(run)), []).append((number, run))
    return [Group(tuple(run for _, run in group), tuple(n for n, _ in group)) for group in found.values()]


def ours(group: Group) -> str:
    """Return the test error as a table shows it: mean ± deviation over seeds, other crops after it."""
    parts = []
    if one := group.errors():
        digits = group.errors("digit_error")
        text = _percent(one, group)
        parts.append(text if digits is None else f"{text} of pairs, {_percent(digits, group)} of digits")
    if several := group.errors(several_crops=True):
        crops = {test["crops"] for run in group.records for test in run["tests"]} - {1}
        parts.append(f"{_percent(several, group)} with {' or '.join(map(str, sorted(crops)))} crops")
    return "; ".join(parts) or NONE


def _percent(value: Spread, group: Group) -> str:
    """Return a mean in %, with its deviation and number where there are several values."""
    if value.sd is not None:
        return f"{value.mean:.2f} ± {value.sd:.2f} (n={value.n})"
    # Of runs that were not kept some errors are known to one place only.
    return f"{value.mean:.2f}" if group.first["kept"] else f"{value.mean:g}"


def gap(group: Group, headline: Record) -> str:
    """Return by how many points the error is above a paper's, which has one crop or several like ours."""
    several = headline.get("crops_error")
    if (error := group.errors()) is not None:
        published = headline["error"]
    else:
        error, published = group.errors(several_crops=True), several or headline["error"]
    return NONE if error is None or published is None else f"{error.mean - published:+.2f}"


def paper(headline: Record) -> str:
    """Return a paper's error."""
    if headline["error"] is None:
        return NONE
    text = f"{headline['error']:g}" + ("" if headline["sd"] is None else f" ± {headline['sd']:g}")
    if headline.get("crops_error") is not None:
        text += f"; {headline['crops_error']:g} with several crops"
    return text + (" *" if headline["chosen_on_test"] else "")


def training(group: Group) -> str:
    """Return the images and epochs of a training."""
    parts = []
    if (images := group.mean("images")) is not None:
        parts.append(f"{images / 1e6:.3g} million images" if images >= 1e6 else f"{images:,.0f} images")
    if (epochs := group.mean("epochs")) is not None:
        parts.append(f"{epochs:.3g} epoch{'s' * (epochs != 1)}")
    return ", ".join(parts) or NONE


def time(group: Group) -> str:
    """Return the time of a training, the threads and the processor."""
    seconds = group.mean("training_seconds")
    if seconds is not None:
        took = duration(seconds)
    elif (seconds := group.mean("wall_seconds")) is not None:
        took = f"{duration(seconds)} with validation and test"
    else:
        took = ""
    return ", ".join(part for part in (took, group.distinct(machine)) if part not in ("", NONE)) or NONE


def machine(run: Record) -> str:
    """Return the threads and the processor of a run."""
    threads = run["threads"]
    count = "" if threads is None else f"{threads} thread{'s' * (threads != 1)}"
    model = run["cpu"] if run["device"] in (None, "cpu") else run["device"]
    return ", ".join(part for part in (count, model) if part)


def duration(seconds: float) -> str:
    """Return seconds as hours and minutes, or minutes and seconds."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def recipe(group: Group) -> str:
    """Return the recipe, and how many of its settings were changed."""
    count = len(group.first["overrides"])
    changed = f", {count} setting{'s' * (count != 1)} changed" if count else ""
    return f"`{group.first['recipe']}`{changed}"


def tested_weights(run: Record) -> str:
    """Return which weights were tested."""
    return run["tests"][0]["weights"] if run["tests"] else ""


def seeds(group: Group) -> str:
    """Return the seeds."""
    return ", ".join(str(run["seed"]) for run in group.records if run["seed"] is not None) or NONE


def of_row(all_groups: Sequence[Group], row: str) -> Iterator[Group]:
    """Yield the tested groups beside a headline row whose run directories were kept."""
    for group in all_groups:
        if group.first["row"] == row and group.first["kept"] and group.main_error is not None:
            yield group
