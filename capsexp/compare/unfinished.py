"""Runs that have stopped before their end, and the command that resumes each."""

import shlex
from collections.abc import Iterable

from capsexp.compare.runs import Run
from capsexp.training.run_dir import RunDir

STOPPED = ("interrupted", "died")
MOST = 5
"""Lines for a terminal."""


def resume_command(run: Run) -> str | None:
    """Return the command that continues a run; None for a run that has not stopped."""
    if run.status not in STOPPED:
        return None
    return shlex.join(["capsexp", "train", *RunDir(run.path).overrides(), f"run={run.path}"])


def unfinished_lines(runs: Iterable[Run]) -> list[str]:
    """Return a line for each of the first runs that have stopped."""
    stopped = [run for run in runs if run.status in STOPPED]
    lines = []
    for run in stopped[:MOST]:
        at = "" if run.step is None or run.total is None else f" at step {run.step} of {run.total}"
        lines.append(f"{run.path.name} has stopped{at}; resume it with: {resume_command(run)}")
    if len(stopped) > MOST:
        lines.append(f"{len(stopped) - MOST} more runs have stopped; the same command again resumes a run")
    return lines
