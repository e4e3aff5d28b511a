"""Errors of the exchange between the processes of a distributed run."""

import contextlib
import re
from collections.abc import Iterator

from capsexp.errors import UserError, first_line


class ProcessLostError(UserError):
    """Another process of the run does not answer."""

    exit_code = 1


@contextlib.contextmanager
def detect_lost_process() -> Iterator[None]:
    """Turn the error of an exchange into one that says how to resume."""
    try:
        yield
    except RuntimeError as error:
        hint = "run the same command to resume from the last checkpoint"
        raise ProcessLostError(f"lost another process of this run ({_reason(error)}); {hint}") from error


def _reason(error: RuntimeError) -> str:
    """Return the first sentence of an error of gloo or NCCL, without the place in their source code."""
    return re.sub(r"^\[\S+:\d+\] ", "", first_line(error)).partition(". ")[0]
