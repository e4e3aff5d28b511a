"""Turn out-of-memory errors into advice."""

import contextlib
import errno
import resource
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from capsexp.config.components import Components
from capsexp.errors import UserError, first_line
from capsexp.training.memory_parts import Part, memory_parts

MIB = 2**20
SHOWN_SHARE = 0.25
"""A part is named if it has at least this share of the largest part."""

SIGNS = (
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # torch on a CPU, elsewhere than on Linux
    "out of memory",  # CUDA, MPS
    "bad_alloc",  # C++
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "Unable to allocate",  # NumPy
    "Cannot allocate memory",  # the system
)
READING = ("capsexp.dataset.", "capsexp.data.dataset", "capsexp.data.split", "capsexp.data.cache")


class OutOfMemoryError(UserError):
    """An allocation failed."""

    exit_code = 1


def peak_resident() -> int:
    """Return the peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def explain_out_of_memory(
    components: Components, config: Mapping[str, Any], *, training: bool
) -> Iterator[None]:
    """Turn an out-of-memory error into one that names what is large, and the settings that make it smaller.

    Args:
        components: of the run.
        config: the plain config that they are built from.
        training: whether there are gradients and an optimizer.

    Raises:
        OutOfMemoryError: an allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:  # torch raises a RuntimeError for an accelerator
        if not is_out_of_memory(error):
            raise
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        reading = _was_reading(error)
    else:
        return
    # Only here is the memory that the error's frames held free again.
    try:
        parts = memory_parts(components, config, training=training, reading=reading)
    except Exception as error:  # a network from a plugin may not work with tensors that have no memory
        parts = []
        detail += f" (its sizes cannot be computed: {first_line(error)})"
    lines = [f"out of memory, with a peak of {peak / MIB:,.0f} MiB", *_advice(parts)]
    raise OutOfMemoryError(f"{'. '.join(lines)}; the allocator says: {detail}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that an allocation failed, in the words of PyTorch, NumPy or the system."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(sign in str(error) for sign in SIGNS)


def _advice(parts: list[Part]) -> Iterator[str]:
    """Yield what is large, and the settings that help."""
    ranked = sorted(parts, key=lambda part: part.size, reverse=True)
    shown = [part for part in ranked if part.size >= SHOWN_SHARE * ranked[0].size][:3]
    if not shown:
        yield "Try trainer.batch_size=1, smaller images (dataset.preprocess.resize) or a smaller network"
        return
    yield f"The largest part{'s' * (len(shown) > 1)}: {'; '.join(map(str, shown))}"
    settings = list(dict.fromkeys(setting for part in shown for setting in part.settings))
    if settings:
        yield f"To make them smaller: {', '.join(settings)}"


def _was_reading(error: BaseException) -> bool:
    """Whether the error comes from reading a dataset, or from moving it to the device."""
    return any(_reads(frame) for frame in _frames(error))


def _reads(frame: types.FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return module.startswith(READING) or frame.f_code.co_qualname == "Batches.__init__"


def _frames(error: BaseException) -> Iterator[types.FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next
