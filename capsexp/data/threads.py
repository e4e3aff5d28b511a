"""Read many files in threads, and report all problems at once."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from capsexp.data.decode import quiet
from capsexp.errors import DataError

MOST_THREADS = 8
SHOWN = 20
"""Problems of which each has a line; the others are counted."""

T = TypeVar("T")
F = TypeVar("F")


def map_files(read: Callable[[F], T], files: Sequence[F]) -> list[T]:
    """Return what `read` returns for each file, in their order.

    Raises:
        DataError: a line for each file for which `read` raised a DataError, up to a number.
    """
    results, problems = try_files(read, files)
    refuse(problems)
    return results


def try_files(read: Callable[[F], T], files: Sequence[F]) -> tuple[list[T], list[str]]:
    """Return the results of `map_files` without those of bad files, and a line for each bad file."""

    def attempt(file: F) -> T | DataError:
        try:
            return read(file)
        except DataError as error:
            return error

    pool = ThreadPoolExecutor(min(MOST_THREADS, _cores()))
    try:
        with quiet():
            attempts = list(pool.map(attempt, files))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not read the rest
    results = [result for result in attempts if not isinstance(result, DataError)]
    return results, [str(error) for error in attempts if isinstance(error, DataError)]


def refuse(problems: Sequence[str]) -> None:
    """Raise a DataError with the first lines of a list of problems and the number of the others, if any.

    Raises:
        DataError: there are problems.
    """
    if problems:
        more = len(problems) - SHOWN
        raise DataError(*problems[:SHOWN], *([f"and {more} more images like these"] if more > 0 else []))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
