"""`capsexp data list`, `prepare` and `verify`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress as Bars
from rich.progress import TaskID

from capsexp.data.checked_files import Progress
from capsexp.data.dataset import Dataset
from capsexp.errors import DataError
from capsexp.terminal import Table, as_markup, new_console
from capsexp.text import printable

PrintLine = Callable[[str], None]


class DatasetRow(NamedTuple):
    """A row of `capsexp data list`."""

    name: str
    state: str
    """`embedded`, `present` (not verified), `incomplete` or `missing`."""
    size: int
    """Bytes on disk of everything in the folder."""
    folder: Path | None
    """None for an embedded dataset."""


def list_datasets(datasets: Mapping[str, Dataset]) -> list[DatasetRow]:
    """Return the state of every dataset, sorted by name. Looks for files; does not read them."""
    return [
        DatasetRow(name, _state(dataset), _size(dataset.folder), dataset.folder)
        for name, dataset in sorted(datasets.items())
    ]


def print_list(datasets: Mapping[str, Dataset]) -> None:
    """Print a table of the datasets."""
    table = Table("dataset", "state", "MB on disk", "folder")
    for row in list_datasets(datasets):
        table.add_row(row.name, row.state, f"{row.size / 1e6:.0f}", str(row.folder or ""))
    new_console().print(table)


def run_action(action: str, datasets: Mapping[str, Dataset]) -> int:
    """Run `prepare` or `verify` for several datasets. Return 0 if all are as published, otherwise 1."""
    console = new_console(soft_wrap=True)
    with Bars(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(activity: str, done: int, total: int) -> None:
            if activity not in tasks:
                tasks[activity] = bars.add_task(as_markup(activity))
            bars.update(tasks[activity], completed=done, total=total or None)

        def print_line(line: str) -> None:
            console.print(printable(line))

        codes = [
            prepare(dataset, print_line=print_line, progress=progress)
            if action == "prepare"
            else verify(dataset, print_line=print_line)
            for dataset in datasets.values()
        ]
    return max(codes, default=0)


def prepare(dataset: Dataset, *, print_line: PrintLine, progress: Progress) -> int:
    """Download missing and damaged files, write caches of resized images, then verify everything.

    Args:
        dataset: the dataset.
        print_line: prints one line.
        progress: called during downloading, unpacking and resizing.

    Returns:
        Exit code: 0 if the dataset is as published, 1 after printing the problems.
    """
    missing, damaged = dataset.missing_files(), dataset.damaged_files()
    if missing:
        print_line(f"{dataset.name}: getting {', '.join(missing)} in {dataset.folder}")
    if damaged:
        print_line(f"{dataset.name}: replacing {', '.join(damaged)}: not the published files")
    try:
        dataset.prepare(progress)
    except DataError as error:
        print_line(f"{dataset.name}: {error}")
        return 1
    return verify(dataset, print_line=print_line)


def verify(dataset: Dataset, *, print_line: PrintLine) -> int:
    """Read every file and compare it with the published one; decode a user's own images.

    Args:
        dataset: the dataset.
        print_line: prints one line: one for each bad file, or one if all are good.

    Returns:
        Exit code: 0 without problems, otherwise 1.
    """
    problems = dataset.problems()
    for note in dataset.notes():
        print_line(note)
    for problem in problems:
        print_line(f"{dataset.name}: {problem}")
    if not problems:
        print_line(
            f"{dataset.name}: verified" + (f" in {dataset.folder}" if dataset.folder else " (embedded)")
        )
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
