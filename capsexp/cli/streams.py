"""Standard output and standard error: they may be closed, and their reader may go away."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

READER_GONE = (errno.EPIPE, errno.EIO)
"""Errors of a pipe that nobody reads (`capsexp … | head`), and of a terminal that was closed."""


class Output(io.FileIO):
    """A descriptor that takes and drops everything after its first error.

    The work goes on to its end: whether somebody reads what a run prints does not matter to the run.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write data, or drop them; return the number of bytes."""
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return len(data)


class Guarded:
    """The two streams of this process."""

    def __init__(self, stdout: Output, stderr: Output) -> None:
        self.stdout, self.stderr = stdout, stderr

    def exit_code(self, code: int, *, unread: int) -> int:
        """Return the exit code of the command.

        Args:
            code: that of its work.
            unread: replaces 0 if nobody has read all the output.
        """
        failure = self.stdout.failure or self.stderr.failure
        if failure is None:
            return code
        if failure.errno in READER_GONE:
            return code or unread
        print(f"capsexp: cannot write the output: {failure.strerror}", file=sys.stderr, flush=True)
        return code or 1


@contextlib.contextmanager
def guard() -> Iterator[Guarded]:
    """Replace both streams of this process, and open those that are closed."""
    _open_closed_descriptors()
    outputs = []
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        output = Output(descriptor, "w", closefd=False)
        stream = _stream(output, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
        outputs.append(output)
    try:
        yield Guarded(*outputs)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def _stream(output: Output, before: Any) -> IO[str]:
    """Return a text stream with the settings of the one before, which is None if it was closed."""
    if before is None:
        return io.TextIOWrapper(io.BufferedWriter(output), "utf-8", "replace", line_buffering=True)
    before.flush()
    unbuffered = isinstance(before.buffer, io.RawIOBase)  # python -u
    return io.TextIOWrapper(
        output if unbuffered else io.BufferedWriter(output),
        before.encoding,
        before.errors,
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )


def _open_closed_descriptors() -> None:
    """Open /dev/null in place of closed descriptors: the next file opened would get their number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
