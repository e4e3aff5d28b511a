"""The folder of a sweep: its runs, their directories and their statuses.

NAME-FINGERPRINT/         one run each, named after its overrides, not after its number
sweep.json                the command; overrides and status of each run
results.csv               all runs, as `capsexp compare --csv` prints them
table.md                  our test errors beside the papers', for recipes with a published error
multirun.yaml             written by Hydra
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Column
from rich.text import Text

from capsexp.compare.comparison import beside_paper
from capsexp.compare.fields import Fields
from capsexp.compare.layout import STATUS_COLOURS
from capsexp.compare.runs import read_all, read_status
from capsexp.compare.tables import as_csv, markdown, print_comparison
from capsexp.config.naming import affects_results, job_name
from capsexp.documents import read_json
from capsexp.errors import Notes
from capsexp.files import require_own, sweep_unfinished, write_atomic
from capsexp.locks import locked
from capsexp.terminal import Table, as_markup, new_console
from capsexp.text import printable, printable_lines
from capsexp.training.run_dir import RunDir

SHOWN_FIRST = ("running", "failed", "died")
SUMMARY_KEYS = ("status", "step", "total", "best", "results", "seconds", "error", "exit_code")


class Job(NamedTuple):
    """The current state of one run of a sweep."""

    name: str
    overrides: list[str]
    status: Mapping[str, Any]
    """Its status.json, as `read_status` returns it; empty for a job that waits."""

    @property
    def state(self) -> str:
        """`waiting`, or the status."""
        return str(self.status.get("status", "waiting"))


class Sweep:
    """The folder of a sweep, and the jobs that were added to it so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.command = ""
        self._overrides: dict[str, list[str]] = {}  # by job name
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = read_json(path / "sweep.json")
            self.command = str(content["command"])
            self._overrides = {name: [*map(str, job["overrides"])] for name, job in content["jobs"].items()}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other sweeps out of this folder.

        Raises:
            UserError: another sweep is running in it.
            WriteError: it cannot be written, or holds a link where the sweep writes.
        """

        def refusal(owner: str) -> str:
            hint = "hydra.sweep.dir=DIR starts it in another folder"
            return f"this sweep is already running in {self.path} ({owner}): {hint}"

        for name in ("sweep.lock", "sweep.json", "results.csv", "table.md", "multirun.yaml"):
            require_own(self.path / name, replaced=name != "sweep.lock")
        with locked(self.path / "sweep.lock", refusal=refusal):
            sweep_unfinished(self.path)
            yield

    def add(self, overrides: Sequence[str], *, name: str | None = None) -> RunDir:
        """Add a job to the sweep. Return its run directory, which is named after its settings or as given."""
        name = name or job_name(overrides)
        self._overrides.setdefault(name, list(overrides))
        return RunDir(self.path / name)

    def jobs(self) -> list[Job]:
        """Return all jobs in the order of adding, then the runs that another launcher left in the folder."""
        overrides = dict(self._overrides)
        for status in sorted(self.path.glob("*/status.json")):
            overrides.setdefault(status.parent.name, RunDir(status.parent).overrides())
        return [Job(name, items, self._status(name)) for name, items in overrides.items()]

    def _status(self, name: str) -> Mapping[str, Any]:
        path = self.path / name
        return read_status(path, Notes()) if (path / "status.json").exists() else {}

    def succeeded(self) -> bool:
        """Return whether every job is finished."""
        return all(job.state == "finished" for job in self.jobs())

    def write_command(self, command: str) -> None:
        """Record the command that runs the sweep."""
        self.command = command
        self.write()

    def write(self) -> None:
        """Write sweep.json."""
        jobs = {job.name: {"overrides": job.overrides, **_summary(job.status)} for job in self.jobs()}
        content = {"command": self.command, "written": time.time(), "jobs": jobs}
        write_atomic(
            self.path / "sweep.json", lambda file: file.write(json.dumps(content, indent=1).encode())
        )

    def finish(self) -> None:
        """Write and print the statuses and results of all jobs."""
        self.write()
        if not (jobs := self.jobs()):
            return
        notes = Notes()
        csv = as_csv([self.path], notes).encode()
        write_atomic(self.path / "results.csv", lambda file: file.write(csv))
        notes.print_warnings()
        new_console().print(jobs_table(jobs))
        self._print_beside_paper(jobs)
        path = printable(self.path)
        print(f"sweep: {path}\ncurves: tensorboard --logdir {path}")

    def _print_beside_paper(self, jobs: Sequence[Job]) -> None:
        """Print our test errors beside the papers', if they have any, and write them to table.md."""
        paths = [self.path / job.name for job in jobs if job.status]
        runs = read_all(paths, Notes())  # `finish` has printed the warnings
        if not any(run.paper for run in runs):
            return
        recipes = dict.fromkeys(run.choices["experiment"] for run in runs if "experiment" in run.choices)
        notes = Notes()
        comparison = beside_paper(runs, notes, recipes=list(recipes))
        changes = _common_changes([job.overrides for job in jobs])
        remark = f"\nOurs with {' '.join(changes)}; the paper's errors are as published.\n" if changes else ""
        print_comparison(comparison)
        print(printable_lines(remark))
        notes.print_warnings()
        content = f"{markdown(comparison)}{remark}".encode()
        write_atomic(self.path / "table.md", lambda file: file.write(content))


def job_labels(jobs: Sequence[Job]) -> dict[str, str]:
    """Return what each job is called in output, by job name."""
    labels = differing_overrides([job.overrides for job in jobs])
    return {job.name: label for job, label in zip(jobs, labels, strict=True)}


def differing_overrides(all_overrides: Sequence[Sequence[str]]) -> list[str]:
    """Return the overrides of each job that not all jobs share, with short keys. A single job keeps all."""
    common = set.intersection(*map(set, all_overrides)) if len(all_overrides) > 1 else set()
    differing = [[_short(item) for item in overrides if item not in common] for overrides in all_overrides]
    return [" ".join(items) or "defaults" for items in differing]


def jobs_table(jobs: Sequence[Job], *, max_rows: int | None = None) -> Table:
    """Return a table of jobs, with their differing overrides and statuses.

    Args:
        jobs: all jobs of a sweep.
        max_rows: the number of rows to show; running and failed jobs take precedence. None shows all.
    """
    labels = job_labels(jobs)
    shown = sorted(jobs, key=lambda job: job.state not in SHOWN_FIRST)[:max_rows]
    table = Table(Column("job", overflow="fold"), "status", "step", "validation", "test", "time", "")
    for job in sorted(shown, key=jobs.index):
        table.add_row(Text(labels[job.name]), *_status_cells(job))
    if len(shown) < len(jobs):
        states = [job.state for job in jobs]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        table.caption = as_markup(f"{len(jobs)} jobs: {counts}")
    return table


def _status_cells(job: Job) -> list[str | Text]:
    status = Fields(job.status)
    step, total, seconds = status.count("step"), status.count("total"), status.time("seconds")
    test = status.section("results").accuracy("test/accuracy") if job.state == "finished" else None
    return [
        Text(job.state, STATUS_COLOURS.get(job.state, "dim")),
        "" if step is None or total is None else f"{step}/{total}",
        _four_digits(status.section("best").accuracy("accuracy")),
        _four_digits(test),
        "" if seconds is None else f"{seconds:.0f} s",
        Text(_failure(job.status)),
    ]


def _common_changes(all_overrides: Sequence[Sequence[str]]) -> list[str]:
    """Return the overrides that all jobs share and that change the results of their recipes."""
    common = set.intersection(*map(set, all_overrides))
    return [
        override
        for override in all_overrides[0]
        if override in common
        and affects_results(override)
        and not override.startswith(("experiment=", "seed="))
    ]


def _short(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{key.rpartition('.')[2]}{equals}{value}"


def _summary(status: Mapping[str, Any]) -> dict[str, Any]:
    return {key: status[key] for key in SUMMARY_KEYS if key in status}


def _failure(status: Mapping[str, Any]) -> str:
    lines = str(status.get("error", "")).splitlines()
    return lines[0][:200] if lines and status.get("status") == "failed" else ""


def _four_digits(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.4f}"
