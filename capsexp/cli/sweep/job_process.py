"""The end of a launcher that is felt by its jobs."""

import os
import signal
import sys
import threading

WATCHED = "CAPSEXP_JOB"  # in the environment of a job whose standard input is its launcher's to close


def end_with_launcher() -> None:
    """Send this process SIGTERM when its launcher is gone, so that it saves and nobody is left behind."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written: it returns at the end of the file
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
