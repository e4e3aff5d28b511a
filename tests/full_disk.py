"""A disk that is full, for the tests of writes."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size):
    """Let the system refuse to write more than so many bytes into a file, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
