"""The device to train on, and how PyTorch and the C allocator are set up for it."""

import ctypes
import platform
import sys
from typing import Literal

import torch
from torch import nn

from capsexp.errors import refuse, require_at_least_1, require_at_most

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

MOST_THREADS = 1024
"""More threads than a machine can start end the process without a message."""


class Device:
    """The device of a run.

    Args:
        name: `auto` is CUDA, then MPS, then the CPU.
        threads: CPU threads; None leaves PyTorch's choice.
        memory_format: layout of images and convolution weights.
        allocator: `tuned` keeps large buffers instead of returning them to the system after every
            operation (see `tune_allocator`).
        deterministic: raise an error for operations whose result may differ between two runs.

    Raises:
        ValueError: the device is not available, or threads < 1.
    """

    def __init__(
        self,
        *,
        name: Literal["auto", "cpu", "cuda", "mps"],
        threads: int | None,
        memory_format: Literal["channels_last", "contiguous"],
        allocator: Literal["tuned", "default"],
        deterministic: bool,
    ) -> None:
        require_at_least_1(threads=threads)
        require_at_most(MOST_THREADS, threads=threads)
        if name != "auto" and not available()[name]:
            names = ", ".join(device for device, is_available in available().items() if is_available)
            refuse(f"no {name} device here; available: {names}")
        self.torch_device = torch.device(best() if name == "auto" else name)
        self.threads, self.allocator, self.deterministic = threads, allocator, deterministic
        channels_last = memory_format == "channels_last"
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(self) -> None:
        """Change global settings of this process for the device.

        On the CPU with `allocator="tuned"` this tunes the C allocator, for good. It sets the number of CPU
        threads of torch if `threads` is not None, switches torch's deterministic algorithms on or off, and
        with `deterministic` disables the benchmark mode of cuDNN. Commands call it; loading a run does not.
        """
        if self.allocator == "tuned" and self.torch_device.type == "cpu":
            tune_allocator()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(self.deterministic)
        if self.deterministic:
            torch.backends.cudnn.benchmark = False

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device and into its memory format, in place."""
        return model.to(self.torch_device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def __str__(self) -> str:
        if self.torch_device.type == "cuda":
            return f"cuda ({torch.cuda.get_device_name()})"
        if self.torch_device.type != "cpu":
            return "mps"
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' * (threads != 1)})"


def available() -> dict[str, bool]:
    """Return, for each device that a config can name, whether it is available."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def best() -> str:
    """Return the name of the fastest available device."""
    return next(name for name, is_available in available().items() if is_available)


def has_tunable_allocator() -> bool:
    """Whether this process uses glibc's malloc, which `tune_allocator` needs."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def tune_allocator() -> bool:
    """Make glibc keep freed memory; return whether that succeeded.

    By default glibc maps every large buffer and unmaps it after use, so each operation on the CPU causes page
    faults on all of its output. Call this before the first large tensor is created. The price is that the
    process does not return memory to the system.
    """
    if not has_tunable_allocator():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 * 2**20}
    # Set all of them, even if one fails.
    return sum(mallopt(parameter, value) for parameter, value in settings.items()) == len(settings)
