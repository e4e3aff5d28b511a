"""Signals as a wish that the training loop can ask for between two steps."""

import contextlib
import signal
import types
from pathlib import Path
from typing import Any

from capsexp.errors import Preempted, RunStopped

# The user signals are how a cluster's scheduler says that the time is nearly up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Notes a signal while it is entered; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """Of a process that ends for the signal: 130 after Ctrl-C, 143 after SIGTERM."""
        assert self.number is not None
        return 128 + self.number

    def end(self, step: int, path: Path) -> None:
        """End a run that has saved what it has, or let it go on if the signal is a scheduler's to judge.

        Raises:
            RunStopped: the signal was ours.
            Preempted: a scheduler that had put up its own handler, such as submitit, takes the run away.
        """
        assert self.number is not None
        number, self.number = self.number, None
        theirs = self._before.get(number)
        if callable(theirs) and theirs is not signal.default_int_handler:
            with _as_preemption():
                theirs(number, None)
            return
        name = signal.Signals(number).name
        line = f"{name}: stopped at step {step}; the same command with run={path} goes on"
        raise RunStopped(line, exit_code=128 + number)

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


@contextlib.contextmanager
def _as_preemption() -> Any:
    try:
        yield
    except SystemExit as error:
        raise Preempted(error.code) from None
