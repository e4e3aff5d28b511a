"""Processes of our own that run Python code."""

import os
import sys


def python_command(code: str) -> list[str]:
    """Return a command that runs code in a new process, which imports modules from where this one does.

    `python -m` would search the working directory first: a file `random.py` there would replace Python's.
    """
    return [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]


def protect_children() -> None:
    """Let no Python process below this one import from the working directory, unless this one does.

    Clusters and torch.compile start such processes with `python -m`.
    """
    try:
        own = os.getcwd() in map(os.path.abspath, sys.path)  # "" is the working directory, too
    except FileNotFoundError:  # it was deleted
        own = False
    if not own:
        os.environ.setdefault("PYTHONSAFEPATH", "1")
