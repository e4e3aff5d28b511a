"""What `capsexp data list`, `prepare` and `verify` do."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID
from rich.table import Table

from capsexp.data.dataset import Dataset
from capsexp.data.download import Progress
from capsexp.errors import DataError

Say = Callable[[str], None]
"""Prints one line."""


class DatasetRow(NamedTuple):
    """A data set as `capsexp data list` shows it."""

    name: str
    state: str
    """`embedded`, `present` (not verified), `incomplete` or `missing`."""
    size: int
    """Bytes on disk, of everything in its folder."""
    folder: Path | None
    """None for an embedded set."""


def list_datasets(datasets: Mapping[str, Dataset]) -> list[DatasetRow]:
    """What is there and what is not, by name. Looks for files; does not read them."""
    return [
        DatasetRow(name, _state(dataset), _size(dataset.folder), dataset.folder)
        for name, dataset in sorted(datasets.items())
    ]


def print_list(datasets: Mapping[str, Dataset]) -> None:
    """A table of the data sets."""
    table = Table("data set", "state", "MB on disk", "folder")
    for row in list_datasets(datasets):
        table.add_row(row.name, row.state, f"{row.size / 1e6:.0f}", str(row.folder or ""))
    Console().print(table)


def work_through(action: str, datasets: Mapping[str, Dataset]) -> int:
    """`prepare` or `verify` data sets one after the other. Returns 0 if all are as published, otherwise 1."""
    console = Console(soft_wrap=True, highlight=False)
    with Bars(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total or None)

        codes = [
            prepare(dataset, say=console.print, progress=progress)
            if action == "prepare"
            else verify(dataset, say=console.print)
            for dataset in datasets.values()
        ]
    return max(codes, default=0)


def prepare(dataset: Dataset, *, say: Say, progress: Progress) -> int:
    """Download what is missing, reduce what is kept reduced, then verify everything.

    Args:
        dataset: the data set.
        say: prints one line.
        progress: called while something is downloaded, unpacked or reduced.

    Returns:
        Exit code: 0 if the set is as it was published, 1 if not (what is wrong was said).
    """
    if absent := dataset.missing_files():
        say(f"{dataset.name}: getting {', '.join(absent)} in {dataset.folder}")
    try:
        dataset.prepare(progress)
    except DataError as error:
        say(f"{dataset.name}: {error}")
        return 1
    return verify(dataset, say=say)


def verify(dataset: Dataset, *, say: Say) -> int:
    """Read every file and compare it with what was published; a user's own pictures are decoded.

    Args:
        dataset: the data set.
        say: prints one line, here one for each bad file or one for all that are good.

    Returns:
        Exit code: 0 if all is well, 1 if not.
    """
    problems = dataset.problems()
    for problem in problems:
        say(f"{dataset.name}: {problem}")
    if not problems:
        say(f"{dataset.name}: verified" + (f" in {dataset.folder}" if dataset.folder else " (embedded)"))
    return 1 if problems else 0


def _state(dataset: Dataset) -> str:
    if dataset.folder is None:
        return "embedded"
    if not dataset.missing_files():
        return "present"
    return "incomplete" if _size(dataset.folder) else "missing"


def _size(folder: Path | None) -> int:
    if folder is None or not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
