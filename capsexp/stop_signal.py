"""SIGTERM and Ctrl-C as a wish that the training loop can ask for between two steps."""

import signal
import types
from pathlib import Path
from typing import Any

from capsexp.errors import RunStopped
from capsexp.parallel import ALONE, Processes


class StopSignal:
    """Notes SIGTERM and the first Ctrl-C while it is entered; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.agreed = 0
        self._before: dict[int, Any] = {}

    def asked(self, processes: Processes = ALONE) -> bool:
        """Whether a signal came, to this process or to another of the run."""
        # Another's signal is not noted as ours: ours, still to come, would count as the second Ctrl-C.
        self.agreed = processes.largest(self.number or 0)
        return self.agreed > 0

    def reason(self, step: int, path: Path) -> RunStopped:
        """The error to end a run with: exit code 130 after Ctrl-C, 143 after SIGTERM."""
        assert self.agreed
        name = signal.Signals(self.agreed).name
        line = f"{name}: stopped at step {step}; the same command with run={path} goes on"
        return RunStopped(line, exit_code=128 + self.agreed)

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
