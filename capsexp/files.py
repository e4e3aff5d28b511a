"""Atomic file writes, guarded reads, and a lock between processes."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from capsexp.errors import UserError

LARGEST_READ = 256 * 2**20
"""Bytes of the largest file that `read_regular` reads by default."""


def read_regular(path: Path, *, limit: int = LARGEST_READ) -> bytes:
    """Read a regular file; a pipe, a device or a huge file is an error instead of an endless read.

    Args:
        path: the file; a link to a regular file is followed.
        limit: bytes of the largest file that is read.

    Raises:
        OSError: no such file, not a regular file (EINVAL), or larger than the limit (EFBIG).
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:  # files of /proc have no size, and a file may grow
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return content


def write_atomic(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file so that it appears under its name complete and on disk, or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        replace_durably(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        UserError: the system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}") from None


def replace_durably(source: Path, target: Path) -> None:
    """Rename a file that is complete and on disk, so that its new name survives a power cut."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def locked(
    path: Path, *, wait: bool = False, refusal: Callable[[str], str] = "in use by {}".format
) -> Iterator[None]:
    """Hold a lock file. The system releases the lock when this process dies.

    Args:
        path: the file; it is created, with its folder, and it stays.
        wait: wait for another process to release the lock instead of raising an error.
        refusal: returns the error message for the name of the process that holds the lock.

    Raises:
        UserError: another process holds the lock and `wait` is False, or the folder cannot be made.
    """
    make_folder(path.parent)
    with open(path, "a+") as file:
        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
        elif not _try_lock(file, fcntl.LOCK_EX):
            file.seek(0)
            raise UserError(refusal(file.read() or "another process"))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file, as far as this machine can see."""
    try:
        with open(path) as file:
            return not _try_lock(file, fcntl.LOCK_SH)
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


def require_figure_file(file: Path, *, option: str) -> None:
    """Check the file name of a figure before the work whose result it will show.

    Raises:
        UserError: matplotlib does not know the format, or the folder does not exist.
    """
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in known:
        raise UserError(f"{option}: must be an image file ({', '.join(sorted(known))}), got {file}")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{option}: there is no folder {file.absolute().parent}")
    require_output(file)


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user named, complete or not at all; through links, and into devices and pipes.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with open(path, "wb") as file:
                file.write(content)
            return
        require_output(path)
        write_atomic(Path(os.path.realpath(path)), lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def require_output(path: Path) -> None:
    """Check that a file that the user named can be written, before the work whose result it will hold.

    Raises:
        UserError: it is a folder, has no folder, or the system refuses.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not target.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {target.parent}")
    if target.exists() and not os.access(target, os.W_OK):
        raise UserError(f"cannot write {path}: {os.strerror(errno.EACCES)}")
