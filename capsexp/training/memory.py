"""Turn out-of-memory errors into advice."""

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch

from capsexp.errors import UserError


class OutOfMemoryError(UserError):
    """An allocation failed."""

    exit_code = 1


def peak_resident() -> int:
    """Return the peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def explain_out_of_memory(*, batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the settings to change.

    Raises:
        OutOfMemoryError: an allocation failed; the message has the peak and the settings.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises a RuntimeError for an accelerator
        if not _is_out_of_memory(error):
            raise
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise OutOfMemoryError(
            f"out of memory at trainer.batch_size={batch_size}, with a peak of {peak / 2**20:,.0f} MiB: "
            f"lower it, or split its batches with trainer.accumulate=2; the allocator says: {detail}"
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
