"""Stop signals, polled between training steps."""

import contextlib
import signal
import types
from pathlib import Path
from typing import Any

from capsexp.errors import Preempted, RunStopped, Stopped
from capsexp.training.parallel import SINGLE, ProcessGroup

# A cluster's scheduler sends a user signal when the time is nearly up; SIGHUP is the end of the terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Records signals while it is entered; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.agreed = 0
        self._before: dict[int, Any] = {}

    def asked(self, processes: ProcessGroup = SINGLE) -> bool:
        """Whether this process, or another of the run, has received a signal."""
        # The signal of another process is not stored as ours: our own would then count as the second Ctrl-C.
        self.agreed = processes.max(self.number or 0)
        return self.agreed > 0

    @property
    def exit_code(self) -> int:
        """Exit code of a process that the signal ends: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.agreed

    def end(self, step: int, path: Path) -> None:
        """Stop a run that has saved its state, unless a scheduler's own handler lets it continue.

        Raises:
            RunStopped: no other handler was installed.
            Preempted: the handler of a scheduler, such as submitit's, stops the run.
        """
        number, self.number = self.agreed, None
        earlier = self._before.get(number)
        if callable(earlier):
            # Python's own handler and that of the command line only raise KeyboardInterrupt.
            with contextlib.suppress(KeyboardInterrupt), _as_preemption():
                earlier(number, None)
                return
        name = signal.Signals(number).name
        line = f"{name}: stopped at step {step}; run the same command with run={path} to resume"
        raise RunStopped(line, exit_code=128 + number)

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: types.FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise Stopped(number)
        self.number = number


@contextlib.contextmanager
def _as_preemption() -> Any:
    try:
        yield
    except SystemExit as error:
        raise Preempted(error.code) from None
