import subprocess
import sys

import pytest
import torch

from capsexp.training import device
from capsexp.training.device import Device

PLAIN = {
    "name": "cpu",
    "threads": None,
    "memory_format": "contiguous",
    "allocator": "default",
    "deterministic": False,
}


def test_auto_is_the_fastest_available_device(monkeypatch):
    monkeypatch.setattr(device, "available", lambda: {"cuda": False, "mps": True, "cpu": True})
    assert Device(**{**PLAIN, "name": "auto"}).torch_device.type == "mps"
    monkeypatch.setattr(device, "available", lambda: {"cuda": False, "mps": False, "cpu": True})
    assert Device(**{**PLAIN, "name": "auto"}).torch_device.type == "cpu"


def test_an_unavailable_device_is_refused(monkeypatch):
    monkeypatch.setattr(device, "available", lambda: {"cuda": False, "mps": False, "cpu": True})
    with pytest.raises(ValueError, match="no cuda device here; available: cpu"):
        Device(**{**PLAIN, "name": "cuda"})


def test_threads_must_be_positive():
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        Device(**{**PLAIN, "threads": 0})


def test_memory_formats_are_torchs():
    assert Device(**PLAIN).memory_format is torch.contiguous_format
    assert Device(**{**PLAIN, "memory_format": "channels_last"}).memory_format is torch.channels_last


def test_preparing_sets_threads_and_determinism():
    threads = torch.get_num_threads()
    try:
        Device(**{**PLAIN, "threads": 1, "deterministic": True}).prepare()
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not device.has_tunable_allocator(), reason="only glibc's malloc can be tuned")
def test_the_tuned_allocator_keeps_large_buffers():
    """Allocate and free 64 MiB over and over: page faults show whether memory went back to the system."""
    program = """
import resource, sys
from capsexp.training.device import tune_allocator
if sys.argv[1] == "tuned":
    assert tune_allocator()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def cycle():
    pointer = libc.malloc(ctypes.c_size_t(64 << 20))
    ctypes.memset(pointer, 1, 64 << 20)
    libc.free(pointer)
cycle()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    cycle()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", program, mode], capture_output=True, text=True, check=True
            ).stdout
        )
        for mode in ("tuned", "default")
    }
    assert faults["tuned"] < faults["default"] / 10
