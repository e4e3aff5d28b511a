"""The signals that end a command: Ctrl-C, SIGTERM and SIGHUP, the end of the terminal.

While a run trains, `capsexp.training.stop_signal` handles them, because it saves first.
"""

import contextlib
import os
import signal
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING

from capsexp.errors import Stopped

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ending_quietly() -> Iterator[None]:
    """Let a signal raise `Stopped`, once; a second signal ends the process at once.

    A signal that was ignored before stays ignored: `nohup` ignores SIGHUP.
    """
    handled = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
    stop = _Stop()
    for number in handled:
        signal.signal(number, stop)
    sys.unraisablehook = _end_if_stopped
    try:
        yield
    except Exception:
        if stop.number is None:
            raise
        os._exit(128 + stop.number)  # a library has replaced `Stopped` by an error of its own
    finally:
        for number in handled:  # Python's own handler would print a traceback while the process ends
            signal.signal(number, signal.SIG_DFL)


class _Stop:
    """A handler of signals."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        # Extension modules lose or replace an exception that is raised while they are imported.
        if self.number is not None or _imports(frame):
            os._exit(128 + number)
        self.number = number
        raise Stopped(number)


def _imports(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end_if_stopped(unraisable: "UnraisableHookArgs") -> None:
    """End the process if `Stopped` was raised where Python drops exceptions, such as in a destructor."""
    if isinstance(unraisable.exc_value, Stopped):
        os._exit(unraisable.exc_value.exit_code)
    sys.__unraisablehook__(unraisable)
