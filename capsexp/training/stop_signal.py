"""Signals as a wish that the training loop can ask for between two steps."""

import contextlib
import signal
import types
from pathlib import Path
from typing import Any

from capsexp.errors import Preempted, RunStopped
from capsexp.training.parallel import SINGLE, ProcessGroup

# The user signals are how a cluster's scheduler says that the time is nearly up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Notes a signal while it is entered; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.agreed = 0
        self._before: dict[int, Any] = {}

    def asked(self, processes: ProcessGroup = SINGLE) -> bool:
        """Whether a signal came, to this process or to another of the run."""
        # Another's signal is not noted as ours: ours, still to come, would count as the second Ctrl-C.
        self.agreed = processes.max(self.number or 0)
        return self.agreed > 0

    @property
    def exit_code(self) -> int:
        """Of a process that ends for the signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.agreed

    def end(self, step: int, path: Path) -> None:
        """End a run that has saved what it has, or let it go on if the signal is a scheduler's to judge.

        Raises:
            RunStopped: the signal was ours.
            Preempted: a scheduler that had put up its own handler, such as submitit, takes the run away.
        """
        number, self.number = self.agreed, None
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
