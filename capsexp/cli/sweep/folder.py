"""A sweep's folder: which runs belong to it, where each lives, and how they stand.

NAME-FINGERPRINT/         one run each, named after its overrides, not after its number
sweep.json  results.csv   the runs with their overrides and ends; what `capsexp compare` shows of them
table.md                  of recipes with a paper's figure: ours beside it
multirun.yaml             Hydra's own note of the sweep
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from capsexp.compare.comparison import beside_paper
from capsexp.compare.runs import read_all, shown_status
from capsexp.compare.tables import as_csv, markdown, print_comparison
from capsexp.config.naming import affects_results, job_name
from capsexp.errors import Notes
from capsexp.files import locked, write_atomic
from capsexp.training.run_dir import RunDir

COLOURS = {"finished": "green", "failed": "red", "died": "red", "running": "cyan", "interrupted": "yellow"}


class Job(NamedTuple):
    """One run of a sweep as it stands."""

    name: str
    overrides: list[str]
    status: Mapping[str, Any]
    """What its status.json says, in the words of `capsexp runs`; empty for a job that waits."""

    @property
    def state(self) -> str:
        """`waiting`, or the status."""
        return str(self.status.get("status", "waiting"))


class Sweep:
    """The folder, and the jobs that were asked for so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.command = ""
        self._asked: dict[str, list[str]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            told = json.loads((path / "sweep.json").read_text())
            self.command = str(told["command"])
            self._asked = {name: [*map(str, job["overrides"])] for name, job in told["jobs"].items()}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other sweep out of this folder.

        Raises:
            UserError: another one is at work in it.
        """
        elsewhere = "hydra.sweep.dir=DIR starts one elsewhere"

        def refusal(owner: str) -> str:
            return f"this sweep is already at work in {self.path} ({owner}): {elsewhere}"

        with locked(self.path / "sweep.lock", refusal=refusal):
            yield

    def ask(self, overrides: Sequence[str]) -> RunDir:
        """The directory of a job, which from now on belongs to the sweep."""
        name = job_name(overrides)
        self._asked.setdefault(name, list(overrides))
        return RunDir(self.path / name)

    def jobs(self) -> list[Job]:
        """All jobs, in the order of asking; those of another launcher by what lies in the folder."""
        begun = sorted(status.parent for status in self.path.glob("*/status.json"))
        asked = dict(self._asked)
        for path in begun:
            asked.setdefault(path.name, RunDir(path).overrides())
        statuses = {path.name: shown_status(path, Notes()) for path in begun}
        return [Job(name, texts, statuses.get(name, {})) for name, texts in asked.items()]

    def succeeded(self) -> bool:
        """Whether every job is complete."""
        return all(job.state == "finished" for job in self.jobs())

    def begin(self, command: str) -> None:
        """Write down which command is at work."""
        self.command = command
        self.write()

    def finish(self) -> None:
        """Write and print how all jobs stand, and what they came to."""
        self.write()
        if not (jobs := self.jobs()):
            return
        notes = Notes()
        rows = as_csv([self.path], notes).encode()
        write_atomic(self.path / "results.csv", lambda file: file.write(rows))
        for line in notes.warnings:
            print(f"capsexp: {line}", file=sys.stderr)
        Console().print(table(jobs))
        self._put_beside_paper(jobs)
        print(f"sweep: {self.path}\ncurves: tensorboard --logdir {self.path}")

    def _put_beside_paper(self, jobs: Sequence[Job]) -> None:
        """Print and write down the recipes with our errors beside the paper's, if they have any."""
        paths = [self.path / job.name for job in jobs if job.status]
        runs = read_all(paths, Notes())  # whose blemishes are told already
        if not any(run.paper for run in runs):
            return
        recipes = dict.fromkeys(run.choices["experiment"] for run in runs if "experiment" in run.choices)
        comparison = beside_paper(runs, recipes=list(recipes))
        words = [text for text in jobs[0].overrides if all(text in job.overrides for job in jobs)]
        changes = [
            text for text in words if affects_results(text) and not text.startswith(("experiment=", "seed="))
        ]
        remark = f"\nOurs with {' '.join(changes)}; the paper's figures are its own.\n" if changes else ""
        print_comparison(comparison)
        print(remark)
        content = f"{markdown(comparison)}{remark}".encode()
        write_atomic(self.path / "table.md", lambda file: file.write(content))

    def write(self) -> None:
        """Write sweep.json."""
        jobs = {job.name: {"overrides": job.overrides, **_summary(job.status)} for job in self.jobs()}
        content = {"command": self.command, "written": time.time(), "jobs": jobs}
        write_atomic(
            self.path / "sweep.json", lambda file: file.write(json.dumps(content, indent=1).encode())
        )


def told_apart(overrides: Sequence[Sequence[str]]) -> list[str]:
    """What each job has and not all have, with short keys; of a single job, everything."""
    common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()
    return [" ".join(_short(text) for text in one if text not in common) or "as it is" for one in overrides]


def names(jobs: Sequence[Job]) -> dict[str, str]:
    """What each job is called in front of the user, by its own name."""
    told = told_apart([job.overrides for job in jobs])
    return {job.name: words for job, words in zip(jobs, told, strict=True)}


def table(jobs: Sequence[Job], *, rows: int | None = None) -> Table:
    """The jobs with what tells them apart, and how they stand.

    Args:
        jobs: all of a sweep.
        rows: at most so many, of the jobs that are at work or failed first; None for all.
    """
    shown = (
        sorted(jobs, key=lambda job: job.state not in ("running", "failed", "died"))[:rows] if rows else jobs
    )
    told = Table(Column("job", overflow="fold"), "status", "step", "validation", "test", "time", "")
    called = names(jobs)
    for job in sorted(shown, key=jobs.index):
        status, colour = job.status, COLOURS.get(job.state, "dim")
        test = status.get("results", {}).get("test/accuracy") if job.state == "finished" else None
        told.add_row(
            Text(called[job.name]),
            Text(job.state, colour),
            f"{status['step']}/{status['total']}" if "total" in status and "step" in status else "",
            _four_digits((status.get("best") or {}).get("accuracy")),
            _four_digits(test),
            f"{status['seconds']:.0f} s" if "seconds" in status else "",
            Text(_failure(status)),
        )
    if len(shown) < len(jobs):
        states = [job.state for job in jobs]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        told.caption = f"{len(jobs)} jobs: {counts}"
    return told


def _short(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{key.rpartition('.')[2]}{equals}{value}"


def _summary(status: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("status", "step", "total", "best", "results", "seconds", "error", "exit_code")
    return {key: status[key] for key in kept if key in status}


def _failure(status: Mapping[str, Any]) -> str:
    lines = str(status.get("error", "")).splitlines()
    return lines[0][:200] if lines and status.get("status") == "failed" else ""


def _four_digits(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.4f}"
