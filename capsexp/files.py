"""Writes that end complete or not at all, and guarded reads.

capsexp writes only into regular files with one name, and makes files only in folders that are no links. It
never writes through a link, a pipe or a device: `write_atomic` replaces it, the other functions refuse it.
"""

import contextlib
import errno
import io
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from capsexp.errors import UserError

LARGEST_READ = 256 * 2**20
"""Bytes of the largest file that `read_regular` reads by default."""
LEFTOVER_SECONDS = 3600
"""Age at which the leftover of a killed write is removed by the next write of the same file."""
_UNFINISHED = re.compile(r"\.(.+)\.\d+\.tmp", re.DOTALL)


class WriteError(UserError, OSError):
    """A file or folder that cannot be written: a full disk, a place that can only be read, a link."""

    def __init__(self, path: Path, reason: str, *, number: int | None = None) -> None:
        super().__init__(f"cannot write into {path}: {reason}")
        self.errno, self.strerror = number, reason

    def __str__(self) -> str:
        return self.problems[0]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a `WriteError` that names a file or folder."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        if error.errno == errno.EFBIG:
            reason += " (the limit of the file system, or of ulimit -f)"
        raise WriteError(path, reason, number=error.errno) from None


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


def is_regular(path: Path) -> bool:
    """Whether there is a regular file; a link does not count."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def require_own(path: Path, *, replaced: bool = False) -> None:
    """Check that a name is free, or that of a folder, or of a regular file with no other name.

    Args:
        path: the name.
        replaced: the file will be replaced, not written into, so it may have other names (hard links).

    Raises:
        WriteError: it is something else.
    """
    try:
        status = os.lstat(path)
    except OSError:
        return
    if stat.S_ISLNK(status.st_mode):
        raise WriteError(
            path, f"it is a link to {os.readlink(path)}, which capsexp does not follow: remove it"
        )
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise WriteError(path, "it is a pipe, a device or a socket, no file: remove it")
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and not replaced:
        raise WriteError(path, "the file has another name (a hard link): replace it by a copy")


def open_own(path: Path, mode: str) -> IO[Any]:
    """Open a file to write into it; make it if it does not exist.

    Args:
        path: the file.
        mode: `ab`, `a`, `ab+` or `a+`, as for `open`; text is UTF-8.

    Raises:
        WriteError: no regular file with one name (see `require_own`), or the system refuses.
    """
    access = os.O_RDWR if "+" in mode else os.O_WRONLY
    with writing(path):
        require_own(path)
        # O_NONBLOCK: opening a pipe would wait for a reader.
        flags = access | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return open(os.open(path, flags, 0o666), mode, encoding=None if "b" in mode else "utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; if that fails, the file stays as it is.

    Raises:
        WriteError: see `open_own`.
    """
    with open_own(path, "ab") as file, writing(path):
        descriptor, content = file.fileno(), memoryview(line.encode() + b"\n")
        size = os.fstat(descriptor).st_size
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise


def own_folder(path: Path) -> Path:
    """Make a folder in a folder that exists; return it.

    Raises:
        WriteError: there is a link or a file of this name, or the system refuses.
    """
    with writing(path):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        require_own(path)
        if not path.is_dir():
            raise WriteError(path, "it is a file, not a folder: remove it")
    return path


def write_atomic(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file so that it appears under its name complete and on disk, or not at all.

    Args:
        path: the file; a link of this name is replaced.
        write: called with the opened file.

    Raises:
        WriteError: the system refuses, as on a full disk.
    """
    new = unfinished(path)
    with writing(path):
        _sweep_old(path)
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with _Sink(descriptor, new.name) as sink, io.BufferedWriter(sink) as file:
                try:
                    write(file)
                    file.flush()
                finally:
                    sink.require_success()
                os.fsync(descriptor)
            replace_durably(new, path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise


class _Sink(io.RawIOBase):
    """An open file whose first failed write is raised at the end.

    Inside torch.save and image encoders, an OSError turns into another error, or none. So writes after the
    first error seem to succeed. `fileno` is refused, because encoders would write past this object.
    """

    mode = "wb"

    def __init__(self, descriptor: int, name: str) -> None:
        self._file, self.name = io.FileIO(descriptor, "wb"), name
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._error is None:
            try:
                return self._file.write(data) or 0
            except OSError as error:
                self._error = error
        return size

    def require_success(self) -> None:
        """Raise the first error, if there was one."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        super().close()
        self._file.close()


def unfinished(path: Path) -> Path:
    """Return the name under which this process writes a file before it gets its own name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sweep_unfinished(folder: Path) -> None:
    """Remove what killed writes left in a folder. Call it only while no other process writes there."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _UNFINISHED.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)


def _sweep_old(path: Path) -> None:
    """Remove old leftovers of killed writes of this file: in an hour, no other process still writes it."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            name, status = _UNFINISHED.fullmatch(entry.name), entry.stat(follow_symlinks=False)
            is_leftover = name and name[1] == path.name and stat.S_ISREG(status.st_mode)
            if is_leftover and time.time() - status.st_mtime > LEFTOVER_SECONDS:
                os.unlink(entry.path)


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        WriteError: the system refuses.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def require_writable(folder: Path) -> None:
    """Check that files can be made in a folder, before the work whose result they hold.

    Raises:
        WriteError: they cannot.
    """
    import tempfile

    with writing(folder), tempfile.TemporaryFile(dir=folder):
        pass


def replace_durably(source: Path, target: Path) -> None:
    """Rename a file that is complete and on disk, so that its new name survives a power cut."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
