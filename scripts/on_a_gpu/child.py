"""Child processes that end in time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GRACE = 10
"""Seconds that a process has to end itself after an interrupt."""
_running: set[subprocess.Popen[str]] = set()


class Child(NamedTuple):
    """What a process left."""

    code: int
    out: str
    error: str
    """Its stderr."""
    in_time: bool

    def last_line(self) -> str:
        """Return what it said last on stderr, or else on stdout."""
        lines = (self.error.strip() or self.out.strip()).splitlines()
        return lines[-1].strip() if lines else f"no message, exit code {self.code}"


def run_child(
    command: Sequence[str], *, end: float, text: str = "", environment: Mapping[str, str] | None = None
) -> Child:
    """Run a command in the checkout, with its Python modules, and stop it and its children at a time.

    Args:
        command: program and arguments.
        end: when to stop it, in seconds of `time.monotonic`.
        text: for its stdin.
        environment: variables in addition to those of this process.

    Raises:
        TimeoutError: there is no time left to start it.
    """
    require_time(end)
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        start_new_session=True,
    )
    _running.add(child)
    try:
        out, error = child.communicate(text, timeout=end - time.monotonic())
        return Child(child.returncode, out, error, in_time=True)
    except subprocess.TimeoutExpired:
        return _stopped(child)
    finally:
        _kill(child)
        _running.discard(child)


def require_time(end: float) -> None:
    """Check that some time is left.

    Raises:
        TimeoutError: none is.
    """
    if time.monotonic() >= end:
        raise TimeoutError("no time was left to start")


def stop_children() -> None:
    """End all processes of `run_child`, from another thread."""
    for child in list(_running):
        _kill(child)


def python() -> str:
    """Return the Python that runs this."""
    return sys.executable


def _stopped(child: subprocess.Popen[str]) -> Child:
    """Interrupt a process, so that it can say what it did; kill it if it takes too long."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGINT)
    try:
        out, error = child.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        _kill(child)
        out, error = child.communicate()
    return Child(child.returncode, out, error, in_time=False)


def _kill(child: subprocess.Popen[str]) -> None:
    """Kill a process and what is left of its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all ended
        os.killpg(child.pid, signal.SIGKILL)
