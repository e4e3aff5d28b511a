"""The parts of the report: each has its time, and what goes wrong in one does not stop the others."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "failed", "out of time"]
MINUTES, DRY_MINUTES = 10.0, 30.0
"""Limits of the whole: on a card, for which the parts' seconds are given, and of a dry run on a slow CPU."""


class Plan(NamedTuple):
    """What the command line asks for."""

    cpu: bool
    """A dry run: the same parts, small, on the CPU."""
    folder: Path
    """Of the report and of the training."""
    minutes: float
    """For everything together."""


class Outcome(NamedTuple):
    """What a part found."""

    status: Status
    message: str
    """One line."""
    result: dict[str, Any]
    """For the report; as JSON has it."""


class Part(NamedTuple):
    """A section of the report."""

    name: str
    title: str
    seconds: float
    """Its share of `MINUTES`; a later part also has what earlier ones leave over."""
    run: Callable[[Plan, float], Outcome]
    """Takes the time at which to be done, in seconds of `time.monotonic`."""


def run_parts(
    parts: Sequence[Part], plan: Plan, done: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Run the parts one after the other.

    Args:
        parts: in order.
        plan: for all of them.
        done: called with the entries so far after each part.

    Returns:
        An entry for each part: part, title, status, message, seconds, limit (seconds it had) and result.
    """
    entries: list[dict[str, Any]] = []
    end = time.monotonic()
    for part in parts:
        end += part.seconds * plan.minutes / MINUTES
        start = time.monotonic()
        print(f"{part.title}: at most {end - start:.0f} s", flush=True)
        outcome = _outcome(part, plan, end)
        seconds = time.monotonic() - start
        print(f"{part.title}: {outcome.status} after {seconds:.0f} s: {outcome.message}", flush=True)
        entries.append(
            {
                "part": part.name,
                "title": part.title,
                "status": outcome.status,
                "message": outcome.message,
                "seconds": round(seconds, 1),
                "limit": round(end - start, 1),
                "result": outcome.result,
            }
        )
        done(entries)
    return entries


def _outcome(part: Part, plan: Plan, end: float) -> Outcome:
    try:
        return part.run(plan, end)
    except TimeoutError as error:
        return Outcome("out of time", str(error), {})
    except Exception as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return Outcome("failed", f"{type(error).__name__}: {first_line}", {})
