"""A lock file between processes."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from capsexp.errors import UserError
from capsexp.files import is_regular, make_folder, open_own, writing


class Lock:
    """A lock file that this process holds."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path, self._file = path, file

    def is_in_place(self) -> bool:
        """Whether the file still has its name: not after its folder was removed, renamed or replaced."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.lstat(self._path))
        except FileNotFoundError:
            return False


@contextlib.contextmanager
def locked(
    path: Path, *, wait: bool = False, refusal: Callable[[str], str] = "in use by {}".format
) -> Iterator[Lock]:
    """Hold a lock file. The system releases the lock when this process dies.

    Args:
        path: the file; it is created, with its folder, and it stays.
        wait: wait for another process to release the lock instead of raising an error.
        refusal: returns the error message for the name of the process that holds the lock.

    Raises:
        UserError: another process holds the lock and `wait` is False.
        WriteError: the file cannot be written, or is a link.
    """
    make_folder(path.parent)
    with open_own(path, "a+") as file:
        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
        elif not _try_lock(file, fcntl.LOCK_EX):
            file.seek(0)
            raise UserError(refusal(file.read() or "another process"))
        with writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield Lock(path, file)


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file, as far as this machine can see."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor) as file:
            return is_regular(path) and not _try_lock(file, fcntl.LOCK_SH)
    except OSError:
        return False


def _try_lock(file: IO[str], kind: int) -> bool:
    # Try more than once: `is_locked` holds the lock for a moment.
    for _ in range(5):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False
