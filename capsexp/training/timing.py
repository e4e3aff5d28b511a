"""The seconds of a training: a clock of its steps, and the file that holds them beside the metrics.

timing.jsonl has a line for every step in metrics.jsonl: `step`, and `training_seconds`, the seconds of all
training steps up to it with their data, without validation, checkpoints, tests and the time while the run was
stopped. The steps that a kill has lost do not count either. It is a file of its own because metrics.jsonl
holds only what a resumed run repeats bit for bit.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from capsexp.documents import parse_json
from capsexp.errors import is_integer, is_number
from capsexp.files import open_own, read_regular, write_atomic, writing

FILE = "timing.jsonl"


class StepClock:
    """Measures single training steps; what lies between `stop` and `start` does not count.

    Args:
        agree: takes the seconds of a step in this process, and returns those that count.
    """

    def __init__(self, agree: Callable[[float], float] = float) -> None:
        self._agree, self._began = agree, now()

    def start(self) -> None:
        """Begin a step, before its batch is made."""
        self._began = now()

    def stop(self) -> float:
        """Return the seconds since `start`."""
        return self._agree((now() - self._began) / 1e9)


def now() -> int:
    """Return nanoseconds of a clock that is never set back; whole numbers, so that differences are exact."""
    return time.monotonic_ns()


class TimingFile:
    """Writes timing.jsonl.

    Args:
        path: the run directory.
        start_step: the step at which this process starts; later lines are of steps that a kill has lost.

    Raises:
        WriteError: the file cannot be written, also in every method.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        self._path = path / FILE
        kept = {step: seconds for step, seconds in read_timing(path).items() if step <= start_step}
        self._last = max(kept, default=-1)
        if self._path.exists():
            content = b"".join(_line(step, seconds) for step, seconds in kept.items())
            write_atomic(self._path, lambda file: file.write(content))
        self._file = open_own(self._path, "ab")

    def add(self, step: int, seconds: float) -> None:
        """Add the line of a step, unless there is one."""
        if step <= self._last:
            return
        with writing(self._path):
            self._file.write(_line(step, seconds))
            self._file.flush()
        self._last = step

    def close(self) -> None:
        """Close the file."""
        with writing(self._path):
            self._file.close()


def read_timing(run: Path) -> dict[int, float]:
    """Return the training seconds of a run by step; empty for a run of an older version.

    Damaged lines are left out, and so is what follows a kill inside a line.
    """
    try:
        lines = read_regular(run / FILE).split(b"\n")
    except OSError:
        return {}
    seconds: dict[int, float] = {}
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError):
            entry = parse_json(line)
            step, value = (entry.get(key) for key in ("step", "training_seconds"))
            if is_integer(step) and is_number(value) and value >= 0:
                seconds[step] = value
    return seconds


def _line(step: int, seconds: float) -> bytes:
    return json.dumps({"step": step, "training_seconds": seconds}).encode() + b"\n"
