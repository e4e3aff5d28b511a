"""SIGTERM and Ctrl-C as a wish that the training loop can ask for between two steps."""

import signal
import types
from pathlib import Path
from typing import Any

from capsexp.errors import RunStopped


class StopSignal:
    """Notes SIGTERM and the first Ctrl-C while it is entered; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def reason(self, step: int, path: Path) -> RunStopped:
        """The error to end a run with: exit code 130 after Ctrl-C, 143 after SIGTERM."""
        assert self.number is not None
        name = signal.Signals(self.number).name
        line = f"{name}: stopped at step {step}; the same command with run={path} goes on"
        return RunStopped(line, exit_code=128 + self.number)

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
