"""The end of memory, told as something that a user can mend."""

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch

from capsexp.errors import UserError


class MemoryUsedUpError(UserError):
    """An allocator had no more to give."""

    exit_code = 1


def peak_resident() -> int:
    """The most bytes of memory that this process has had at a time."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def explain_out_of_memory(*, batch_size: int) -> Iterator[None]:
    """Turn the error of an allocator into one that says what to lower.

    Raises:
        MemoryUsedUpError: memory is used up; the message has the peak and the settings that count.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's error of an accelerator is a RuntimeError
        if not _is_of_memory(error):
            raise
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
        wish = " ".join(str(error).split())[:200] or type(error).__name__
        raise MemoryUsedUpError(
            f"out of memory at trainer.batch_size={batch_size}, with a peak of {peak / 2**20:,.0f} MiB: "
            f"lower it, or split its batches with trainer.accumulate=2; the allocator says: {wish}"
        ) from None


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
