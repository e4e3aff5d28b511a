"""Stop a job when its launcher exits."""

import os
import signal
import sys
import threading

JOB_VARIABLE = "CAPSEXP_JOB"  # set in the environment of a job, whose stdin is a pipe from its launcher


def end_with_launcher() -> None:
    """Send this process SIGTERM when its launcher exits, so that it saves a checkpoint and stops."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # the launcher writes nothing; this returns when the pipe closes
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
